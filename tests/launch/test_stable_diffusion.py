"""`launch.sample` on a folder of a Stable Diffusion pipeline, as a user runs it."""

import jax
import numpy as np
import pytest

import cheapscale
from cheapscale.training.mesh import make_mesh
from launch import sample
from tests.interop import tiny_pipelines as tiny


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.fixture(scope="module")
def folder(torchvision, tmp_path_factory):
    for name in ("transformers", "diffusers"):
        pytest.importorskip(name, reason=f"install {name} (extra: test)")
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.save("sd1", folder)
    return folder


def test_prompts_become_pictures_at_the_trained_size_and_beyond(folder, tmp_path):
    words = [
        f"--model={folder}", "--prompt=a red dog", "--negative_prompt=blue dog", "--cfg_scale=7.5",
        "--sampler=ddim", "--steps=4", "--num=2", "--preview=0", "--cascade=2x", "--seed=3",
    ]  # fmt: skip
    summary = sample.main([*words, f"--out={tmp_path}"])
    # K = 0.7 T leaves three of four steps, of two calls each
    assert summary["nfe"] == [8, 6] and summary["resolution"] == 32
    images = {name: np.load(tmp_path / f"{name}.npz")["images"] for name in ("base", "samples")}
    assert images["base"].shape == (2, 16, 16, 3) and images["samples"].shape == (2, 32, 32, 3)
    assert (images["base"][0] != images["base"][1]).any()

    model = cheapscale.load(folder)
    assert model.resolution == 16 and model.captioned


def test_flags_that_contradict_are_one_sentence(folder):
    for words, said in (
        (["--sampler=ddim", "--method=heun"], "--sampler=ddim stands for --method: give one"),
        (["--step=3"], "has no checkpoint of step 3"),
        (["--negative_prompt=x"], "acts by guidance: give --cfg_scale=7.5"),
        (["--prompt=a <thing>"], "the embedding <thing>, which this model's vocabulary lacks"),
    ):
        with pytest.raises(SystemExit, match=said):
            sample.main([f"--model={folder}", "--num=1", *words])
