"""The evaluation job: what it measures does not depend on how it was cut, stopped or resumed."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cheapscale.data.sources import SceneSource
from cheapscale.evaluation.fid import frechet_distance, kernel_distance
from cheapscale.evaluation.pixels import from_uint8, to_uint8
from cheapscale.evaluation.quality import choice
from cheapscale.evaluation.statistics import Identity, save_statistics
from cheapscale.models.features import FeatureNetwork
from cheapscale.stages.evaluate import Settings, evaluation_job
from cheapscale.stages.image_sets import Images, Pairs, chosen_images, file_pairs
from cheapscale.training import jobs
from launch.evaluate import file_images


def pooled(side):
    """Features: means of a side x side grid of blocks; logits: the mean of each channel."""

    def outputs(params, x):
        n, size = x.shape[:2]
        blocks = x.reshape(n, side, size // side, side, size // side, 3).mean((2, 4))
        return {"features": blocks.reshape(n, -1) * params, "logits": 4 * x.mean((1, 2))}

    return FeatureNetwork("blocks", None, jnp.float32(1.0), sha256="b", outputs=outputs)


@pytest.fixture
def real():
    return SceneSource("test", 16, size=60)


@pytest.fixture
def train():
    return SceneSource("train", 16, size=50)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAPSCALE_CACHE", str(tmp_path / "cache"))


class Noisy:
    """Deterministic noisy copies of scenes, image i a function of i; counts what was read."""

    def __init__(self, num=40):
        self.source, self.seen = SceneSource("train", 16, size=num, seed=1), []
        self.images = Images(num, 16, self.read)

    def one(self, i):
        noise = np.random.default_rng(i).normal(0, 0.1, (16, 16, 3))
        return to_uint8(np.clip(self.source[i]["image"] + noise, -1, 1).astype(np.float32))

    def read(self, ids):
        self.seen += [int(i) for i in ids]
        return np.stack([self.one(int(i)) for i in ids]), np.zeros(len(ids), np.int32)


ALL = ("fd", "kid", "score", "prdc", "memorisation", "floor", "patch", "base")


def run(generated, workdir, real, train, networks=None, **settings):
    settings = {"metrics": ALL, "patch": 8, "base": 4, "batch_size": 16} | settings
    job = evaluation_job(
        generated.images, networks or [pooled(2)], Settings(**settings), workdir,
        real=real, train=train,
    )  # fmt: skip
    return jobs.run(job, workdir, {"per_shard": 0}, name="evaluate")


def numbers(summary):
    return {k: v for k, v in summary.items() if isinstance(v, float) and k != "device_seconds"}


def test_scores_are_those_of_all_images_at_once(tmp_path, real, train):
    generated = Noisy()
    found = run(generated, tmp_path / "a", real, train)

    def features(images):
        return np.asarray(pooled(2).outputs(1.0, from_uint8(images))["features"], np.float64)

    reals, trains = (chosen_images(s, choice(len(s), 1000)) for s in (real, train))
    a = features(generated.images.read(np.arange(40))[0])
    b = features(reals.read(np.arange(60))[0])
    assert found["fd_blocks"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert found["kid_blocks"] == pytest.approx(kernel_distance(a, b), rel=1e-3)
    c = features(trains.read(np.arange(50))[0])
    assert found["fd_blocks_floor"] == pytest.approx(frechet_distance(c[:40], b), rel=1e-4)
    nearest = np.linalg.norm(a[:, None] - c[None], axis=-1).min(1).mean()
    assert found["memorisation_blocks"] == pytest.approx(nearest, rel=1e-4)
    # noise is not seen at the base resolution as much as in crops at full resolution
    assert found["fd_blocks_b"] > 0 and found["pfd_blocks"] > 0
    assert found["networks"] == {"blocks": "b"}


def test_the_cut_into_shards_changes_nothing(tmp_path, real, train):
    whole = run(Noisy(), tmp_path / "a", real, train, per_shard=100)
    (tmp_path / "cache").rename(tmp_path / "other")  # the real images once more, in pieces too
    pieces = run(Noisy(), tmp_path / "b", real, train, per_shard=7, batch_size=8)
    assert numbers(whole).keys() == numbers(pieces).keys()
    for name, value in numbers(whole).items():
        assert pieces[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_second_run_reads_only_what_is_missing(tmp_path, real, train):
    first = Noisy()
    found = run(first, tmp_path / "a", real, train, per_shard=10)
    assert sorted(first.seen) == list(range(40))
    (tmp_path / "a" / "shards" / "generated-0000020.npz").unlink()
    second = Noisy()
    again = run(second, tmp_path / "a", real, train, per_shard=10)
    assert second.seen == list(range(20, 30))
    assert numbers(again) == numbers(found)


def test_statistics_of_real_images_are_computed_once(tmp_path, real, train):
    run(Noisy(), tmp_path / "a", real, train)
    job = evaluation_job(
        Noisy().images, [pooled(2)], Settings(ALL, patch=8, base=4), tmp_path / "b",
        real=real, train=train,
    )  # fmt: skip
    assert job.num_shards == 1  # the generated images
    other = evaluation_job(
        Noisy().images, [pooled(2)], Settings(ALL, patch=4, base=4), tmp_path / "c",
        real=real, train=train,
    )  # fmt: skip
    assert other.num_shards == 2  # crops of another size


def test_reals_against_themselves_score_zero_and_compose(tmp_path, real):
    same = chosen_images(SceneSource("test", 64, size=12), np.arange(12))
    source = SceneSource("test", 64, size=12)
    settings = Settings(("fd", "composition"), batch_size=8)
    job = evaluation_job(same, [pooled(2)], settings, tmp_path / "a", real=source)
    found = jobs.run(job, tmp_path / "a", {}, name="evaluate")
    assert found["fd_blocks"] == pytest.approx(0, abs=1e-6)
    assert found["composition_count"] == found["composition_count_real"] == 1


@pytest.mark.parametrize(
    ("settings", "given", "sentence"),
    [
        ({"metrics": ("fid",)}, {}, "unknown metrics"),
        ({"metrics": ("fd",)}, {"real": None}, "give --data or --reference"),
        ({"metrics": ("kid",)}, {"real": None}, "give --data"),
        ({"metrics": ("floor",)}, {"train": None}, "give --train_split"),
        ({"metrics": ("patch",), "patch": 17}, {}, "patch is 17"),
        ({"metrics": ("base",), "base": 5}, {}, "base is 5"),
        ({"metrics": ("clip",)}, {}, "needs a CLIP network"),
        ({"metrics": ("fd",), "resize": "pil"}, {}, "resize is 'pil'"),
        ({"metrics": ("fd",), "resize": "clean"}, {}, "takes images of any size"),
        ({"metrics": ("fd",)}, {"networks": []}, "give --network"),
        ({"metrics": ("reconstruction",)}, {}, "give pairs"),
    ],
)
def test_metrics_without_what_they_need_are_refused(
    tmp_path, real, train, settings, given, sentence
):
    given = {"real": real, "train": train, "networks": [pooled(2)]} | given
    networks = given.pop("networks")
    with pytest.raises(ValueError, match=sentence):
        evaluation_job(Noisy().images, networks, Settings(**settings), tmp_path, **given)


def test_a_network_of_the_loss_is_refused_or_named(tmp_path, real):
    settings = Settings(("fd",), batch_size=16)
    used = {"used_in_loss": {"other": "b"}}  # the same weights under another name
    with pytest.raises(ValueError, match="training loss"):
        evaluation_job(Noisy().images, [pooled(2)], settings, tmp_path, real=real, **used)
    insist = settings._replace(insist=True)
    job = evaluation_job(Noisy().images, [pooled(2)], insist, tmp_path, real=real, **used)
    found = jobs.run(job, tmp_path, {}, name="evaluate")
    assert "fd_blocks(used in the loss)" in found


def test_reconstructions_are_compared_pair_by_pair(tmp_path):
    """Noise of a known size has a known PSNR; nothing else is looked at."""
    targets = chosen_images(SceneSource("train", 16, size=20), np.arange(20))
    clean = from_uint8(targets.read(np.arange(20))[0])
    noise = np.random.default_rng(0).normal(0, 0.1, clean.shape)
    pairs = Pairs(20, 16, lambda ids: ((clean + noise)[ids], clean[ids]))
    job = evaluation_job(
        Noisy().images, [], Settings(("reconstruction",), per_shard=7), tmp_path, pairs=pairs
    )
    assert job.num_shards == 3
    found = jobs.run(job, tmp_path, {}, name="evaluate")
    expected = 10 * np.log10(4 / (noise**2).mean((1, 2, 3))).mean()
    assert found["reconstruction_psnr"] == pytest.approx(expected, rel=1e-6)
    assert 0 < found["reconstruction_ssim"] < 1
    assert any("no LPIPS" in warning for warning in found["warnings"])


def test_files_are_paired_in_their_order(tmp_path):
    images, _ = Noisy(5).images.read(np.arange(5))
    np.savez(tmp_path / "a.npz", images=images)
    for i, image in enumerate(images):
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "b" / f"{i}.png")
    pairs = file_pairs(*(file_images(str(tmp_path / name), 16, 5) for name in ("a.npz", "b")))
    np.testing.assert_array_equal(*pairs.read(np.array([3, 0, 4])))
    with pytest.raises(ValueError, match="5 images of 16 px but 4 targets of 16"):
        file_pairs(pairs, file_images(str(tmp_path / "a.npz"), 16, 4))


def statistics_file(path, *, features=True, **changes):
    """Reference statistics of 30 random features of `pooled(2)`, perhaps their moments alone."""
    of = dict(data="x", split="test", resolution=16, num=30, network="blocks", sha256="b")
    identity = Identity(**of | changes)
    values = np.random.default_rng(0).normal(size=(30, 12)).astype(np.float32)
    save_statistics(path, values, identity)
    if not features:
        np.savez(path, mu=values.mean(0), sigma=np.cov(values.T))
    return [str(path)]


def test_a_reference_made_in_another_way_is_refused(tmp_path, real):
    def job(path, metrics=("fd",), network="blocks"):
        networks = [pooled(2)._replace(name=network)]
        return evaluation_job(
            Noisy().images, networks, Settings(metrics), tmp_path, real=real, references=path
        )

    job(statistics_file(tmp_path / "same.npz"))
    with pytest.raises(ValueError, match="of resolution 32 but the images are of 16"):
        job(statistics_file(tmp_path / "size.npz", resolution=32))
    with pytest.raises(ValueError, match="of resize 'clean' but the images are of 'network'"):
        job(statistics_file(tmp_path / "clean.npz", resize="clean"))
    published = statistics_file(tmp_path / "published.npz", features=False)
    job(published, network="inception_v3")
    with pytest.raises(ValueError, match="holds moments only"):
        job(published, ("fd", "kid", "prdc"), network="inception_v3")


def test_another_resolution_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the images are 16 px, the real ones 32"):
        evaluation_job(
            Noisy().images, [pooled(2)], Settings(("fd",)), tmp_path,
            real=SceneSource("test", 32, size=4),
        )  # fmt: skip


def test_images_come_from_a_folder_or_a_file(tmp_path):
    images, _ = Noisy(5).images.read(np.arange(5))
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(5))
    np.savez(tmp_path / "adm.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    for place in ("own.npz", "adm.npz", "folder"):
        found = file_images(str(tmp_path / place), 16, 5)
        read, _ = found.read(np.arange(5))
        assert sorted(map(bytes, read)) == sorted(map(bytes, images)), place
    with pytest.raises(ValueError, match="neither a folder nor"):
        file_images(str(tmp_path / "none"), 16, 5)
    with pytest.raises(ValueError, match="holds 16 px images, not 32"):
        file_images(str(tmp_path / "own.npz"), 32, 5)
