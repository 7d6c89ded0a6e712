"""Latent data sets, and models that are trained on them, which show and measure pictures."""

import json
import pathlib

import jax
import numpy as np
import pytest

import cheapscale
from cheapscale.data.augment import flip
from cheapscale.data.sources import open_data, open_pictures, open_source, pictures_of
from cheapscale.models.autoencoder import Autoencoder, TinyConfig, init_autoencoder
from cheapscale.teacher import codec as codecs
from cheapscale.training import jobs
from configs import clothing
from launch.train import build, run

TINY = TinyConfig(channels=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
PICTURES = {"name": "scenes", "split": "train", "resolution": 32, "data_dir": "", "flip": True,
            "options": {"size": 24}}  # fmt: skip


def config_of(stage, **changes):
    config = clothing.get_config(f"size=latents,base=8,smoke,stage={stage}")
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of 48 latents of 24 scenes at 32 and 16 px, the summary of its job)."""
    root = tmp_path_factory.mktemp("latents")
    raw = Autoencoder(init_autoencoder(TINY, jax.random.key(0)), TINY, (1.0,) * 4, (0.0,) * 4)
    codecs.write_codec(root / "raw.safetensors", raw)
    config = config_of("encode", encode__autoencoder=str(root / "raw.safetensors"))
    config.data.update(PICTURES)
    config.encode.update(folder=str(root / "data"), levels=2, per_shard=20)
    return root, config, run(config, root / "encode")


def latents(made, side, **more):
    return open_source("latents", "train", resolution=side, data_dir=str(made[0] / "data"), **more)


def test_channels_are_normalised_and_mirror_images_encoded(made):
    root, _, summary = made
    assert summary["sides"] == [16, 8] and summary["latents"] == 48
    source = latents(made, 16)
    x, labels = source.read(range(48))
    assert x.shape == (48, 16, 16, 4) and abs(x.std() - 0.5) < 0.02
    np.testing.assert_allclose(x[::2].std(axis=(0, 1, 2)), 0.5, atol=1e-3)
    np.testing.assert_allclose(x[::2].mean(axis=(0, 1, 2)), 0.0, atol=1e-3)
    codec = codecs.codec_of({"data": source.describe()})
    pictures, theirs = pictures_of(source).read(range(24))
    assert labels.tolist() == np.repeat(theirs, 2).tolist()
    np.testing.assert_allclose(x[::2], codec.encode(pictures), atol=1e-4)
    np.testing.assert_allclose(x[1::2], codec.encode(flip(pictures)), atol=1e-4)
    # A smaller side has the latents of the smaller pictures.
    small = pictures_of(latents(made, 8)).read([3])[0]
    assert small.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(latents(made, 8).read([6])[0], codec.encode(small), atol=1e-4)


def test_a_set_is_known_by_pictures_and_autoencoder(made):
    source = latents(made, 16)
    assert source.fingerprint() == latents(made, 8).fingerprint()
    assert source.class_names == pictures_of(source).class_names and source.caption(2)
    half = open_source("latents", "train[:50%]", resolution=8, data_dir=str(made[0] / "data"))
    assert len(half) == 24 and half.fingerprint() != source.fingerprint()
    data = {"name": "latents", "split": "train", "data_dir": str(made[0] / "data"),
            "resolution": 8, "options": {}, "flip": False}  # fmt: skip
    held = open_pictures(data, split="test")
    assert held.split == "test" and held.resolution == 16
    with pytest.raises(ValueError, match="data.flip is True, but a mirrored latent is not"):
        open_data(data | {"flip": True})


def test_only_missing_shards_are_made_again(made):
    root, config, _ = made
    path = root / "data" / "8" / "shard-00001.npy"
    before = np.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 shards of 8 latents a side: run stage enc"):
        latents(made, 8)
    job = build(config)
    assert [job.done(n) for n in range(6)] == [True] * 4 + [False, True]
    jobs.run(job, str(root / "encode"), config.to_dict(), name="encode")
    np.testing.assert_array_equal(np.load(path), before)


def test_other_latents_in_the_folder_are_refused(made):
    _, config, _ = made
    other = config.copy_and_resolve_references()
    other.encode.deviation = 1.0
    with pytest.raises(ValueError, match="has latents of another deviation .0.5, not 1.0.: give"):
        build(other)
    other.encode.deviation, other.data.resolution = 0.5, 30
    with pytest.raises(ValueError, match="2 levels of an autoencoder by 2 do not divide: .*=28"):
        build(other)
    with pytest.raises(ValueError, match="holds latents of 16 and 8 a side, not 4: give"):
        latents(made, 4)
    with pytest.raises(ValueError, match="holds latents of the split train, not test: give"):
        open_source("latents", "test", resolution=8, data_dir=str(made[0] / "data"))


@pytest.fixture(scope="module")
def trained(made):
    """{stage: work directory} of a teacher of 8 x 8 latents and of its one-step generator."""
    root = made[0]
    places = {name: root / name for name in ("pretrain", "invert", "regress")}
    for stage, folder in places.items():
        config = clothing.get_config(f"size=latents,base=8,smoke,levels=1,stage={stage}")
        config.data.update(name="latents", data_dir=str(root / "data"), flip=False)
        config.data.options = {}
        for name, place in (("teacher", "pretrain"), ("latents", "pairs")):
            if name in config:
                config[name] = str(root / place)
        run(config, folder)
    return places


def test_models_of_latents_draw_pictures(trained, made, tmp_path):
    teacher = cheapscale.load(trained["pretrain"])
    assert teacher.resolution == 16 and teacher.network.shape == (8, 8, 4)
    drawn, labels = teacher.sample(3, labels=1, steps=4)
    assert drawn.shape == (3, 16, 16, 3) and np.abs(drawn).max() <= 1
    # The same noise through the ODE alone, decoded by the autoencoder of the data set.
    source = latents(made, 8)
    codec = codecs.codec_of({"data": source.describe()})
    x = pictures_of(source).read([0, 1])[0]
    z = teacher.invert(x, 1, nodes=8)
    assert z.shape == (2, 8, 8, 4)
    again, whole = teacher.reconstruct(z, 1, nodes=8), np.asarray(codec.decode(codec.encode(x)))
    assert np.abs(again - np.clip(whole, -1, 1)).mean() < 0.05
    generator = cheapscale.load(trained["regress"])
    assert generator.resolution == generator.base == 16
    assert generator.sample(2).images.shape == (2, 16, 16, 3)
    scales, _ = teacher.cascade("2x", num=1, steps=3)
    assert [s.shape[1:] for s in scales] == [(16, 16, 3), (32, 32, 3)]


def test_the_autoencoder_may_move(trained, monkeypatch, tmp_path):
    meta = json.loads(json.dumps(cheapscale.load(trained["pretrain"]).network.meta["data"]))
    path = meta["codec"]["path"]
    moved = tmp_path / "autoencoder.safetensors"
    moved.write_bytes(pathlib.Path(path).read_bytes())
    meta["codec"]["path"] = str(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="is not at .*gone.safetensors: set CHEAPSCALE_WEIGHTS_"):
        codecs.codec_of({"data": meta})
    monkeypatch.setenv(codecs.VARIABLE, str(moved))
    assert codecs.codec_of({"data": meta}).config == TINY
