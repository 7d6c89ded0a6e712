"""Weight files: the readers, the hash, and the errors for unsuitable files."""

import hashlib
import json
import pathlib
import sys

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


def test_pytorch_files_and_what_to_do_without_torch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test)")
    tensors = {"a": torch.tensor(ARRAYS["a"]), "n": torch.tensor([1.0]).bfloat16()}
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "w.pth")
    arrays = read_weights(tmp_path / "w.pth").arrays
    np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])
    assert set(arrays) == {"a", "n"}
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="torch is not installed.*safetensors or .npz"):
        read_weights(tmp_path / "w.pth")


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
    for path in ("+".join(names), names, tuple(map(pathlib.Path, names)), default_paths("x")):
        read = read_weights(path)
        assert set(read.arrays) == {"a", "c"} and read.path == " + ".join(names)
    # a file whose own name has a "+" is one file, even beside files of its parts' names
    monkeypatch.chdir(tmp_path)
    np.savez("one.npz+two.npz", b=ARRAYS["a"])
    monkeypatch.setenv("CHEAPSCALE_WEIGHTS_X", "one.npz+two.npz")
    for path in ("one.npz+two.npz", default_paths("x")):
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
    with pytest.raises(ValueError, match="another version or is damaged"):
        read_weights(tmp_path / "one.npz", digests[1])


def test_what_is_wrong_with_a_file_is_named(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    weights = read_weights(tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"'a' has shape \(2, 3\) where .* has \(any, 4\)"):
        weights.take("a", -1, 4)
    with pytest.raises(ValueError, match="no weight 'z'"):
        weights.take("z", 1)
    with pytest.raises(ValueError, match="no weight file at .*gone.npz"):
        read_weights(tmp_path / "gone.npz")
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
