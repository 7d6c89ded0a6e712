"""Sets of images that evaluation reads: folders, files, stored pairs, samples."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cheapscale.data.pairs import PairStore
from cheapscale.data.sources import SceneSource
from cheapscale.data.tokens import train_vocabulary
from cheapscale.evaluation import image_sets
from cheapscale.evaluation.image_sets import (
    choice,
    chosen_images,
    file_images,
    file_pairs,
    generator_pairs,
    npz_images,
    sampled_images,
)
from cheapscale.models.text import TextConfig
from cheapscale.teacher.text import tokenise

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


def test_files_are_paired_in_their_order(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES)
    for i, image in enumerate(IMAGES):
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "b" / f"{i}.png")
    pairs = file_pairs(*(file_images(str(tmp_path / name), 16, 5) for name in ("a.npz", "b")))
    np.testing.assert_array_equal(*pairs.read(np.array([3, 0, 4])))
    with pytest.raises(ValueError, match="5 images of 16 px but 4 targets of 16"):
        file_pairs(pairs, file_images(str(tmp_path / "a.npz"), 16, 4))
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    folders = [file_images(str(tmp_path / name), 16, 5) for name in "bc"]
    np.testing.assert_array_equal(*file_pairs(*folders).read(np.arange(5)))
    (tmp_path / "c" / "2.png").rename(tmp_path / "c" / "9.png")
    with pytest.raises(ValueError, match="the target of 2 would be 3: give both the same name"):
        file_pairs(folders[0], file_images(str(tmp_path / "c"), 16, 5))


def test_the_contact_sheets_of_samples_are_not_measured(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "samples.png")
    np.savez(tmp_path / "samples.npz", images=np.zeros((4, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=f"give its file, --images={tmp_path}/samples.npz"):
        file_images(str(tmp_path), 16, 4)
    assert file_images(str(tmp_path / "samples.npz"), 16, 4).num == 4


@pytest.mark.parametrize("orientations", [1, 2])
def test_a_store_without_mirror_images_gives_pairs_of_a_generator(
    tmp_path, monkeypatch, orientations
):
    source, shape = SceneSource("train", 8, size=6), (8, 8, 3)
    n = orientations * len(source)
    wanted = {"teacher": "t", "direction": "invert", "source": source.describe(), "shape": shape}
    wanted |= {"num_images": len(source), "orientations": orientations, "dtype": "float32"}
    writer = PairStore.create(tmp_path, wanted | {"per_shard": n, "sigma_max": 80.0, "nodes": 3})
    labels = np.repeat(source.labels(), orientations)
    z = np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)
    writer.write_shard(0, z, labels, {"flops": 1.0, "seconds": 1.0})
    monkeypatch.setattr(image_sets, "in_batches", lambda call, model, z, *_, **__: z)
    model = SimpleNamespace(meta={"teacher": "t"}, fingerprint="g")
    pairs = generator_pairs(model, source, str(tmp_path), 99, batch_size=2)
    drawn, targets = pairs.read(np.arange(n))
    order = choice(n, 99)
    np.testing.assert_array_equal(drawn, np.clip(z[order], -1, 1))
    plain = source.read(order // orientations)[0]
    mirrored = (order % orientations == 1)[:, None, None, None]
    np.testing.assert_array_equal(targets, np.where(mirrored, plain[:, :, ::-1], plain))


def test_images_come_from_a_folder_or_a_file(tmp_path):
    np.savez(tmp_path / "own.npz", images=IMAGES, labels=np.arange(5))
    np.savez(tmp_path / "adm.npz", arr_0=IMAGES)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    for place in ("own.npz", "adm.npz", "folder"):
        found = file_images(str(tmp_path / place), 16, 5)
        read, _ = found.read(np.arange(5))
        assert sorted(map(bytes, read)) == sorted(map(bytes, IMAGES)), place
    with pytest.raises(ValueError, match="neither a folder nor"):
        file_images(str(tmp_path / "none"), 16, 5)
    with pytest.raises(ValueError, match="holds 16 px images, not 32"):
        file_images(str(tmp_path / "own.npz"), 32, 5)


def test_images_with_nan_are_refused():
    broken = SimpleNamespace(fingerprint="broken")

    def draw(ids, labels):
        return np.full((len(ids), 16, 16, 3), np.nan, np.float32), labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sets, "sampler", lambda model: draw)
        images = sampled_images(broken, 16, None, 4)
    with pytest.raises(ValueError, match="image 0 of 4 images holds a NaN"):
        images.read(np.arange(4))


def test_samples_of_captions_are_drawn_by_tokens_and_keep_their_texts(monkeypatch):
    texts = ["a red disc", "a blue ring", ""]
    text = TextConfig("transformer", 300, 4, 8, 1, 1, 8, tokenizer=train_vocabulary(texts, 300))
    model = SimpleNamespace(fingerprint="m", net=SimpleNamespace(config=SimpleNamespace(text=text)))
    drawn = []

    def draw(ids, labels):
        drawn.append(labels)
        return np.zeros((len(ids), 8, 8, 3), np.float32), labels

    monkeypatch.setattr(image_sets, "sampler", lambda model: draw)
    images = sampled_images(model, 8, None, 3, captions=texts)
    _, labels = images.read(np.array([2, 0]))
    np.testing.assert_array_equal(labels, [0, 0])
    np.testing.assert_array_equal(drawn[0], tokenise(text, ["", "a red disc"]))
    assert images.captions([1]) == ["a blue ring"] and not images.labelled
    other = sampled_images(model, 8, None, 3, captions=texts[::-1])
    assert other.fingerprint != images.fingerprint


def test_sets_of_other_images_have_other_fingerprints(tmp_path):
    prints = set()
    for name, arrays in {
        "a": {"images": IMAGES},
        "b": {"images": IMAGES[::-1]},
        "c": {"images": IMAGES, "labels": np.arange(5)},
        "d": {"images": IMAGES, "labels": np.arange(5)[::-1]},
        "e": {"images": IMAGES, "captions": np.asarray(list("abcde"))},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        prints.add(npz_images(tmp_path / f"{name}.npz", 5).fingerprint)
    prints.add(npz_images(tmp_path / "a.npz", 4).fingerprint)
    for source in (SceneSource("test", 16, size=5), SceneSource("test", 32, size=5)):
        prints.add(chosen_images(source, np.arange(5)).fingerprint)
    prints.add(chosen_images(source, np.arange(4)).fingerprint)
    assert len(prints) == 9
