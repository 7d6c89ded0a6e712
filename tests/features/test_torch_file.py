"""PyTorch's files without PyTorch: equal arrays in every format, and refusals by name."""

import argparse
import collections
import io
import pathlib
import pickle
import random
import re
import shlex
import sys
import warnings
import zipfile

import numpy as np
import pytest

from cheapscale.features import torch_file
from cheapscale.features.torch_file import Refused, read_torch
from cheapscale.features.weights import read_weights

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test)")
FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def tensors():
    numbers = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    kinds += (torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    kinds = {str(kind): numbers.to(kind) for kind in kinds}
    return kinds | {
        "whole": numbers, "transposed": numbers.t(), "window": numbers[1:3, 2:5],
        "stepped": numbers[:, ::2], "tied": numbers, "empty": torch.zeros(0, 3),
        "number": torch.tensor(7), "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }  # fmt: skip


def saved(path, content, form="zip"):
    with warnings.catch_warnings(action="ignore"):
        torch.save(content, path, **FORMATS[form])
    return path


def check_equal(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, tensor in expected.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        ours = np.asarray(arrays[name], np.float64)
        np.testing.assert_array_equal(ours, tensor.detach().double().numpy(), err_msg=name)


@pytest.mark.parametrize("form", FORMATS)
def test_every_type_and_view_arrives_as_it_was_saved(tmp_path, form):
    extra = {"epoch": 3, "shape": torch.Size([1, 2]), "device": torch.device("cpu"), "names": {"a"}}
    content = {"net": tensors(), "kind": torch.float32, "lr": 0.1} | extra
    content = collections.defaultdict(dict, content)
    check_equal(read_torch(saved(tmp_path / "w.pt", content, form))["net"], tensors())


@pytest.mark.parametrize("form", FORMATS)
def test_state_dicts_and_optimisers_are_separate_groups(tmp_path, form):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.rand(4, 3)).sum().backward()
    optimiser.step()
    content = {"model": module.state_dict(), "optimizer": optimiser.state_dict()}
    content["ema"] = {"shadow_params": list(module.parameters()), "decay": 0.9}
    groups = read_torch(saved(tmp_path / "w.pt", content, form))
    check_equal(groups["model"], module.state_dict())
    assert {"ema.shadow_params", "optimizer.state.0"} <= groups.keys()
    state = optimiser.state_dict()["state"]
    check_equal(groups["optimizer.state.0"], state[0])


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_compiled_module_has_the_names_of_its_state_dict(tmp_path):
    inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
    module = torch.nn.Sequential(inner, torch.nn.PReLU(2))
    torch.jit.save(torch.jit.script(module), tmp_path / "w.pt")
    check_equal(read_torch(tmp_path / "w.pt")[""], module.state_dict())


def test_checksums_are_compared_where_the_file_has_them(tmp_path):
    path = saved(tmp_path / "w.pt", {"a": torch.arange(999)})
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(np.arange(5).tobytes())] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="data/0 has another checksum"):
        read_torch(path)
    torch.serialization.set_crc32_options(False)
    try:
        check_equal(read_torch(saved(path, {"a": torch.arange(9)}))[""], {"a": torch.arange(9)})
    finally:
        torch.serialization.set_crc32_options(True)


MODULE = torch.nn.Linear(3, 2)
FOREIGN = {
    "argparse.Namespace": {"model": MODULE.state_dict(), "args": argparse.Namespace(lr=1)},
    "torch.nn.modules.linear.Linear": MODULE,
    "torch.nn.modules.linear.Linear (net)": {"net": MODULE, "optimizer": {"state": {0: {}}}},
    "multiarray.scalar": {"a": torch.ones(2), "loss": np.float64(2)},
    "_rebuild_sparse_tensor": {"a": torch.ones(2, 2).to_sparse()},
    "_rebuild_sparse_tensor (model)": {"model": {"a": torch.ones(2, 2).to_sparse()}, "epoch": 1},
    "pathlib.*Path": {"model": {"sd": MODULE.state_dict(), "at": pathlib.Path("x")}},
    "argparse.Namespace (list)": {"ema": [torch.ones(2)], "args": argparse.Namespace(lr=1)},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FOREIGN)
def test_other_objects_are_refused_by_name_and_the_remedy_works(tmp_path, form, name):
    path = saved(tmp_path / "w $1.pt", FOREIGN[name], form)
    with pytest.raises(Refused, match=name.split(" ")[0]) as error:
        read_torch(path)
    command = shlex.split(str(error.value)[str(error.value).index("python -c") :])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    groups = read_torch(tmp_path / "w $1-weights.pt")
    (arrays,) = groups.values()
    left = {n: torch.ones(a.shape) for n, a in arrays.items()}  # all others hold ones
    check_equal(arrays, MODULE.state_dict() if "weight" in arrays else left)


def test_a_long_pickle_is_refused_with_a_remedy_that_works(tmp_path, monkeypatch):
    path = saved(tmp_path / "w.pt", {"model": MODULE.state_dict(), "losses": [0.5] * 9999})
    assert read_torch(path).keys() == {"model"}
    monkeypatch.setattr(torch_file, "MOST", 1 << 12)
    with pytest.raises(Refused, match="a pickle of more than"):
        read_torch(path)


def test_what_no_command_can_save_has_its_own_sentence(tmp_path):
    path = saved(tmp_path / "w.pt", {"a": torch.empty(2, device="meta")})
    with pytest.raises(Refused, match="holds shapes without numbers"):
        read_torch(path)
    own = type("Own", (), {"__module__": "__main__"})
    sys.modules["__main__"].Own = own
    try:
        saved(path, {"model": MODULE.state_dict(), "settings": own()})
    finally:
        del sys.modules["__main__"].Own
    with pytest.raises(Refused, match=r"save model.state_dict\(\) in the program .*__main__.Own"):
        read_torch(path)


class Danger:
    def __reduce__(self):
        return print, ("the pickle ran",)


@pytest.mark.parametrize("danger", [Danger(), {"model": {"w": torch.ones(2)}, "x": Danger()}])
def test_no_code_of_a_file_runs(tmp_path, danger, capsys):
    paths = [saved(tmp_path / f"{form}.pt", danger, form) for form in FORMATS]
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(danger, protocol=4))
    for path in (*paths, tmp_path / "plain.pkl"):
        with pytest.raises(Refused, match=r"builtin.*\.print"):
            read_torch(path)
    assert capsys.readouterr().out == ""


def with_pickle(path, content):
    """A zip of torch.save with another pickle in it."""
    whole = zipfile.ZipFile(io.BytesIO(saved(path, {"a": torch.ones(4)}).read_bytes()))
    with zipfile.ZipFile(path, "w") as made:
        for entry in whole.namelist():
            made.writestr(entry, content if entry.endswith("data.pkl") else whole.read(entry))
    return path


class Reference:
    """Pickled as a tensor of the storage "0", with these sizes."""

    def __init__(self, offset, shape, strides):
        self.sizes = offset, shape, strides


class Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if isinstance(value, Reference):
            return torch._utils._rebuild_tensor_v2, (Ellipsis, *value.sizes, False, {})
        return NotImplemented

    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if value is Ellipsis else None


BEYOND = [(0, (5,), (1,)), (4, (1,), (1,)), (0, (2, 2), (3, 1)), (0, (1 << 40,), (0,))]
BEYOND += [(-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,)), (0, (1 << 62, 1 << 62), (0, 0))]


@pytest.mark.parametrize("sizes", BEYOND)
def test_a_tensor_has_to_lie_in_its_storage(tmp_path, sizes):
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": Reference(*sizes)})
    with pytest.raises(ValueError, match="not a whole .pt file"):
        read_weights(with_pickle(tmp_path / "w.pt", stream.getvalue()))


ENDLESS = {
    "dicts in dicts": b"}" * 99 + b"X\x01\x00\x00\x00a".join([b""] * 1) + b".",
    "a tuple as a key": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "copies": b"X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x000"
    + b"c_codecs\nencode\nh\x00h\x00\x86R" * 10_000 + b".",
    "no end": b"(" * 1000,
    "an unknown number": b"h\x09.",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_pickles_that_would_grow_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"not a whole \.pt file|no tensors with"):
        read_weights(with_pickle(tmp_path / "w.pt", b"\x80\x02" + ENDLESS[name]))


@pytest.mark.parametrize("form", FORMATS)
def test_cut_and_changed_files_give_a_result_or_a_sentence(tmp_path, form):
    whole = saved(tmp_path / "w.pt", {"model": tensors()}, form).read_bytes()
    draw, path = random.Random(0), tmp_path / "x.pt"
    for trial in range(300):
        changed = bytearray(whole[: draw.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(draw.randrange(4)):
            changed[draw.randrange(len(changed)) : draw.randrange(len(changed))] = b"\xff"
        path.write_bytes(changed)
        try:
            assert read_weights(path).arrays
        except ValueError as error:
            assert str(path) in str(error)


def test_no_command_needs_torch():
    root = pathlib.Path(torch_file.__file__).parents[2]
    files = [
        *root.glob("cheapscale/**/*.py"),
        *root.glob("launch/*.py"),
        *root.glob("configs/*.py"),
    ]
    pattern = re.compile(r"^\s*(import|from) torch\b", re.MULTILINE)
    assert len(files) > 50 and not [file for file in files if pattern.search(file.read_text())]
