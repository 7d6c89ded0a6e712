"""Weight files: the readers, the hash, and the errors for unsuitable files."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from cheapscale import features
from cheapscale.features.classifier import Classifier, weights_hash
from cheapscale.features.weights import default_paths, read_weights

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.half": np.asarray([1.5, -2.0], np.float16),
    "c": np.asarray(7, np.int64),
}


def test_every_format_gives_the_same_arrays(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    bf16 = {"d": np.asarray([1.0, -3.5], jnp.bfloat16)}
    save_file(ARRAYS | bf16, tmp_path / "w.safetensors", {"format": "pt"})
    read = [read_weights(tmp_path / name).arrays for name in ("w.npz", "w.safetensors")]
    halves = read[1].pop("d")
    assert halves.dtype == np.float32 and halves.tolist() == [1.0, -3.5]
    for arrays in read:
        assert arrays.keys() == ARRAYS.keys()
        for name, value in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], value)


def test_sets_of_weights_in_one_file(tmp_path):
    torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test)")
    raw = {"a": torch.tensor(ARRAYS["a"]), "n": torch.tensor([1.0]).bfloat16()}
    other = {name: tensor + 1 for name, tensor in raw.items()}
    stray = {"epoch": torch.tensor(3), "optimizer": {"state": {0: {"exp_avg": raw["a"]}}}}
    one, both, path = tmp_path / "one.pth", tmp_path / "both.ckpt", tmp_path / "two#x.pth"
    for file in (one, path):
        torch.save({"model": raw} | stray, file)
    torch.save({"model": raw, "model_ema": other} | stray, both)
    for file in (one, path, f"{both}#model", f"{one}#model"):
        arrays = read_weights(file).arrays
        np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])
        assert arrays.keys() == {"a", "n"} and arrays["n"].dtype == np.float32
    with pytest.raises(ValueError, match="'model', 'model_ema': name one, as in .*ckpt#model"):
        read_weights(both)
    with pytest.raises(ValueError, match="nothing|'net'.*epoch, model, model_ema, optimizer"):
        read_weights(f"{both}#net")
    average = read_weights(f"{both}#model_ema+{one}#optimizer.state.0")
    np.testing.assert_array_equal(average.arrays["a"], ARRAYS["a"] + 1)
    assert set(average.arrays) == {"a", "n", "exp_avg"}
    # a fingerprint tells the sets of one file from each other
    assert average.sha256.split("+")[0] != read_weights(f"{both}#model").sha256


FILES = {
    "an HTML page": b"\n<!DOCTYPE html><html>not found</html>",
    "an HTML page ": b"<html>" + b"a" * 2000,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "not a whole    ": b'{"error": "Repository not found"}',
    "is empty": b"",
    "a gzip archive": b"\x1f\x8b\x08\x00abc",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "not a whole": b"\x80\x02}q\x00(X",
    "not a whole ": b"PK\x03\x04\x00\x00",
    "not a whole  ": b"<\x01\0\0\0\0\0\0{",
    "not a whole   ": b"\xff" * 16,
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@pytest.mark.parametrize("what", FILES)
def test_other_files_under_the_name_of_weights_are_named(tmp_path, suffix, what):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(FILES[what])
    with pytest.raises(ValueError, match=f"w{suffix}.*{what.strip()}"):
        read_weights(path)


def test_the_content_and_not_the_name_tells_the_format(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    save_file(ARRAYS, tmp_path / "w.safetensors")
    for name, wrong in (("w.npz", "a.pth"), ("w.safetensors", "b.npz"), ("w.npz", "c.safetensors")):
        (tmp_path / wrong).write_bytes((tmp_path / name).read_bytes())
        assert read_weights(tmp_path / wrong).arrays.keys() == ARRAYS.keys()


def test_a_header_of_safetensors_may_begin_like_a_pickle(tmp_path):
    for length in range(0, 264, 8):  # headers are padded to multiples of 8 bytes
        save_file(ARRAYS, tmp_path / "w.safetensors", {"format": "p" * length})
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "w.safetensors").read_bytes()[0] == 0x80
    assert read_weights(tmp_path / "w.safetensors").arrays.keys() == ARRAYS.keys()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files_give_a_sentence(tmp_path, save):
    path = tmp_path / "w.npz"
    save(path, a=np.random.default_rng(0).normal(size=(30, 30)))
    whole = path.read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="w.npz is (not a whole|empty)"):
            read_weights(path)
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            assert read_weights(path).arrays
        except ValueError as error:
            assert "w.npz" in str(error)
    np.savez(path, a=np.asarray([None, 1], object))
    with pytest.raises(ValueError, match="Python objects.*np.savez"):
        read_weights(path)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, wrong):
    bad = np.ones((2, 3))
    bad[1, 1:] = wrong
    np.savez(tmp_path / "w.npz", good=ARRAYS["a"], bad=bad)
    with pytest.raises(ValueError, match="2 of the 6 numbers of weight 'bad' are not finite"):
        read_weights(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", good=np.ones(2, np.complex64))
    with pytest.raises(ValueError, match="'good' has the type complex64"):
        read_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("kind", [np.int8, np.uint16, bool, str])
def test_quantised_weights_are_no_floats(tmp_path, kind):
    np.savez(tmp_path / "w.npz", a=np.ones((2, 3), kind), b=np.ones((2, 2)))
    with pytest.raises(ValueError, match="w.npz: weight 'a' is .*: dequantise it"):
        read_weights(tmp_path / "w.npz").take("a", 2, 3)


def test_weights_that_are_all_zero_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros((2, 3)), b=np.zeros((2, 2)), scale=np.ones(2))
    with pytest.raises(ValueError, match="w.npz: all weights are 0"):
        read_weights(tmp_path / "w.npz")


def test_float8_in_safetensors_is_named(tmp_path):
    torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test)")
    import safetensors.torch

    state = {"a": torch.ones(2, 3).to(torch.float8_e4m3fn), "b": torch.ones(2)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds 'float8_e4m3fn', which NumPy lacks"):
        read_weights(tmp_path / "w.safetensors")


def test_parts_of_a_network_are_given_together(tmp_path):
    parts = [str(tmp_path / f"m-0000{i}-of-00002.safetensors") for i in (1, 2)]
    index = tmp_path / "m.safetensors.index.json"
    index.write_text("{}")
    save_file({"a": ARRAYS["a"]}, parts[0])
    with pytest.raises(ValueError, match="is one of 2 files of a network: fetch them all"):
        read_weights(parts[0])
    save_file({"b": ARRAYS["a"]}, parts[1])
    for path in (parts[1], index):
        with pytest.raises(ValueError, match='joined by "\\+"') as error:
            read_weights(path)
        assert str(error.value).endswith("+".join(parts))
    assert read_weights("+".join(parts)).arrays.keys() == {"a", "b"}


def test_two_files_of_one_network_keep_their_names(tmp_path):
    paths = [tmp_path / "model01.npz", tmp_path / "ema_0.9_01.NPZ"]
    for value, path in enumerate(paths):
        with path.open("wb") as file:
            np.savez(file, **{"conv.weight": ARRAYS["a"] + value})
    arrays = read_weights(paths, every=True).arrays
    assert {name: array[0, 0] for name, array in arrays.items()} == {
        "model01.conv.weight": 0, "ema_0.9_01.conv.weight": 1,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_compiled_pytorch_modules(tmp_path):
    """OpenAI publishes CLIP in this form."""
    torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test)")
    module = torch.nn.Linear(3, 2).half()
    torch.jit.save(torch.jit.script(module), tmp_path / "w.pt")
    arrays = read_weights(tmp_path / "w.pt").arrays
    assert set(arrays) == {"weight", "bias"} and arrays["weight"].dtype == np.float32
    np.testing.assert_array_equal(arrays["weight"], module.weight.detach().float().numpy())


def test_the_environment_names_files_where_no_path_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv("CHEAPSCALE_WEIGHTS_VGG16_LPIPS", raising=False)
    with pytest.raises(ValueError, match="'vgg16_lpips'.* set CHEAPSCALE_WEIGHTS_VGG16_LPIPS"):
        features.load("vgg16_lpips")
    names = [str(tmp_path / "one.npz"), str(tmp_path / "two.npz")]
    for name in names:
        np.savez(name, **ARRAYS)
    monkeypatch.setenv("CHEAPSCALE_WEIGHTS_VGG16_LPIPS", "+".join(names))
    with pytest.raises(ValueError, match=r"one.npz \+ .*two.npz has no weight 'features.0.weight'"):
        features.load("vgg16_lpips")


def test_a_string_names_several_files_wherever_it_comes_from(tmp_path, monkeypatch):
    names = [str(tmp_path / name) for name in ("one.npz", "two.npz")]
    np.savez(names[0], a=ARRAYS["a"])
    np.savez(names[1], c=ARRAYS["c"])
    monkeypatch.setenv("CHEAPSCALE_WEIGHTS_X", "+".join(names))
    for path in ("+".join(names), names, tuple(map(pathlib.Path, names)), default_paths("x")[0]):
        read = read_weights(path)
        assert set(read.arrays) == {"a", "c"} and read.path == " + ".join(names)
    # a file whose own name has a "+" is one file, even beside files of its parts' names
    monkeypatch.chdir(tmp_path)
    np.savez("one.npz+two.npz", b=ARRAYS["a"])
    monkeypatch.setenv("CHEAPSCALE_WEIGHTS_X", "one.npz+two.npz")
    for path in ("one.npz+two.npz", default_paths("x")[0]):
        assert set(read_weights(path).arrays) == {"b"}
    for path, missing in (("one.npz+gone.npz", r"gone\.npz"), ("no+such.npz", r"no\+such\.npz")):
        with pytest.raises(ValueError, match=f"no weight file at {missing}: download it"):
            read_weights(path)


def test_hash_is_reported_and_checked_and_files_merge(tmp_path):
    for name, key in (("one.npz", "a"), ("two.npz", "c")):
        np.savez(tmp_path / name, **{key: ARRAYS[key]})
    digests = [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("one.npz", "two.npz")
    ]
    both = read_weights([tmp_path / "one.npz", tmp_path / "two.npz"], "+".join(digests))
    assert set(both.arrays) == {"a", "c"} and both.sha256 == "+".join(digests)
    with pytest.raises(ValueError, match="fetch it again"):
        read_weights(tmp_path / "one.npz", digests[1])


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    found = read_weights(tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"'a' has shape \(2, 3\) where .* has \(any, 4\)"):
        found.take("a", -1, 4)
    with pytest.raises(ValueError, match="no weight 'z'"):
        found.take("z", 1)
    with pytest.raises(ValueError, match="no weight file at .*gone.npz"):
        read_weights(tmp_path / "gone.npz")
    with pytest.raises(ValueError, match="is a folder: give the path of the weight file"):
        read_weights(tmp_path)
    np.savez(tmp_path / "other.npz", a=ARRAYS["a"] + 1)
    with pytest.raises(ValueError, match="hold different weights 'a'"):
        read_weights([tmp_path / "w.npz", tmp_path / "other.npz"])
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="'.h5'"):
        read_weights(tmp_path / "w.h5")
    save_file(ARRAYS, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a whole .safetensors file of arrays"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", sorted(features.BUILDERS.keys() - {"classifier"}))
def test_a_file_of_another_network_is_refused(name, tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    with pytest.raises(ValueError, match=r"w\.npz has no "):
        features.load(name, tmp_path / "w.npz")
    with pytest.raises(ValueError, match="unknown feature network 'vgg'"):
        features.load("vgg", tmp_path / "w.npz")


def test_classifier_file_round_trip(tmp_path):
    model = Classifier(num_classes=1 + 2, width=4, input_size=8)  # two logits are for degradations
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    np.savez(tmp_path / "w.npz", **flatten_dict(params, sep="/"))
    report = {"num_classes": 1, "width": 4, "purpose": "metric", "task": "label"}
    report |= {"feature_rms": 0.5, "sha256": weights_hash(params)}
    (tmp_path / "w.json").write_text(json.dumps(report))
    network = features.load("classifier", tmp_path / "w.npz", input_size=8)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    logits, maps, penultimate = jax.jit(model.apply)({"params": params}, x)
    outputs = jax.jit(network.outputs)(network.params, x)
    np.testing.assert_array_equal(outputs["logits"], logits[:, :1])
    np.testing.assert_array_equal(outputs["features"], 2 * penultimate)
    assert [m.shape for m in network.apply(network.params, x)] == [m.shape for m in maps]
    # A metric's products are in full float32 on any machine.
    assert "HIGHEST" in str(jax.make_jaxpr(network.outputs)(network.params, x))
    assert network.sha256 == report["sha256"]
    (tmp_path / "w.json").write_text("")
    with pytest.raises(ValueError, match="w.json is damaged"):
        features.load("classifier", tmp_path / "w.npz", input_size=8)
