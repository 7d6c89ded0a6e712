"""The stages of PaGoDA on captions: what each passes along, trains and freezes."""

import jax
import numpy as np
import pytest

import cheapscale
from cheapscale.data.pairs import PairStore
from cheapscale.data.sources import open_data
from cheapscale.teacher.load import load
from cheapscale.teacher.text import tokenise
from configs.scenes import get_config
from launch import sample
from launch import train as run

STAGES = ("pretrain", "invert", "distill")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{stage: its config}, after all stages ran in the folders root / stage."""
    root, finished = tmp_path_factory.mktemp("captions"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHEAPSCALE_CACHE", str(root / "cache"))
        for stage in STAGES:
            config = get_config(f"size=text,smoke,levels=1,stage={stage}")
            if "model" in config:
                config.model.channels = 8
                config.text.update(width=32, depth=1)
            if "discriminator" in config:  # pixels alone, as in stage regress: little to compile
                config[config.stage].feature_weight = 0.0
                config[config.stage].adversarial_weight = 0.0
            if "teacher" in config:
                config.teacher = str(root / "pretrain")
            if "latents" in config:
                config.latents = str(root / "latents")
            run.run(config, str(root / config.stage))
            finished[config.stage] = config
    return finished | {"root": root}


def test_latents_keep_the_caption_that_they_were_inverted_with(runs):
    source = open_data(runs["invert"].data)
    text = load(runs["root"] / "pretrain").net.config.text
    store = PairStore.open(runs["invert"].latents)
    labels = np.stack([store.record(i, 0)["label"] for i in range(len(source))])
    ways = [tokenise(text, source.captions(i)) for i in range(len(source))]
    places = [np.flatnonzero((rows == label).all(axis=1)) for rows, label in zip(ways, labels)]
    assert all(len(found) for found in places)  # a caption of that very image
    assert len({int(found[0]) for found in places}) > 2  # in several phrasings

    stage = run.build(runs["distill"])
    batch = next(stage.batches(0))
    rows = [tuple(row) for row in batch["pair"]["label"]]
    assert batch["pair"]["label"].dtype == np.int32 and set(rows) <= {*map(tuple, labels)}
    # Real images are reworded in each epoch, 3 steps of 8 images, and a resumed run repeats them.
    first, later, again = (next(stage.batches(step))["real"] for step in (0, 3, 3))
    np.testing.assert_array_equal(later["label"], again["label"])
    assert {*map(tuple, first["label"])} != {*map(tuple, later["label"])}


def test_the_encoder_trains_with_the_generator_and_travels_with_it(runs):
    teacher, base = (load(runs["root"] / name) for name in ("pretrain", "distill"))
    same = jax.tree.map(np.array_equal, teacher.params["text"], base.params["text"])
    assert not jax.tree.all(same)
    assert base.net.config.text == teacher.net.config.text


def test_prompts_condition_teachers_and_generators(runs, tmp_path):
    with pytest.raises(SystemExit, match="trained on captions: give --prompt"):
        sample.main([f"--model={runs['root'] / 'distill'}", "--labels=disc", f"--out={tmp_path}"])
    teacher, generator = (cheapscale.load(runs["root"] / name) for name in ("pretrain", "distill"))
    images, labels = generator.sample(4, labels=["a red star", "a blue ring"], seed=1)
    assert labels.shape == (4, 32) and (labels[0] == labels[2]).all()
    again, _ = generator.sample(4, labels=labels, seed=1)
    np.testing.assert_array_equal(images, again)
    other, _ = generator.sample(4, labels="a blue ring", seed=1)
    assert np.abs(other - images)[::2].max() > 0 and not (other - images)[1::2].any()
    words = [f"--model={runs['root'] / 'pretrain'}", "--num=2", "--steps=4", "--cfg_scale=3"]
    sample.main([*words, "--prompt=a red star", f"--out={tmp_path / 'guided'}"])
    with np.load(tmp_path / "guided" / "samples.npz") as stored:
        np.testing.assert_array_equal(stored["labels"][0], labels[0])
    # Guidance of the empty caption is none: both estimates are the same.
    plain = teacher.sample(2, labels="", steps=4, cfg_scale=1.0).images
    np.testing.assert_allclose(
        teacher.sample(2, labels="", steps=4, cfg_scale=3.0).images, plain, atol=1e-4
    )
