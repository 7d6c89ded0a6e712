"""Edit your own pictures with a one-step generator (PaGoDA's controllable generation).

    python -m launch.edit --model=W --task=inpaint --image=photo.jpg --mask=mask.png --label=star
    python -m launch.edit --model=W --task=superres --image=photo.jpg --label=star
    python -m launch.edit --model=W --task=transfer --image=photo.jpg --source=star --label=disc,ring
    python -m launch.edit --model=W --task=interpolate --image=a.png,b.png --label=star,disc
    python -m launch.edit --model=W --task=interpolate --seeds=3,7 --label=star

W is the work directory of a distilled or grown generator, a file of launch.export, or
pretrained:NAME. Pictures may have any format and size. They are turned upright as their EXIF data
say, and their central square is shrunk as training images are (or enlarged, if it is smaller). In a
mask, white is what is painted anew. Results have the size of the generator's images.

`--method=invert` finds the noise of a picture by the ODE of the generator's teacher,
`--method=optimise` by Adam. The folder --out gets the results (result*.png; of an interpolation its
frames and a GIF), sheet.png with the pictures before and after, and edit.json.
"""  # noqa: E501

import dataclasses
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from PIL import Image

import cheapscale
from cheapscale.data.files import atomic_write
from cheapscale.data.numbers import LARGEST, whole
from cheapscale.data.pixels import psnr, to_uint8
from cheapscale.data.resize import area_mean, downsample
from cheapscale.data.source import read_picture
from cheapscale.model import Model
from cheapscale.pagoda import edit as pagoda
from cheapscale.teacher.sampling import check_labels, prior
from cheapscale.teacher.teacher import Generator
from cheapscale.training.exported import files_of, model_file
from cheapscale.training.log import captioned, tile
from launch.command import condition_flag, execute, required, start

PICTURES = {"inpaint": 1, "superres": 1, "transfer": 1, "interpolate": 2}  # that a task takes
ONLY = {
    "task": {"inpaint": ("mask", "paste"), "transfer": ("source",),
             "interpolate": ("seeds", "frames")},
    "method": {"optimise": ("start", "steps", "rate", "restarts", "penalty")},
}  # fmt: skip
RATES = {"inversion": 0.02, "prior": 0.1}  # of Adam, by start
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


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "model", None, "Work directory of a generator, file of launch.export, or pretrained:NAME."
    )
    flags.DEFINE_string("teacher", "", "The generator's teacher (default: the one on record).")
    flags.DEFINE_enum("task", None, list(PICTURES), "What to do.")
    flags.DEFINE_list("image", [], "The picture; interpolate: both, A,B.")
    flags.DEFINE_string("mask", "", "inpaint: picture of the image's size, white where to paint.")
    flags.DEFINE_bool("paste", True, "inpaint: copy the known pixels into the result.")
    flags.DEFINE_list(
        "label",
        None,
        "Class by number or name: that of the picture; for transfer that it becomes, or several; "
        "for interpolate of both ends, or of each.",
    )
    flags.DEFINE_multi_string("prompt", None, "Caption in place of --label; transfer: repeatedly.")
    flags.DEFINE_string("source", None, "transfer: the picture's own class or caption.")
    flags.DEFINE_list("seeds", [], "interpolate: two seeds of noise instead of pictures, 3,7.")
    flags.DEFINE_integer("frames", 16, "interpolate: pictures, with both ends.", 2, 1000)
    flags.DEFINE_enum(
        "method",
        None,
        ["invert", "optimise"],
        "How noise is found; default: optimise to inpaint, else invert, as in the paper.",
    )
    flags.DEFINE_enum(
        "start",
        None,
        ["inversion", "prior"],
        "optimise: from the teacher's inversion, with the prior's noise where nothing is known, or "
        "from the prior; default: inversion to inpaint, else prior.",
    )
    flags.DEFINE_integer("steps", 300, "optimise: Adam's steps.", 1, 100_000)
    flags.DEFINE_float(
        "rate",
        None,
        "optimise: Adam's first rate, which falls along a cosine; default: 0.02 from an inversion, "
        "0.1 from the prior.",
        1e-9,
    )
    flags.DEFINE_integer("restarts", 4, "optimise: starts; the best wins.", 1, 1000)
    flags.DEFINE_float("penalty", 1e-3, "optimise: weight of (|z|^2 / (d sigma_max^2) - 1)^2.", 0)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", 0, LARGEST)
    flags.DEFINE_string("out", None, "Folder for the results (default: <model>/edit/<task>).")
    required("model", "runs/quickstart/grow32")
    required("task", "inpaint")


def check_flags(given) -> None:
    """Refuse flags that are missing, or that belong to another task or method."""
    for kind, owners in ONLY.items():
        for owner, names in owners.items():
            stray = ", ".join(f"--{name}" for name in names if given[name].present)
            if stray and given[kind].value != owner:
                raise ValueError(
                    f"{stray}: only for --{kind}={owner}, not {given[kind].value}: leave it out"
                )
    number = PICTURES[given.task]
    if given.seeds:
        two = [text for text in given.seeds if text.strip().isdecimal()]
        if len(two) != len(given.seeds) or len(two) != 2 or given.image:
            raise ValueError(
                f"--seeds={','.join(given.seeds)}: give two whole numbers instead of pictures, as "
                "--seeds=3,7"
            )
    elif len(given.image) != number:
        raise ValueError(
            f"{given.task} was given {len(given.image)} pictures, not {number}: give "
            f"--image={'A.png,B.png, or --seeds=3,7' if number == 2 else 'FILE'}"
        )
    if given.task == "inpaint" and not given.mask:
        raise ValueError("--mask is missing: give --mask=FILE, white where to paint")


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
        raise ValueError(f"--{flag} was given {len(texts)} times: give {counts[0]}")
    if model.class_names and not model.captioned:
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
    base = model.network.resolution
    pixels = read(given.image[0])
    hole = hole_of(given, pixels, model.resolution)
    (x,) = shrunk(pixels, model.resolution)
    rows, columns = np.nonzero(~hole)
    grey = np.where(hole[..., None], np.float32(0.5), x)
    filled = np.where(hole[..., None], x[~hole].mean(axis=0), x)
    hole_lo = area_mean(hole[..., None].astype(np.float32), base)[..., 0] > 0

    def A(x):
        return x[:, rows, columns]

    def run(search: pagoda.Search) -> Edited:
        found = search(x[~hole], A, area_mean(filled, base), c, hole_lo)
        pasted = np.where(hole[..., None], found.images, x) if given.paste else found.images
        results = numbered(pasted)
        drawn = [(f"G(z), loss {v:.4f}", image) for v, image in zip(found.loss, found.images)]
        sheet = [("picture", x), ("known", grey), *results.items(), *drawn]
        known = psnr(A(found.images), pagoda.repeated(x[~hole], len(pasted)))
        return Edited(results, sheet, {"loss": found.loss, "psnr_known": known})

    return run


def superres(given, model: Model) -> Task:
    """The task, everything checked: G(E(x_lo, c), c), or argmin ||x_lo - A(G(z, c))||^2 with
    block means A. The picture at G's size, if it is that large, judges the result."""
    _, (c,) = conditions(model, given, "label", (1,))
    side, base = model.resolution, model.network.resolution
    if side == base:
        raise ValueError(
            f"{given.model} makes images of {base} px, the size of its teacher's: name a grown "
            "generator as --model"
        )
    pixels = read(given.image[0])
    x, x_lo = shrunk(pixels, side, base)
    whole = min(pixels.shape[:2]) >= side

    def run(search: pagoda.Search) -> Edited:
        found = search(x_lo, lambda x: area_mean(x, base), x_lo, c)
        bicubic = np.asarray(jax.image.resize(x_lo, x.shape, "cubic")).clip(-1, 1)
        best = {"bicubic": bicubic, "result": found.images[0]}
        figures = {"loss": found.loss}
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
    x, x_lo = shrunk(read(given.image[0]), model.resolution, G.resolution)

    def run(search: pagoda.Search) -> Edited:
        found = search(x, lambda x: x, x_lo, c)
        images = pagoda.decode(G, pagoda.repeated(found.z[0], len(names)), others)
        sheet = [("picture", x), (f"G(z, {own})", found.images[0]), *zip(names, images)]
        figures = {"loss": found.loss, "psnr": float(psnr(found.images[:1], x[None])[0])}
        return Edited(numbered(images), sheet, figures)

    return run


def interpolate(given, model: Model) -> Task:
    """The task, everything checked: G(z(a), c(a)), z(a) by slerp, the embedding of the class c(a) a
    weighted mean of the ends'; captions take one for all."""
    G = model.network
    _, rows = conditions(model, given, "label", (1,) if model.captioned else (1, 2))
    ends = rows[0], rows[-1]
    pictures = [shrunk(read(place), model.resolution, G.resolution) for place in given.image]
    seeds = [whole(int(text), "--seeds") for text in given.seeds]
    a = np.linspace(0, 1, given.frames)

    def run(search: pagoda.Search) -> Edited:
        found = [search(x, lambda x: x, x_lo, c) for (x, x_lo), c in zip(pictures, ends)]
        drawn = [prior(seed, np.arange(1), G.shape, G.process.sigma_max)[0] for seed in seeds]
        z = drawn or [f.z[0] for f in found]
        label = pagoda.repeated(rows[0], len(a))
        if G.num_classes:
            first, last = np.eye(G.num_classes, dtype=np.float32)[list(ends)]
            label = (np.outer(1 - a, first) + np.outer(a, last)).astype(np.float32)
        images = pagoda.decode(G, pagoda.slerp(*z, a), label)
        names = [f"frame-{n:03d}" for n in range(len(a))]
        few = np.unique(np.linspace(0, len(a) - 1, SHOWN).round().astype(int))
        sheet = [(f"a = {a[n]:.2f}", images[n]) for n in few]
        if pictures:
            sheet = [("picture A", pictures[0][0]), *sheet, ("picture B", pictures[1][0])]
        angle = float(np.degrees(pagoda.angle(*z)))
        figures = {"loss": [float(f.loss[0]) for f in found], "degrees": angle}
        return Edited(dict(zip(names, images)), sheet, figures)

    return run


def save(out: pathlib.Path, edited: Edited, moving: bool) -> None:
    """Write the results, the sheet and, if `moving`, a GIF that goes there and back."""

    def write(name: str, image: Image.Image, **options: Any) -> None:
        with atomic_write(out / name) as temporary:
            image.save(temporary, format=name[-3:].upper(), **options)

    for name, image in edited.results.items():
        write(f"{name}.png", Image.fromarray(to_uint8(image)))
    write("sheet.png", captioned(edited.sheet))
    if moving:
        frames = [tile(image) for image in edited.results.values()]
        frames += frames[-2:0:-1]
        more = {"save_all": True, "append_images": frames[1:], "duration": 80, "loop": 0}
        write("interpolation.gif", frames[0], **more)


TASKS = {"inpaint": inpaint, "superres": superres, "transfer": transfer, "interpolate": interpolate}


def edit(given) -> dict:
    """The summary, after editing and writing the files."""
    painting = given.task == "inpaint"
    given.method = given.method or ("optimise" if painting else "invert")
    given.start = given.start or ("inversion" if painting else "prior")
    check_flags(given)
    model, out, began = cheapscale.load(given.model), pathlib.Path(given.out), time.monotonic()
    G = model.network
    if not isinstance(G, Generator):
        raise ValueError(
            f"{given.model} holds no one-step generator: name a distill or grow run as --model"
        )
    run = TASKS[given.task](given, model)
    search = pagoda.Search(
        G,
        given.method,
        given.start,
        restarts=given.restarts,
        seed=given.seed,
        adam={"steps": given.steps, "rate": given.rate or RATES[given.start],
              "penalty": given.penalty},
    )  # fmt: skip
    teacher = {}
    if search.inverts and not given.seeds:
        found, how = pagoda.teacher_of(G, given.teacher), pagoda.inversion_of(G)
        search = dataclasses.replace(search, teacher=found, inversion=how)
        teacher = {"teacher": found.workdir, "inversion": how._asdict()}
    logging.info("%s by %s; it compiles first, most of a short run", given.task, given.method)
    edited = run(search)
    save(out, edited, given.task == "interpolate")
    return {
        "task": given.task,
        "method": given.method,
        "command": shlex.join(["python", "-m", "launch.edit", *sys.argv[1:]]),
        "model": given.model,
        "step": G.step,
        **teacher,
        "files": files_of({"model": given.model, "teacher": teacher.get("teacher")}),
        "out": str(out),
        "results": [f"{name}.png" for name in edited.results],
        "resolution": model.resolution,
        **{name: np.asarray(value).tolist() for name, value in edited.figures.items()},
        "seconds_with_compilation": round(time.monotonic() - began, 2),
    }


def main(argv: list[str] | None = None) -> dict:
    """Edit as the flags say; returns the summary."""

    def body(given) -> dict:
        if not given.out:
            file = model_file(given.model)
            place = pathlib.Path("runs", file.stem) if file else pathlib.Path(given.model)
            given.out = str(place / "edit" / given.task)
        return execute("edit", given.out, lambda: edit(given))

    return start(define, body, argv)


if __name__ == "__main__":
    main()
