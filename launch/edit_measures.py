"""What editing does to held-out scenes, whose truth is known: `launch.edit --task=measure`.

    superres   the picture from its reduction to z's size, against bicubic enlargement: PSNR, and
               the distance of the judge's features from those of the picture
    inpaint    the central square of half the side is painted anew: rms of G(z*) over the known
               pixels; share of pasted results in which the reader finds the class's shape
    transfer   to the next class, by inversion: share of results in which the reader finds that
               shape alone; rms of the pixels outside of the object's circle

All arms of a task edit the same pictures; those by optimisation the first of them. A figure is
[mean, half of its 95 % interval], and its difference from the first arm's, likewise; Student's t
over pictures.
"""

from typing import Any

import numpy as np

from cheapscale.data.pixels import psnr, to_uint8
from cheapscale.data.resize import area_mean
from cheapscale.data.sources import SceneSource, open_pictures
from cheapscale.evaluation.embedding import embed
from cheapscale.evaluation.measure import checked_name
from cheapscale.evaluation.paired import paired
from cheapscale.evaluation.scenes import compare_images
from cheapscale.model import Model
from cheapscale.pagoda import edit as pagoda
from cheapscale.teacher.codec import factor_of
from launch.edit_tasks import Edited, Task, bicubic
from launch.pipeline import load_judge

SHOWN = 10  # pictures of each arm on the sheet
Arms = dict[str, dict[str, np.ndarray]]  # {arm: {figure: a value for each picture}}


def measure(given, model: Model) -> Task:
    """The task, everything checked; ValueError for a model of other data than labelled scenes."""
    data = model.network.meta["config"]["data"]
    source = open_pictures(data, split=data["eval_split"], resolution=model.resolution)
    if not (isinstance(source, SceneSource) and model.network.num_classes):
        raise ValueError(
            f"{given.model} was not trained on scenes with classes, whose truth the measures read: "
            "give --model=pretrained:scenes64"
        )
    if not given.judge:
        raise ValueError("--judge is missing: give --judge=mobilenet_v2=FILE")
    judge = load_judge(given.judge)
    checked_name(judge, model.network.meta.get("frozen_networks", {}))
    x, c = source.read(range(given.num))
    objects = [source.scene(i).objects for i in range(given.num)]

    def run(search: pagoda.Search) -> Edited:
        few = slice(given.optimised)
        found = {
            "superres": superres(search, x, c, judge, few),
            "transfer": transfer(search, x, c, objects),
        }
        if given.optimised:
            fitted = search.by("optimise", "inversion")
            found["inpaint"] = inpaint(fitted, x[few], c[few])
        sheet = [("picture", image) for image in x[:SHOWN]]
        for shown, _ in found.values():
            for arm, images in shown.items():
                sheet += [(arm, image) for image in images[:SHOWN]]
        return Edited({}, sheet, {task: summary(arms) for task, (_, arms) in found.items()})

    return run


def base_of(search: pagoda.Search) -> int:
    """The side in pixels of what the teacher draws."""
    return search.generator.resolution * factor_of(search.generator.meta)


def superres(
    search: pagoda.Search, x: np.ndarray, c: np.ndarray, judge: Any, few: slice
) -> tuple[dict[str, np.ndarray], Arms]:
    """({arm: images}, figures)."""
    x_lo = area_mean(x, base_of(search))
    images = {
        "bicubic": bicubic(x_lo, x.shape[1]),
        "inversion": search(pagoda.reduced(x_lo), c).images[:, 0],
    }
    for arm, start in {"optimisation": "prior", "both": "inversion"}.items() if len(c[few]) else ():
        some = search.by("optimise", start)(pagoda.reduced(x_lo[few]), c[few])
        images[arm] = some.images[:, 0]
    truth = embed(judge, to_uint8(x))

    def figures(images):
        rows = embed(judge, to_uint8(images)), truth[: len(images)]
        return {
            "psnr": psnr(images, x[: len(images)]),
            f"distance_{judge.name}": np.linalg.norm(np.subtract(*rows), axis=1),
        }

    return images, {arm: figures(found) for arm, found in images.items()}


def inpaint(
    search: pagoda.Search, x: np.ndarray, c: np.ndarray
) -> tuple[dict[str, np.ndarray], Arms]:
    """({arm: images}, figures); the first arm is the reader's own accuracy on the pictures."""
    side = x.shape[1]
    hole = np.zeros((side, side), bool)
    hole[side // 4 : -(side // 4), side // 4 : -(side // 4)] = True
    found = search(
        pagoda.outside(x, hole, search.generator.resolution, factor_of(search.generator.meta)), c
    ).images[:, 0]
    filled = np.where(hole[..., None], x[:, ~hole].mean(axis=1)[:, None, None], x)
    images = {
        "masked": np.where(hole[..., None], np.float32(0.5), x),
        "inpainted": np.where(hole[..., None], found, x),
    }
    known = {"rms_known": rms(found - x, ~hole[None])}
    return images, {
        "picture": {"shape": compare_images(x, c)["shape"]},
        "filled with the mean": {"shape": compare_images(filled, c)["shape"]},
        "inpainted": {"shape": compare_images(images["inpainted"], c)["shape"]} | known,
    }


def transfer(
    search: pagoda.Search, x: np.ndarray, c: np.ndarray, objects: list
) -> tuple[dict[str, np.ndarray], Arms]:
    """({arm: images}, figures) of the picture's own class and of the next one; the last arm, noise
    of another picture, says what a background that is not kept would have."""
    G = search.generator
    others = (c + 1) % G.num_classes
    found = search(pagoda.whole(x, area_mean(x, base_of(search))), c)
    z = found.z[:, 0]
    images = {
        "own class": found.images[:, 0],
        "next class": pagoda.decode(G, z, others, search.omega),
        "another's noise": pagoda.decode(G, np.roll(z, 1, axis=0), others, search.omega),
    }
    ground = np.stack([background(o, x.shape[1]) for o in objects])
    return images, {
        arm: {
            "shape": compare_images(image, c if arm == "own class" else others)["shape"],
            "rms_background": rms(image - x, ground),
        }
        for arm, image in images.items()
    }


def background(objects, side: int) -> np.ndarray:
    """bool [side, side]: the pixels outside of the circles in which the objects lie."""
    place = (np.arange(side) + 0.5) / side
    free = np.ones((side, side), bool)
    for o in objects:
        far = np.hypot(place[None] - o.x, place[:, None] - o.y)
        free &= far > o.size / 2 + 1 / side
    return free


def rms(difference: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The root mean square [n] of differences [n, h, w, c] over pixels `where`, [n or 1, h, w]."""
    where = np.broadcast_to(where[..., None], difference.shape)
    return np.sqrt(np.square(difference).mean(axis=(1, 2, 3), where=where))


def summary(arms: Arms) -> dict:
    """{arm: {figure: [mean, half], "figure_minus_<first arm>": [mean, half]}}."""
    first, control = next(iter(arms.items()))
    found: dict = {}
    for arm, figures in arms.items():
        own = found[arm] = {}
        for name, values in figures.items():
            own["pictures"] = len(values)
            rows = {i: float(value) for i, value in enumerate(values)}
            compared = paired(rows, dict.fromkeys(rows, 0.0))
            own[name] = [compared.mean, compared.half]
            if arm != first and name in control:
                compared = paired(rows, dict(enumerate(map(float, control[name]))))
                own[f"{name}_minus_{first}"] = [compared.difference, compared.half]
    return found
