"""Do the metrics work on real data? Real images against blurred, noisy and mode-dropped copies.

    python -m launch.corruptions --data_dir=DIR --network=resnet56=resnet56-4bfd9763.th \\
        --network=mobilenet_v2=mobilenet_v2_int8.npz --workdir=runs/corruptions \\
        --record=notebooks/results/corruptions.json

Data sets: CIFAR-10 at 32 px and clothing at 128 px (prepared TFDS sets in DIR). Each network named
measures those that `STUDIES` gives it, and each set's own small classifier measures too:

    reference   training images
    real        other training images: what a perfect generator scores
    test        the test split: as good as real for a network that was not fitted on the training
                images, and where both splits were drawn alike
    blur, noise, modes   the images of "real" made worse; evaluation/corruptions.py says how
    copies      some of "real" replaced by images of the reference, for the memorisation distance

Draws have images, noise and dropped classes of their own. The record holds mean and deviation over
them of every metric of every set, whether each metric orders each corruption as it must, and the
ratio to figures known beforehand. A picture of the corruptions goes into the work directory.
"""

import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging

from cheapscale.data.sources import open_source
from cheapscale.evaluation.corruptions import MUST, RISES, blurred, judge, noised, of_classes
from cheapscale.evaluation.fid import kernel_distance, moments
from cheapscale.evaluation.naming import metric_name, suffixed
from cheapscale.evaluation.pixels import from_uint8
from cheapscale.evaluation.quality import choice, outputs, unseen_by_classifier
from cheapscale.evaluation.scores import scores
from cheapscale.evaluation.statistics import Identity, Statistics
from cheapscale.models.features import FeatureNetwork
from cheapscale.stages.image_sets import chosen_images
from cheapscale.training.logging import image_grid, save_png
from cheapscale.training.loop import provenance
from launch.command import execute, named_file, start, write_record
from launch.evaluate import open_networks

K = 3  # neighbours of precision, recall, density and coverage


class Counts(NamedTuple):
    """Images: of the reference; to draw the other sets from; of each of those sets; per call."""

    reference: int
    pool: int
    num: int
    batch_size: int = 250


class Study(NamedTuple):
    """Strengths, the weakest first. blur: px. noise: deviation in units of [-1, 1]. modes: classes
    kept. copies: share of training images. counts: of each network that measures this set."""

    resolution: int
    blur: tuple[int, ...]
    noise: tuple[float, ...]
    modes: tuple[int, ...]
    copies: tuple[float, ...]
    counts: dict[str, Counts]

    def sets(self, kind: str) -> list[str]:
        return [f"{kind} {strength}" for strength in getattr(self, kind)]


STUDIES = {
    "cifar10": Study(
        resolution=32,
        blur=(16, 8, 4),
        noise=(0.05, 0.1, 0.2),
        modes=(8, 5, 2),
        copies=(0.1, 0.5, 1.0),
        counts={
            "classifier": Counts(2000, 4000, 500),
            "resnet56": Counts(5000, 6000, 1000),
            "mobilenet_v2": Counts(600, 1000, 150, batch_size=25),
        },
    ),
    "clothing": Study(
        resolution=128,
        blur=(64, 32, 16),
        noise=(0.05, 0.1, 0.2),
        modes=(8, 6, 4),  # the rarest four of ten classes hold a fifth of the images
        copies=(0.1, 0.5, 1.0),
        counts={
            "classifier": Counts(450, 1050, 150, batch_size=50),
            "mobilenet_v2": Counts(1000, 1600, 200, batch_size=25),
        },
    ),
}

# Known beforehand of these weight files, from other code: (data, network) -> (set, metric, lowest,
# highest). On how many images, and with what deviation of the noise, is not known.
SCALES = {
    ("cifar10", "resnet56"): (
        ("real", "fd", 0.15, 0.23),
        ("test", "fd", 0.15, 0.23),
        ("blur 16", "fd", 13.4, 13.4),
        ("noise", "fd", 4.5, 4.5),
    ),
    ("clothing", "mobilenet_v2"): (
        ("real", "kid", 0.0012, 0.0012),
        ("blur 64", "kid", 0.089, 0.089),
        ("blur 32", "kid", 0.503, 0.503),
    ),
}
WITHIN = 1.5


def measure(
    network: FeatureNetwork, train: Any, test: Any, study: Study, counts: Counts, draws: int
) -> dict:
    """{set: {metric: [value of each draw]}} in the features of one network.

    train, test: sources of images. "test" has one value, of counts.num images at most.
    Raises ValueError where `train` is too small for disjoint draws.
    """
    ids = choice(len(train), len(train))
    if network.name.startswith("classifier"):
        ids = ids[unseen_by_classifier(ids)]
    total = counts.reference + counts.pool
    if len(ids) < total or counts.pool < draws * counts.num:
        raise ValueError(
            f"{draws} draws of {counts.num} from {counts.pool} images beside {counts.reference} "
            f"others need {total} training images of {train.name}, which has {len(ids)} for "
            f"{network.name}: lower --draws or --fraction"
        )

    def look(images):
        return outputs(network, images, batch_size=counts.batch_size, logits=True)

    read = chosen_images(train, ids).read
    known = look(read(np.arange(counts.reference))[0])
    images, labels = read(np.arange(counts.reference, total))
    real = look(images)
    reference = Statistics(
        moments(known["features"]),
        known["features"],
        Identity(
            data=train.fingerprint(), split=train.split, resolution=train.resolution,
            num=counts.reference, network=network.name, sha256=network.sha256,
        ),
        path=f"{counts.reference} images of {train.name}",
    )  # fmt: skip

    def one_draw(draw: int) -> Iterator[tuple[str, dict]]:
        rng = np.random.default_rng(draw)
        rows = np.arange(draw * counts.num, (draw + 1) * counts.num)
        yield "real", at(real, rows)
        for through, name in zip(study.blur, study.sets("blur")):
            yield name, look(blurred(images[rows], through))
        for sigma, name in zip(study.noise, study.sets("noise")):
            yield name, look(noised(images[rows], sigma, rng))
        order = rng.permutation(train.num_classes)  # what fewer classes keep, more keep too
        for kept, name in zip(study.modes, study.sets("modes")):
            yield name, at(real, of_classes(labels, order[:kept], counts.num, rng))
        for share, name in zip(study.copies, study.sets("copies")):
            copied = round(share * counts.num)
            chosen = at(known, rng.permutation(counts.reference)[:copied])
            others = at(real, rows[copied:])
            yield name, jax.tree.map(lambda a, b: np.concatenate([a, b]), chosen, others)

    seen = look(chosen_images(test, choice(len(test), counts.num)).read(
        np.arange(min(counts.num, len(test)))
    )[0])  # fmt: skip
    found = {"test": {k: [v] for k, v in metrics_of("test", seen, network, reference).items()}}
    for draw in range(draws):
        for name, seen in one_draw(draw):
            for metric, value in metrics_of(name, seen, network, reference).items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
    return found


def at(looked: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of features and logits."""
    return jax.tree.map(lambda a: a[rows], looked)


def metrics_of(
    name: str, looked: dict[str, np.ndarray], network: FeatureNetwork, reference: Statistics
) -> dict[str, float]:
    """{metric: value} of one set. Without a Frechet distance where there are no more images than
    dimensions: it would be bias."""
    features = looked["features"]
    kinds = ["memorisation"]
    if not name.startswith("copies"):  # the other metrics take copies for the best of images
        kinds += ["score", "prdc"] + ["fd"] * (len(features) > features.shape[1])
    found = scores(
        features,
        reference,
        network=network.name,
        sha256=network.sha256,
        metrics=kinds,
        logits=looked["logits"],
        train_features=reference.features,
        ks=(K,),
    )
    # over all pairs: `scores` would take subsets of the larger sets, which only adds variance
    if not name.startswith("copies"):
        found[name_of("kid", network)] = kernel_distance(features, reference.features)
    return {name_of(k, network): found[name_of(k, network)] for k in MUST
            if name_of(k, network) in found}  # fmt: skip


def name_of(kind: str, network: FeatureNetwork) -> str:
    """A metric's name in the record; what counts neighbours says how many."""
    counted = kind in ("precision", "recall", "density", "coverage")
    return suffixed(metric_name(kind, network.name, network.sha256), f"_k{K}" * counted)


def verdicts(found: dict, network: FeatureNetwork, study: Study) -> tuple[dict, list[str]]:
    """({metric: {corruption: verdict}}, a sentence for each that is not ordered as it must be)."""
    judged, failures = {}, []
    for kind, directions in MUST.items():
        metric = name_of(kind, network)
        for corruption, direction in directions.items():
            if metric not in found["real"]:
                continue
            chain = ["real", *study.sets(corruption)]
            values = np.array([found[name][metric] for name in chain])
            verdict = judge(values, direction)
            judged.setdefault(metric, {})[corruption] = verdict._asdict()
            if not verdict.ordered:
                way = "rise" if direction == RISES else "fall"
                read = ", ".join(f"{n} {v:.4g}" for n, v in zip(chain, values.mean(axis=1)))
                failures.append(f"{metric} does not {way} with {corruption}: {read}")
    return judged, failures


def split_nearest(found: dict, network: FeatureNetwork, study: Study) -> dict[str, bool]:
    """{distance: whether the test images read nearer than the weakest of every corruption}."""
    weakest = [study.sets(kind)[0] for kind in ("blur", "noise", "modes")]
    names = [name_of(kind, network) for kind in ("fd", "kid")]
    return {
        metric: bool(found["test"][metric][0] < min(np.mean(found[n][metric]) for n in weakest))
        for metric in names
        if metric in found["real"]
    }


def sanity(found: dict, data: str, network: FeatureNetwork, study: Study) -> list[dict]:
    """Each known figure beside ours: {set, metric, known, ours, ratio, within, note}.

    ratio: to the nearest end of a known range, 1 inside it. within: True or False, or None where
    the comparison cannot be made, and `note` says why.
    """
    rows = []
    for name, kind, low, high in SCALES.get((data, network.name), ()):
        metric = name_of(kind, network)
        row = {"set": name, "metric": metric, "known": [low, high]}
        if name == "noise":
            sigma = equal_noise(found, metric, study, low)
            note = "the known figure does not say its deviation; ours " + (
                f"reads it at sigma = {sigma:.3f} of [-1, 1], {127.5 * sigma:.1f} levels "
                "(interpolated)" if sigma else "does not read it between the strengths measured"
            )  # fmt: skip
            rows.append(row | {"ours": None, "ratio": None, "within": None, "note": note})
            continue
        ours = float(np.mean(found[name][metric]))
        if (name, kind) == ("real", "kid"):
            note = "unbiased: between real images it is 0 but for chance, so there is no ratio"
            rows.append(row | {"ours": ours, "ratio": None, "within": None, "note": note})
            continue
        ratio = ours / min(max(ours, low), high)
        within = bool(1 / WITHIN <= ratio <= WITHIN)
        rows.append(row | {"ours": ours, "ratio": ratio, "within": within, "note": ""})
    return rows


def equal_noise(found: dict, metric: str, study: Study, value: float) -> float | None:
    """The deviation at which the metric would read `value`: of both, less what real images read,
    the logarithms are interpolated. None outside the strengths measured."""
    floor = np.mean(found["real"][metric])
    read = [np.mean(found[name][metric]) - floor for name in study.sets("noise")]
    if not (np.diff(read) > 0).all() or not 0 < read[0] <= value - floor <= read[-1]:
        return None
    return float(np.exp(np.interp(np.log(value - floor), np.log(read), np.log(study.noise))))


def draw(path: pathlib.Path, train: Any, study: Study, columns: int = 10) -> None:
    """Real images, then one row for every strength of blur, noise and dropped modes."""
    ids = choice(len(train), 400)
    images, labels = chosen_images(train, ids).read(np.arange(len(ids)))
    rng, shown = np.random.default_rng(0), images[:columns]
    rows = [shown]
    rows += [blurred(shown, through) for through in study.blur]
    rows += [noised(shown, sigma, rng) for sigma in study.noise]
    order = rng.permutation(train.num_classes)
    rows += [images[of_classes(labels, order[:kept], columns, rng)] for kept in study.modes]
    save_png(path, image_grid(from_uint8(np.concatenate(rows)), columns), 1024)


def table(found: dict) -> str:
    """The means as text, one row for each set."""
    metrics = list(found["real"])
    lines = [" " * 12 + "".join(f"{m.split('_')[0]:>13}" for m in metrics)]
    for name, values in found.items():
        cells = (f"{np.mean(values[m]):13.4g}" if m in values else " " * 13 for m in metrics)
        lines.append(f"{name:<12}" + "".join(cells))
    return "\n".join(lines)


def summarised(values: list[float]) -> dict[str, float]:
    """Mean, and over several draws their standard deviation (of a sample)."""
    found = {"mean": float(np.mean(values))}
    if len(values) > 1:
        found["sd"] = float(np.std(values, ddof=1))
    return {k: float(f"{v:.5g}") for k, v in found.items()}


def one_network(
    data: str, network: FeatureNetwork, train, test, study: Study, counts: Counts, draws: int
) -> dict:
    """Everything the record says of one network on one data set."""
    began = time.monotonic()
    found = measure(network, train, test, study, counts, draws)
    judged, failures = verdicts(found, network, study)
    known = sanity(found, data, network, study)
    print(f"\n{data}, {network.name}\n{table(found)}", flush=True)
    for failure in failures:
        print(f"note: {failure}")
    for row in known:
        print(f"known {row['known']}: {row['set']} {row['ours']} {row['note']}")
    no_fd = name_of("fd", network) not in found["real"]
    return {
        "sha256": network.sha256,
        "counts": counts._asdict(),
        "sets": {
            name: {metric: summarised(v) for metric, v in values.items()}
            for name, values in found.items()
        },
        "ordered": judged,
        "not_ordered": failures,
        "test_split_nearest": split_nearest(found, network, study),
        "known_figures": known,
        "left_out": [f"fd: {counts.num} images are no more than the features' dimensions"] * no_fd,
        "seconds": round(time.monotonic() - began, 1),
    }


def run(
    names: list[str],
    data_dir: str,
    entries: list[str],
    workdir: str,
    *,
    draws: int = 3,
    fraction: float = 1.0,
    record: str | None = None,
) -> dict:
    """All data sets `names` with the networks `entries` ("NAME=FILE") and each set's classifier;
    fraction: of the images of every set. Writes the record, returns its verdicts."""
    began = time.monotonic()
    unknown = sorted(set(names) - set(STUDIES))
    if unknown or not names:
        raise ValueError(f"unknown data sets {unknown}: choose some of {', '.join(STUDIES)}")
    measuring = {network for name in names for network in STUDIES[name].counts}
    for entry in entries:
        if named_file(entry)[0] not in measuring:
            raise ValueError(
                f"--network={entry} measures none of {', '.join(names)}: choose among "
                f"{', '.join(sorted(measuring))}"
            )
    figures: dict = {"config": {
        "draws": draws, "fraction": fraction, "k": K,
        "studies": {n: {k: v for k, v in STUDIES[n]._asdict().items() if k != "counts"}
                    for n in names},
    }, "data": {}}  # fmt: skip
    for name in names:
        study = STUDIES[name]
        train, test = (
            open_source(name, split, resolution=study.resolution, data_dir=data_dir)
            for split in ("train", "test")
        )
        draw(pathlib.Path(workdir) / f"{name}.png", train, study)
        chosen = [entry for entry in entries if named_file(entry)[0] in study.counts]
        networks, _ = open_networks(["classifier", *chosen], train, None)
        figures["data"][name] = {}
        for network in networks:
            logging.info("%s in the features of %s", name, network.name)
            *full, batch_size = study.counts[network.name]
            counts = Counts(*(round(fraction * n) for n in full), batch_size)
            figures["data"][name][network.name] = one_network(
                name, network, train, test, study, counts, draws
            )
            jax.clear_caches()
    figures["provenance"] = provenance()
    figures["seconds"] = round(time.monotonic() - began, 1)
    record = record or str(pathlib.Path(workdir) / "record.json")
    write_record(record, figures)
    return {
        "record": record,
        "seconds": figures["seconds"],
        "not_ordered": {f"{d} {n}": row["not_ordered"] for d, rows in figures["data"].items()
                        for n, row in rows.items()},
    }  # fmt: skip


def main(argv) -> None:
    del argv
    FLAGS = flags.FLAGS
    execute(
        "corruptions",
        FLAGS.workdir,
        lambda: run(
            FLAGS.data,
            FLAGS.data_dir,
            FLAGS.network,
            FLAGS.workdir,
            draws=FLAGS.draws,
            fraction=FLAGS.fraction,
            record=FLAGS.record,
        ),
    )


if __name__ == "__main__":
    flags.DEFINE_list("data", list(STUDIES), "Data sets.")
    flags.DEFINE_string("data_dir", None, "The folder that holds the prepared TFDS sets.")
    flags.DEFINE_multi_string("network", [], "NAME=FILE of a feature network.")
    flags.DEFINE_integer("draws", 3, "Random choices of images, noise and classes.", lower_bound=2)
    flags.DEFINE_float("fraction", 1.0, "Of the images of every set, for a quick look.")
    flags.DEFINE_string("workdir", "runs/corruptions", "Where pictures and summary go.")
    flags.DEFINE_string("record", None, "Where the record goes instead of the work directory.")
    flags.mark_flags_as_required(["data_dir"])
    start(main)
