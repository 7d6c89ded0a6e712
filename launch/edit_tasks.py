"""What `launch.edit` does to pictures: a task reads and checks its input, and returns what is left
to do with a `Search` for the noise of the pictures."""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from cheapscale.data.numbers import whole
from cheapscale.data.pixels import psnr
from cheapscale.data.resize import downsample
from cheapscale.data.source import read_picture
from cheapscale.model import Model
from cheapscale.pagoda import edit as pagoda
from cheapscale.teacher.codec import factor_of
from cheapscale.teacher.sampling import check_labels, prior
from launch.command import condition_flag

ANY = range(1, 1001)  # numbers of classes
EDGE = 0.02  # a pixel with a larger part in the hole is painted anew
SHOWN = 8  # frames on the sheet


class Edited(NamedTuple):
    """results: {name: image} that become <name>.png. sheet: [(caption, image)]. figures: entries of
    the summary."""

    results: dict[str, np.ndarray]
    sheet: list[tuple[str, np.ndarray]]
    figures: dict


Task = Callable[[pagoda.Search], Edited]  # what is left to do when all input is checked


def conditions(
    model: Model, given, flag: str, counts: Sequence[int]
) -> tuple[list[str], np.ndarray]:
    """(names [n], rows int32 [n] or, of captions, [n, l]) that a flag gives, n one of `counts`."""
    flag = condition_flag(given, model.captioned, flag) if flag == "label" else flag
    texts, known = given[flag].value, model.network.num_classes
    texts = [texts] if isinstance(texts, str) else texts
    if known and not texts:
        names = ", ".join(model.class_names) or f"0 ... {known - 1}"
        raise ValueError(f"--{flag} is missing: name one of the classes {names}")
    texts = texts or ["" if model.captioned else "0"]
    rows = model.labels(texts, len(texts))
    check_labels(rows, known)
    if len(texts) not in counts:
        wanted = " or ".join(map(str, counts))
        raise ValueError(f"--{flag} was given {len(texts)} times: give {wanted}")
    if not model.captioned and model.class_names:
        texts = [model.class_names[label] for label in rows]
    return texts, rows


def numbered(images: np.ndarray) -> dict[str, np.ndarray]:
    """{name: image}: result, result-2, ..."""
    return {f"result-{n}" if n > 1 else "result": image for n, image in enumerate(images, 1)}


def read(place: str) -> np.ndarray:
    """uint8 [h, w, 3] of a picture file, upright."""
    if not pathlib.Path(place).is_file():
        raise FileNotFoundError(f"there is no picture {place}: name a file")
    pixels = read_picture(place, place, "name a picture, such as a PNG or JPEG")
    height, width = pixels.shape[:2]
    if height != width:
        side = min(height, width)
        logging.info("%s is %dx%d px: its central %dx%d are used", place, width, height, side, side)
    return pixels


def hole_of(given, pixels: np.ndarray, side: int) -> np.ndarray:
    """bool [side, side]: which pixels of the shrunk picture are painted anew; ValueError if all or
    none are, or if the mask has another size than the picture."""
    mask = read(given.mask)
    sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (mask, pixels)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{given.mask} is {sizes[0]} px, but {given.image[0]} is {sizes[1]}: give a mask of "
            "that size"
        )
    white = (mask.mean(axis=2, keepdims=True) > 127).astype(np.float32)
    hole = downsample(white, side, allow_upscale=True)[..., 0] > EDGE
    if hole.all() or not hole.any():
        what = "everything: leave some of it black, which is kept"
        what = what if hole.all() else "nothing: make white what is to be painted anew"
        raise ValueError(f"in the central square at {side} px {given.mask} marks {what}")
    return hole


def shrunk(pixels: np.ndarray, *sides: int) -> list[np.ndarray]:
    """The picture at each side, float32 [side, side, 3] in [-1, 1], as training images are made."""
    return [downsample(pixels, side, allow_upscale=True) for side in sides]


def inpaint(given, model: Model) -> Task:
    """The task, everything checked: z* = argmin ||y - A(G(z, c))||^2, A(x) the known pixels."""
    _, (c,) = conditions(model, given, "label", (1,))
    pixels = read(given.image[0])
    hole = hole_of(given, pixels, model.resolution)
    (x,) = shrunk(pixels, model.resolution)
    factor = factor_of(model.network.meta)
    seen = pagoda.outside(x[None], hole, model.network.resolution, factor)

    def run(search: pagoda.Search) -> Edited:
        _, images, loss = (rows[0] for rows in search(seen, c[None]))
        results = numbered(np.where(hole[..., None], images, x) if given.paste else images)
        grey = np.where(hole[..., None], np.float32(0.5), x)
        drawn = [(f"G(z), loss {v:.4f}", image) for v, image in zip(loss, images)]
        sheet = [("picture", x), ("known", grey), *results.items(), *drawn]
        known = psnr(seen.A(images), np.repeat(seen.y, len(images), axis=0))
        return Edited(results, sheet, {"loss": loss, "psnr_known": known})

    return run


def bicubic(x: np.ndarray, side: int) -> np.ndarray:
    """x [..., h, h, c] in [-1, 1] enlarged to `side` pixels."""
    shape = (*x.shape[:-3], side, side, x.shape[-1])
    return np.clip(jax.image.resize(x, shape, "cubic"), -1, 1)


def superres(given, model: Model) -> Task:
    """The task, everything checked: G(E(x_lo, c), c), or argmin ||x_lo - A(G(z, c))||^2 with
    block means A. The picture at G's size, if it is that large, judges the result."""
    _, (c,) = conditions(model, given, "label", (1,))
    side, base = model.resolution, model.base
    if side == base:
        raise ValueError(
            f"{given.model} makes images of {base} px, the size of its teacher's: name a grown "
            "generator as --model"
        )
    pixels = read(given.image[0])
    x, x_lo = shrunk(pixels, side, base)
    whole = min(pixels.shape[:2]) >= side

    def run(search: pagoda.Search) -> Edited:
        found = search(pagoda.reduced(x_lo[None]), c[None])
        best = {"bicubic": bicubic(x_lo, side), "result": found.images[0, 0]}
        figures = {"loss": found.loss[0]}
        if whole:
            figures |= {f"psnr_{n}": float(psnr(i[None], x[None])[0]) for n, i in best.items()}
        sheet = [(f"{base} px", x_lo), *best.items()] + [("picture", x)] * whole
        return Edited({"result": best["result"]}, sheet, figures)

    return run


def transfer(given, model: Model) -> Task:
    """The task, everything checked: G(E(x_lo, c), c') for the picture's class c and others."""
    G = model.network
    if not (G.num_classes or model.captioned):
        raise ValueError(f"{given.model} knows no classes: name another generator as --model")
    (own,), (c,) = conditions(model, given, "source", (1,))
    names, others = conditions(model, given, "label", ANY)
    x, x_lo = shrunk(read(given.image[0]), model.resolution, model.base)

    def run(search: pagoda.Search) -> Edited:
        found = search(pagoda.whole(x[None], x_lo[None]), c[None])
        z, image = found.z[0, :1], found.images[0, 0]
        images = pagoda.decode(G, np.repeat(z, len(names), axis=0), others, search.omega)
        sheet = [("picture", x), (f"G(z, {own})", image), *zip(names, images)]
        figures = {"loss": found.loss[0], "psnr": float(psnr(image[None], x[None])[0])}
        return Edited(numbered(images), sheet, figures)

    return run


def interpolate(given, model: Model) -> Task:
    """The task, everything checked: G(z(a), c(a)), z(a) by slerp, the embedding of the class c(a) a
    weighted mean of the ends'; captions take one for all."""
    G = model.network
    _, rows = conditions(model, given, "label", (1,) if model.captioned else (1, 2))
    ends = np.stack([rows[0], rows[-1]])
    pictures = [shrunk(read(place), model.resolution, model.base) for place in given.image]
    seeds = [whole(int(text), "--seeds") for text in given.seeds]
    a = np.linspace(0, 1, given.frames)

    def run(search: pagoda.Search) -> Edited:
        if seeds:
            z = [prior(seed, np.arange(1), G.shape, G.process.sigma_max)[0] for seed in seeds]
            figures = {}
        else:
            found = search(pagoda.whole(*map(np.stack, zip(*pictures))), ends)
            z, figures = found.z[:, 0], {"loss": found.loss[:, 0]}
        label = np.repeat(rows[:1], len(a), axis=0)
        if G.num_classes:
            first, last = np.eye(G.num_classes, dtype=np.float32)[ends]
            label = (np.outer(1 - a, first) + np.outer(a, last)).astype(np.float32)
        images = pagoda.decode(G, pagoda.slerp(*z, a), label, search.omega)
        names = [f"frame-{n:03d}" for n in range(len(a))]
        few = np.unique(np.linspace(0, len(a) - 1, SHOWN).round().astype(int))
        sheet = [(f"a = {a[n]:.2f}", images[n]) for n in few]
        if pictures:
            sheet = [("picture A", pictures[0][0]), *sheet, ("picture B", pictures[1][0])]
        figures["degrees"] = float(np.degrees(pagoda.angle(*z)))
        return Edited(dict(zip(names, images)), sheet, figures)

    return run
