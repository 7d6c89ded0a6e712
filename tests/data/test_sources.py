"""Sources: exact pixels, slices that partition a split, and errors that name a bad file."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cheapscale.data.resize import downsample, to_rgb
from cheapscale.data.source import parse_split
from cheapscale.data.sources import open_source

SETS = {"cifar10": (32, 1000), "noto_emoji": (128, 340), "clothing": (128, 372)}


@pytest.fixture
def folder(tmp_path):
    """A folder with two classes of three 24 x 20 images; one is grey, one has transparency."""
    rng = np.random.default_rng(0)
    for name in ("cat", "ant"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k, mode in enumerate(("RGB", "L", "RGBA")):
            pixels = rng.integers(0, 256, (20, 24, 4), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(mode)
            image.save(tmp_path / "train" / name / f"{k}.png")
    return tmp_path


# Every kind of source.


@pytest.mark.parametrize("cache", [False, True, None])
def test_reading_twice_returns_equal_independent_arrays(folder, cache):
    scenes = open_source("scenes", "test", resolution=16, size=5, cache=cache)
    files = open_source("folder", "train", resolution=8, data_dir=folder, cache=cache)
    for source in (scenes, files):
        first = source[3]
        assert first["image"].shape == (source.resolution,) * 2 + (3,)
        assert first["image"].dtype == np.float32 and np.abs(first["image"]).max() <= 1
        assert first["label"].dtype == np.int32 and first["id"] == 3 and first["id"].dtype == "i8"
        kept = first["image"].copy()
        first["image"][:] = 9
        np.testing.assert_array_equal(source[3]["image"], kept)
        labels = [source[i]["label"] for i in range(len(source))]
        np.testing.assert_array_equal(source.labels(), labels)
        with pytest.raises(IndexError, match="no image"):
            source[len(source)]


def test_slices_partition_a_split():
    whole = open_source("scenes", "train", resolution=8, size=11)
    parts = [
        open_source("scenes", f"train{s}", resolution=8, size=11) for s in ("[:50%]", "[50%:]")
    ]
    assert [len(p) for p in parts] == [6, 5] or [len(p) for p in parts] == [5, 6]
    images = [p[i]["image"] for p in parts for i in range(len(p))]
    np.testing.assert_array_equal(images, [whole[i]["image"] for i in range(11)])
    captions = [p.caption(i) for p in parts for i in range(len(p))]
    assert captions == [whole.caption(i) for i in range(11)]
    assert list(parse_split("test[2:4]", 9)[1]) == [2, 3]
    assert list(parse_split("test[7:400]", 9)[1]) == [7, 8]
    with pytest.raises(ValueError, match="not a name with a slice"):
        parse_split("train[half]", 9)
    with pytest.raises(ValueError, match=r"train\[5:5\] holds no images"):
        open_source("scenes", "train[5:5]", resolution=8)


def test_fingerprints_depend_on_content_but_not_on_resolution(folder):
    def scenes(split="train", **options):
        return open_source("scenes", split, **{"resolution": 8, "size": 10, **options})

    first = scenes().fingerprint()
    assert first == scenes().fingerprint() == scenes(resolution=64).fingerprint()
    others = [scenes("test"), scenes(seed=1), scenes(size=9), scenes("train[:50%]")]
    assert len({first, *(source.fingerprint() for source in others)}) == 5
    before = open_source("folder", "train", resolution=8, data_dir=folder).fingerprint()
    (folder / "train" / "ant" / "0.png").unlink()
    assert open_source("folder", "train", resolution=8, data_dir=folder).fingerprint() != before


def test_unlabelled_sources_have_label_zero():
    source = open_source("scenes", "train", resolution=8, size=6, unlabelled=True)
    assert source.num_classes == 0 and source.class_names == ()
    assert not source.labels().any() and source[5]["label"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("scenes", "validation"), "no split 'validation': choose train or test"),
        (
            ("scenes", "train", {"siez": 5}),
            "no option siez: .* takes cache, seed, single, size",
        ),
        (
            ("mnist", "train"),
            "no data set 'mnist' in .*, where nothing is prepared: give --config.data.data_dir=DIR",
        ),
        (("folder", "train"), "is not a folder|no split"),
    ],
)
def test_unknown_names_list_what_exists(tmp_path, arguments, message):
    name, split, *options = arguments
    place = {} if name == "scenes" else {"data_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        open_source(name, split, resolution=8, **place, **dict(*options))


def test_a_folder_for_scenes_is_refused_since_they_are_drawn(tmp_path):
    with pytest.raises(ValueError, match="scenes are drawn, not read from .*: leave data_dir out"):
        open_source("scenes", "train", resolution=8, data_dir=str(tmp_path))


# Image folders.


def test_folder_classes_are_sorted_subfolders_and_interleaved(folder):
    source = open_source("folder", "train", resolution=10, data_dir=folder)
    assert source.class_names == ("ant", "cat") and source.num_classes == 2
    assert source.labels().tolist() == [0, 1, 0, 1, 0, 1]
    half = open_source("folder", "train[:67%]", resolution=10, data_dir=folder)
    assert sorted(half.labels()) == [0, 0, 1, 1]
    for i in range(6):
        expected = downsample(to_rgb(Image.open(source.path(i))), 10)
        np.testing.assert_array_equal(source[i]["image"], expected)


def test_a_flat_folder_is_unlabelled(folder):
    source = open_source("folder", "all", resolution=8, data_dir=folder / "train" / "cat")
    assert len(source) == 3 and source.num_classes == 0
    assert source[1]["label"] == 0
    Image.new("RGB", (24, 24)).save(folder / "train" / "loose.png")
    with pytest.raises(ValueError, match="mixes images .loose.png"):
        open_source("folder", "train", resolution=8, data_dir=folder)
    with pytest.raises(ValueError, match="sub-folders are train, and split 'all'"):
        open_source("folder", "test", resolution=8, data_dir=folder)


def test_a_broken_file_is_named_or_skipped(folder):
    header = folder / "train" / "ant" / "0.png"
    header.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"ant/0.png is not a readable image .*skip_corrupt"):
        open_source("folder", "train", resolution=8, data_dir=folder)
    whole = (folder / "train" / "cat" / "2.png").read_bytes()
    (folder / "train" / "cat" / "2.png").write_bytes(whole[: len(whole) // 2])
    source = open_source("folder", "train", resolution=8, data_dir=folder, skip_corrupt=True)
    assert [os.path.basename(name) for name in source.skipped] == ["0.png", "2.png"]
    assert len(source) == 4 and source.labels().tolist() == [1, 0, 1, 0]
    header.unlink()
    late = open_source("folder", "train", resolution=8, data_dir=folder)  # its header is valid
    with pytest.raises(ValueError, match="cat/2.png does not decode"):
        late[len(late) - 1]


def test_a_small_image_is_named_unless_upscaling_is_allowed(folder):
    with pytest.raises(ValueError, match="ant/0.png has only 20 pixels along .* resolution 32"):
        open_source("folder", "train", resolution=32, data_dir=folder)
    late = open_source("folder", "train", resolution=32, data_dir=folder, probe=False)
    with pytest.raises(ValueError, match="ant/0.png: .*20x24 is smaller than resolution 32"):
        late[0]
    up = open_source("folder", "train", resolution=32, data_dir=folder, allow_upscale=True)
    assert up[0]["image"].shape == (32, 32, 3)


# Prepared TFDS sets.


@pytest.mark.parametrize("name", SETS)
def test_tfds_images_equal_those_that_pil_decodes(shared, name):
    native, count = SETS[name]
    tfds = str(shared / "data" / "tfds")
    source = open_source(name, "test", resolution=native, data_dir=tfds)
    small = open_source(f"tfds:{name}", "test", resolution=16, data_dir=tfds)
    assert len(source) == count and source.num_classes == len(source.class_names) == 10
    assert source.fingerprint() == small.fingerprint()
    for i in (0, 7, count - 1):
        pixels = np.asarray(Image.open(io.BytesIO(source.record(i)["image"])).convert("RGB"))
        expected = pixels / np.float32(127.5) - np.float32(1)
        for _ in range(2):  # decoded, then read from the cache
            np.testing.assert_array_equal(source[i]["image"], expected)
            np.testing.assert_array_equal(small[i]["image"], downsample(pixels, 16))
        assert source[i]["label"] == source.record(i)["label"]
    np.testing.assert_array_equal(source.labels()[[0, 7]], [source[0]["label"], source[7]["label"]])


def test_emoji_have_captions_and_can_be_filtered(shared):
    options = dict(resolution=16, data_dir=str(shared / "data" / "tfds"))
    every = open_source("noto_emoji", "test", **options)
    plain = open_source("noto_emoji", "test", where={"skin_tone": False}, **options)
    assert every.caption(0) == every.record(0)["caption"].decode() != ""
    kept = [i for i in range(len(every)) if not every.record(i)["skin_tone"]]
    assert len(plain) == len(kept) < len(every)
    assert [plain.caption(i) for i in range(5)] == [every.caption(i) for i in kept[:5]]
    np.testing.assert_array_equal(plain[4]["image"], every[kept[4]]["image"])
    assert plain.fingerprint() != every.fingerprint()
    assert open_source("clothing", "test", **options).caption(0) == ""


def test_tfds_errors_list_what_exists(shared):
    tfds = str(shared / "data" / "tfds")
    with pytest.raises(ValueError, match="'mnist'.* cifar10, clothing, noto_emoji.* is prepared"):
        open_source("mnist", "train", resolution=16, data_dir=tfds)
    with pytest.raises(ValueError, match="no split dev: it has test, train, validation"):
        open_source("clothing", "dev", resolution=16, data_dir=tfds)
    with pytest.raises(ValueError, match="32x32, smaller than resolution 64"):
        open_source("cifar10", "test", resolution=64, data_dir=tfds)
    with pytest.raises(ValueError, match="no feature colour: it has id, image, label"):
        open_source("cifar10", "test", resolution=16, data_dir=tfds, where={"colour": 1})


def test_reading_needs_neither_tensorflow_nor_jax(shared):
    """Grain imports jax if it is installed, so only the loader may import Grain."""
    program = (
        "import sys\n"
        "from cheapscale.data import augment, pairs, resize, scenes, sources\n"
        f"tfds = {str(shared / 'data' / 'tfds')!r}\n"
        "source = sources.open_source('cifar10', 'test', resolution=16, data_dir=tfds)\n"
        "source[0]; source.labels()\n"
        "sources.open_source('scenes', 'train', resolution=16)[0]\n"
        "print('jax' in sys.modules, 'tensorflow' in sys.modules)\n"
        "from cheapscale.data import loader\n"
        "next(loader.batches(source, batch_size=4, seed=0))\n"
        "print('tensorflow' in sys.modules)\n"
    )
    # Grain's own flags are parsed by absl's app.run in a real run.
    program = "from absl import flags; flags.FLAGS.mark_as_parsed()\n" + program
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False", "False", "False"]
