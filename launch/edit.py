"""Edit your own pictures with a one-step generator (PaGoDA's controllable generation).

    python -m launch.edit --model=W --task=inpaint --image=photo.jpg --mask=mask.png --label=star
    python -m launch.edit --model=W --task=superres --image=photo.jpg --label=star
    python -m launch.edit --model=W --task=transfer --image=photo.jpg --source=star --label=disc,ring
    python -m launch.edit --model=W --task=interpolate --image=a.png,b.png --label=star,disc
    python -m launch.edit --model=W --task=interpolate --seeds=3,7 --label=star
    python -m launch.edit --model=W --task=measure --judge=mobilenet_v2=FILE

W is the work directory of a distilled or grown generator, a file of launch.export, or
pretrained:NAME. Pictures may have any format and size. They are turned upright as their EXIF data
say, and their central square is shrunk as training images are (or enlarged, if it is smaller).
Transparent parts count as white. In a mask, white is what is painted anew. Results have the size of
the generator's images.

`--method=invert` finds the noise of a picture by the ODE of the generator's teacher,
`--method=optimise` by Adam. The folder --out gets the results (result*.png; of an interpolation its
frames and a GIF), sheet.png with the pictures before and after, and edit.json; the results of an
earlier edit in that folder are removed.
"""  # noqa: E501

import dataclasses
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from PIL import Image

import cheapscale
from cheapscale.data.files import atomic_write, read_json
from cheapscale.data.numbers import LARGEST, real
from cheapscale.data.pixels import to_uint8
from cheapscale.pagoda import edit as pagoda
from cheapscale.teacher.sampling import check_guidance
from cheapscale.teacher.teacher import Generator
from cheapscale.training.log import captioned, tile
from cheapscale.training.loop import provenance
from launch import edit_tasks as tasks
from launch.command import execute, required, results_folder, start
from launch.edit_measures import measure

TASKS = {
    "inpaint": tasks.inpaint, "superres": tasks.superres, "transfer": tasks.transfer,
    "interpolate": tasks.interpolate, "measure": measure,
}  # fmt: skip
PICTURES = {"interpolate": 2, "measure": 0}  # that a task takes, others one
ONLY = {
    "task": {"inpaint": ("mask", "paste"), "transfer": ("source",),
             "interpolate": ("seeds", "frames"), "measure": ("judge", "num", "optimised")},
    "method": {"optimise": ("start", "steps", "rate", "tries", "restarts", "penalty")},
}  # fmt: skip


REMEDIES = ("leave --image out", "give --image=FILE", "give --image=A.png,B.png, or --seeds=3,7")


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "model", None, "Work directory of a generator, file of launch.export, or pretrained:NAME."
    )
    flags.DEFINE_string("teacher", "", "The generator's teacher (default: the one on record).")
    flags.DEFINE_enum("task", None, list(TASKS), "What to do.")
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
    flags.DEFINE_integer("steps", pagoda.STEPS, "optimise: Adam's steps.", 1, 100_000)
    flags.DEFINE_float(
        "rate",
        None,
        "optimise: Adam's first rate, which falls along a cosine; default: 0.02 from an inversion, "
        "0.1 from the prior.",
        1e-9,
    )
    flags.DEFINE_integer("tries", 16, "optimise: starts that are drawn and looked at.", 1, 10_000)
    flags.DEFINE_integer("restarts", 2, "optimise: the best starts, which Adam improves.", 1, 1000)
    flags.DEFINE_float("penalty", 1e-3, "optimise: weight of (|z|^2 / (d sigma_max^2) - 1)^2.", 0)
    text = "Scale of a generator trained with guidance, for all that it draws."
    flags.DEFINE_float("cfg_scale", 1.0, text, 0)
    flags.DEFINE_string("judge", "", "measure: NAME=FILE of a feature network.")
    flags.DEFINE_integer("num", 64, "measure: held-out scenes.", 2, 10_000)
    text = "measure: of these, by optimisation too; 0: inversion alone, without inpainting."
    flags.DEFINE_integer("optimised", 16, text, 0, 10_000)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", 0, LARGEST)
    text = "Folder for the results (default: <model>/edit/<task>; runs/NAME/edit/<task> of a file)."
    flags.DEFINE_string("out", None, text)
    required("model", "runs/quickstart/grow32")
    required("task", "inpaint")


def check_flags(given) -> None:
    """Refuse flags that are missing, or that belong to another task or method."""
    check_search(given)
    number = PICTURES.get(given.task, 1)
    if given.seeds:
        two = [text for text in given.seeds if text.strip().isdecimal()]
        if len(two) != len(given.seeds) or len(two) != 2 or given.image:
            raise ValueError(
                f"--seeds={','.join(given.seeds)}: give two whole numbers instead of pictures, as "
                "--seeds=3,7"
            )
    elif len(given.image) != number:
        raise ValueError(
            f"{given.task} was given {len(given.image)} pictures, not {number}: {REMEDIES[number]}"
        )
    if given.task == "inpaint" and not given.mask:
        raise ValueError("--mask is missing: give --mask=FILE, white where to paint")


def check_search(given) -> None:
    """Refuse flags of another task or method, and searches that cannot be."""

    def typed(names) -> str:
        return ", ".join(f"--{name}" for name in names if given[name].present)

    measures = given.task == "measure"  # by all methods
    if measures and (stray := typed(("method", "start"))):
        raise ValueError(f"{stray}: measure compares all of them: leave it out")
    for kind, owners in ONLY.items():
        for owner, names in owners.items():
            fits = given[kind].value == owner or (measures and kind == "method")
            if not fits and (stray := typed(names)):
                raise ValueError(
                    f"{stray}: only for --{kind}={owner}, not {given[kind].value}: leave it out"
                )
    if (
        given.start == "inversion"
        and given.task != "inpaint"
        and (s := typed(("tries", "restarts")))
    ):
        raise ValueError(f"{s}: an inversion is one start: leave it out, or give --start=prior")
    if given.restarts > given.tries and given["restarts"].present:
        raise ValueError(
            f"--restarts={given.restarts} of --tries={given.tries} starts: give a larger --tries"
        )
    for name in ("rate", "penalty"):
        if given[name].value is not None:
            real(given[name].value, f"--{name}", 0)


def save(out: pathlib.Path, edited: tasks.Edited, moving: bool) -> None:
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
    check_guidance(G, given.cfg_scale)
    record = out / "edit.json"
    earlier = read_json(record).get("results", ()) if record.is_file() else ()
    run = TASKS[given.task](given, model)
    search = pagoda.Search(
        G,
        given.method,
        given.start,
        tries=given.tries,
        restarts=given.restarts,
        seed=given.seed,
        omega=given.cfg_scale,
        adam={"steps": given.steps, "penalty": given.penalty}
        | ({"rate": given.rate} if given.rate else {}),
    )
    teacher = {}
    if search.inverts and not given.seeds:
        found, how = pagoda.teacher_of(G, given.teacher), pagoda.inversion_of(G)
        search = dataclasses.replace(search, teacher=found, inversion=how)
        teacher = {"teacher": found.workdir, "inversion": how._asdict()}
    logging.info("%s: it compiles first, most of a short run", given.task)
    edited = run(search)
    for name in earlier:
        (out / name).unlink(missing_ok=True)
    save(out, edited, given.task == "interpolate")
    return {
        "task": given.task,
        "method": "all" if given.task == "measure" else given.method,
        "command": shlex.join(["python", "-m", "launch.edit", *sys.argv[1:]]),
        "model": given.model,
        "step": G.step,
        "cfg_scale": given.cfg_scale,
        **teacher,
        "out": str(out),
        "results": [f"{name}.png" for name in edited.results],
        "resolution": model.resolution,
        **jax.tree.map(lambda value: np.asarray(value).tolist(), edited.figures),
        "seconds_with_compilation": round(time.monotonic() - began, 2),
        "provenance": provenance({"model": given.model, "teacher": teacher.get("teacher")}),
    }


def main(argv: list[str] | None = None) -> dict:
    """Edit as the flags say; returns the summary."""

    def body(given) -> dict:
        given.out = given.out or results_folder(given.model, "edit", given.task)
        return execute("edit", given.out, lambda: edit(given))

    return start(define, body, argv)


if __name__ == "__main__":
    main()
