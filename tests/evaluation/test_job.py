"""The evaluation job: its numbers do not depend on shards, interruption or resuming."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.data.sources import SceneSource
from cheapscale.evaluation.coverage import prdc
from cheapscale.evaluation.fid import classifier_splits, frechet, kernel_distance
from cheapscale.evaluation.image_sets import Images, Pairs, choice, chosen_images, npz_images
from cheapscale.evaluation.job import evaluation_job, unseen_rows
from cheapscale.evaluation.request import Clip, Evaluation, identity
from cheapscale.evaluation.statistics import Identity, save_statistics
from cheapscale.features import FeatureNetwork
from cheapscale.training import jobs


def pooled(side):
    """A network whose features are means of side x side blocks, with channel means as logits."""

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
    """Noisy copies of scenes, where image i is a function of i; counts the images that are read."""

    def __init__(self, num=40):
        self.source, self.seen = SceneSource("train", 16, size=num, seed=1), []
        self.images = Images(num, 16, self.read, f"noisy {num}")

    def one(self, i):
        noise = np.random.default_rng(i).normal(0, 0.1, (16, 16, 3))
        return to_uint8(np.clip(self.source[i]["image"] + noise, -1, 1).astype(np.float32))

    def read(self, ids):
        self.seen += [int(i) for i in ids]
        return np.stack([self.one(int(i)) for i in ids]), np.zeros(len(ids), np.int32)


def silent(name):
    """A network without logits."""
    full = pooled(2)
    return full._replace(
        name=name, outputs=lambda params, x: {"features": full.outputs(params, x)["features"]}
    )


def picky():
    """A network that takes images of one size only."""

    def outputs(params, x):
        if x.shape[1] != 8:
            raise ValueError(f"picky takes 8 px, got {x.shape[1]}")
        return {"features": x.mean((1, 2))}

    return pooled(2)._replace(name="picky", outputs=outputs)


UNLABELLED = Noisy().images._replace(labelled=False)
ALL = ("fd", "kid", "score", "prdc", "memorisation", "floor", "patch", "base")


def run(generated, workdir, real, train, networks=None, **options):
    options = {"metrics": ALL, "patch": 8, "base": 4, "batch_size": 16} | options
    networks = networks or [pooled(2)]
    return finished(
        Evaluation(generated.images, networks=networks, real=real, train=train, **options), workdir
    )


def finished(evaluation, workdir):
    """The summary of the job of an evaluation, run to its end as launch/evaluate.py does."""
    job = evaluation_job(evaluation, workdir)
    return jobs.run(job, workdir, identity(evaluation), name="evaluate")


def numbers(summary):
    speed = ("device_seconds", "items_per_second")
    return {k: v for k, v in summary.items() if isinstance(v, float) and k not in speed}


def test_scores_are_those_of_all_images_at_once(tmp_path, real, train):
    generated = Noisy()
    found = run(generated, tmp_path / "a", real, train)

    def features(images):
        return np.asarray(pooled(2).outputs(1.0, from_uint8(images))["features"], np.float64)

    reals, trains = (chosen_images(s, choice(len(s), 1000)) for s in (real, train))
    a = features(generated.images.read(np.arange(40))[0])
    b = features(reals.read(np.arange(60))[0])
    assert found["fd_blocks"] == pytest.approx(frechet(a, b).distance, rel=1e-4)
    assert found["kid_blocks"] == pytest.approx(kernel_distance(a, b), rel=1e-3)
    c = features(trains.read(np.arange(50))[0])
    assert found["fd_blocks_floor"] == pytest.approx(frechet(c[:40], b).distance, rel=1e-4)
    nearest = np.linalg.norm(a[:, None] - c[None], axis=-1).min(1).mean()
    assert found["memorisation_blocks"] == pytest.approx(nearest, rel=1e-4)
    # reducing images to the base resolution averages out noise, which crops show in full
    assert found["fd_blocks_b"] > 0 and found["pfd_blocks"] > 0
    assert found["networks"] == {"blocks": "b"}


def test_the_number_of_shards_changes_no_result(tmp_path, real, train):
    whole = run(Noisy(), tmp_path / "a", real, train, per_shard=100)
    (tmp_path / "cache").rename(tmp_path / "other")  # so real images are embedded again
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
    asked = Evaluation(Noisy().images, ALL, [pooled(2)], real, train, base=4)
    shards = {
        patch: evaluation_job(replace(asked, patch=patch), tmp_path / "b") for patch in (8, 4)
    }
    assert shards[8].num_shards == 1  # the generated images
    assert shards[4].num_shards == 2  # crops of another size


def test_reals_against_themselves_score_zero_and_compose(tmp_path, real):
    same = chosen_images(SceneSource("test", 64, size=12), np.arange(12))
    source = SceneSource("test", 64, size=12)
    asked = Evaluation(same, ("fd", "composition"), [pooled(2)], source, batch_size=8)
    found = finished(asked, tmp_path / "a")
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
        ({"metrics": ("prdc",)}, {"generated": Noisy(5).images}, "there are 5 images"),
        ({"metrics": ("score",)}, {"networks": [silent("a"), silent("b")]}, "a, b do not give"),
        ({"metrics": ("fd",)}, {"networks": [silent("a"), silent("a")]}, "given twice"),
        ({"metrics": ("fd",)}, {"networks": [picky()]}, "takes 8 px"),  # its own refusal
        ({"metrics": ("composition",)}, {"generated": UNLABELLED}, "these images have neither"),
    ],
)
def test_metrics_without_what_they_need_are_refused(
    tmp_path, real, train, settings, given, sentence
):
    given = {"real": real, "train": train, "networks": [pooled(2)]} | given
    given = {"generated": Noisy().images} | given
    with pytest.raises(ValueError, match=sentence):
        evaluation_job(Evaluation(**given, **settings), tmp_path)


def test_a_network_of_the_loss_is_refused_or_named(tmp_path, real):
    used = {"other": "b"}  # the same weights under another name
    asked = Evaluation(Noisy().images, ("fd",), [pooled(2)], real, used_in_loss=used)
    with pytest.raises(ValueError, match="training loss"):
        evaluation_job(asked, tmp_path)
    found = finished(replace(asked, insist=True), tmp_path)
    assert "fd_blocks(used in the loss)" in found


def test_reconstructions_are_compared_pair_by_pair(tmp_path):
    """Noise of a known variance has a known PSNR; no other set is read."""
    targets = chosen_images(SceneSource("train", 16, size=20), np.arange(20))
    clean = from_uint8(targets.read(np.arange(20))[0])
    noise = np.random.default_rng(0).normal(0, 0.1, clean.shape)
    pairs = Pairs(20, 16, lambda ids: ((clean + noise)[ids], clean[ids]), "noise")
    asked = Evaluation(Noisy().images, ("reconstruction",), pairs=pairs, batch_size=4, per_shard=7)
    assert evaluation_job(asked, tmp_path).num_shards == 3
    found = finished(asked, tmp_path)
    expected = 10 * np.log10(4 / (noise**2).mean((1, 2, 3))).mean()
    assert found["reconstruction_psnr"] == pytest.approx(expected, rel=1e-6)
    assert 0 < found["reconstruction_ssim"] < 1
    assert any("no LPIPS" in warning for warning in found["warnings"])


def statistics_file(path, *, features=True, **changes):
    """A file of statistics of 30 random features of `pooled(2)`, or of their moments alone."""
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
        asked = Evaluation(Noisy().images, metrics, networks, real, references=path)
        return evaluation_job(asked, tmp_path)

    job(statistics_file(tmp_path / "same.npz"))
    with pytest.raises(ValueError, match="of resolution 32, but the features are of 16"):
        job(statistics_file(tmp_path / "size.npz", resolution=32))
    with pytest.raises(ValueError, match="of resize 'clean', but the features are of 'network'"):
        job(statistics_file(tmp_path / "clean.npz", resize="clean"))
    published = statistics_file(tmp_path / "published.npz", features=False)
    job(published, network="inception_v3")
    with pytest.raises(ValueError, match="holds moments only"):
        job(published, ("fd", "kid", "prdc"), network="inception_v3")
    fixed = pooled(2)._replace(name="inception_v3", input_size=16)
    asked = Evaluation(Noisy().images, ("fd",), [fixed], real, references=published, resize="clean")
    with pytest.raises(ValueError, match="of resize 'network', but the features are of 'clean"):
        evaluation_job(asked, tmp_path)


def test_another_file_of_statistics_is_another_evaluation(tmp_path):
    """A work directory is not continued with a reference that has taken the place of the first."""
    found = []
    for sha256, name in (("b", "a.npz"), ("c", "a.npz"), ("b", "moved.npz")):
        paths = statistics_file(tmp_path / name, sha256=sha256)
        asked = Evaluation(Noisy().images, ("fd",), [pooled(2)], references=paths)
        found.append(identity(asked))
    assert found[0] == found[2] != found[1]


def test_another_resolution_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the images are 16 px, the real ones 32"):
        large = SceneSource("test", 32, size=4)
        evaluation_job(Evaluation(Noisy().images, ("fd",), [pooled(2)], large), tmp_path)


def test_files_without_labels_or_captions_have_none(tmp_path):
    """Labels and captions are optional in an .npz; a folder has none."""
    source = SceneSource("test", 64, size=6)
    images = np.stack([to_uint8(source[i]["image"]) for i in range(6)])
    texts = np.asarray([source.caption(i) for i in range(6)])
    np.savez(tmp_path / "plain.npz", images=images)
    np.savez(tmp_path / "asked.npz", images=images, captions=texts)
    assert not npz_images(tmp_path / "plain.npz", 6).labelled
    asked = npz_images(tmp_path / "asked.npz", 6)
    evaluation = Evaluation(asked, ("composition",), real=source)
    found = finished(evaluation, tmp_path / "a")
    # captions also request colours and relations, for the real images too
    assert found["composition_colour"] == found["composition_colour_real"] == 1
    wrong = asked._replace(captions=lambda ids: [texts[(i + 1) % 6] for i in ids], fingerprint="w")
    found = finished(replace(evaluation, generated=wrong), tmp_path / "b")
    assert found["composition_all"] < 0.5 and found["composition_all_real"] == 1


def test_a_work_directory_accepts_only_its_own_evaluation(tmp_path, real, train):
    """Other images, sources, networks or settings make another evaluation."""
    asked = Evaluation(Noisy().images, ("fd",), [pooled(2)], real, train, batch_size=16)
    finished(asked, tmp_path)
    finished(replace(asked, batch_size=8), tmp_path)
    for change in (
        {"generated": Noisy(39).images},
        {"generated": asked.generated._replace(fingerprint="other")},
        {"networks": [pooled(2)._replace(sha256="c")]},
        {"networks": [pooled(2)._replace(variant="v")]},
        {"real": SceneSource("test", 16, size=60, seed=3)},
        {"train": SceneSource("train", 16, size=50, seed=3)},
        {"train": None},
        {"num_reference": 50},
    ):
        with pytest.raises(ValueError, match="started with another config"):
            finished(replace(asked, **change), tmp_path)


def test_the_job_and_the_library_give_equal_numbers(tmp_path, real, train):
    found = run(Noisy(), tmp_path, real, train, metrics=("score", "prdc", "memorisation"))
    seen = {
        "fake": Noisy().images.read(np.arange(40))[0],
        "real": chosen_images(real, choice(60, 60)).read(np.arange(60))[0],
        "train": chosen_images(train, choice(50, 50)).read(np.arange(50))[0],
    }
    out = {name: pooled(2).outputs(jnp.float32(1), from_uint8(x)) for name, x in seen.items()}
    features = {name: np.asarray(o["features"]) for name, o in out.items()}
    expected = classifier_splits(np.asarray(out["fake"]["logits"]), splits=10)
    assert found["score_blocks"] == pytest.approx(expected.mean, rel=1e-4)
    for k, values in prdc(features["real"], features["fake"]).items():
        for kind, value in values._asdict().items():
            assert found[f"{kind}_blocks_k{k}"] == pytest.approx(value, abs=1e-6)
    nearest = np.linalg.norm(features["real"][:, None] - features["train"][None], axis=-1)
    assert found["memorisation_blocks_real"] == pytest.approx(nearest.min(1).mean(), rel=1e-4)
    assert (found["num_reference"], found["num_train"]) == (60, 50)


def test_a_floor_of_fewer_images_has_a_warning(tmp_path, real):
    few = SceneSource("train", 16, size=20)
    found = run(Noisy(), tmp_path, real, few, metrics=("fd", "floor"))
    assert any("uses 20 training images, the score 40" in w for w in found["warnings"])
    assert "fd_blocks_bias_floor" in found


def test_another_resizing_is_part_of_the_names(tmp_path, real, train):
    fixed = pooled(2)._replace(input_size=8)
    found = run(Noisy(), tmp_path, real, train, [fixed], metrics=("fd", "floor"), resize="clean")
    assert "fd_blocks(clean)" in found and "fd_blocks_floor(clean)" in found


def test_clip_scores_compare_images_with_their_label_or_caption(tmp_path):
    """A text with the features of its image scores 100, one with opposite features 0."""
    images, _ = Noisy(6).images.read(np.arange(6))
    features = np.asarray(pooled(2).outputs(1.0, from_uint8(images))["features"])
    network = pooled(2)._replace(name="clip_toy", sha256="t")
    kept = {"read": lambda ids: (images[ids], ids.astype(np.int32))}
    generated = Noisy(6).images._replace(**kept)

    def score(generated, prompts, sign, name):
        clip = Clip(network, lambda texts: np.stack([sign * features[int(t)] for t in texts]),
                    prompts, name)  # fmt: skip
        asked = Evaluation(generated, ("clip",), clip=clip, batch_size=4, per_shard=4)
        return finished(asked, tmp_path / name)["clip_score_clip_toy"]

    assert score(generated, list("012345"), 1, "a") == pytest.approx(100, abs=1e-3)
    assert score(generated, list("012345"), -1, "b") == 0
    asked = generated._replace(captions=lambda ids: [str(i) for i in ids], labelled=False)
    assert score(asked, [], 1, "c") == pytest.approx(100, abs=1e-3)
    with pytest.raises(ValueError, match="names of the classes: give --data"):
        score(generated, [], 1, "d")


def test_the_floor_uses_training_images_that_the_classifier_was_not_fitted_on():
    """The classifier was fitted on the even ids; other networks have seen none."""
    ids = choice(300, 200)
    kept = unseen_rows(pooled(2)._replace(name="classifier"), 300, 200)
    np.testing.assert_array_equal(ids[kept], ids[ids % 2 == 1])
    np.testing.assert_array_equal(unseen_rows(pooled(2), 300, 200), np.arange(200))
