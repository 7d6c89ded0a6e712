"""A whole set of specialists of one teacher: assess, then fine-tune one group after another.

    python -m launch.specialists --config=configs/scenes.py --arg=size=cascade \\
        --teacher=runs/teacher --workdir=runs/specialists --set=k=0.5 --set=groups=5

The work directory is the set: a teacher for sampling, evaluation, inversion and the tuning-free
cascade (what copies or tunes one network takes the base). Groups are independent: on several
machines it is `launch.train` with stage=assess once, then stage=prune for each of them (README has
the commands). Running it again resumes. `--groups=0,3` fine-tunes those alone.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging

from cheapscale.stages import specialists
from cheapscale.stages.run import run
from launch.command import execute, start
from launch.pipeline import load_module

PARTS = ("prune", "optim", "ema")  # of the config, whose fields --set changes
OF_RUN = ("total_steps", "batch_size")  # of the fine-tuning
BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


def stage_config(
    path: str, arg: str, stage: str, teacher: str, folder: str, changes: Sequence[str]
):
    """One stage's config with its paths and `changes`: NAME=VALUE of config.prune or of OF_RUN,
    PART.NAME=VALUE of PARTS; of fine-tuning the rate falls to 0."""
    config = load_module(path).get_config(",".join(filter(None, (arg, f"stage={stage}"))))
    config.teacher, config.specialists = teacher, folder
    for change in changes:
        name, _, value = change.partition("=")
        part, _, field = name.rpartition(".")
        part = part or ("" if name in OF_RUN else "prune")
        if part not in ("", *PARTS):
            raise ValueError(f"--set={change}: names a field of {', '.join(PARTS)}, not of {part}")
        if stage == "assess" and part != "prune":  # only the fine-tuning has it
            continue
        place = config[part] if part else config
        if stage == "prune" and part == "prune" and field not in place:  # only the assessment has
            continue
        if field not in place or name == "group":  # --groups says which are trained
            more = OF_RUN if part == "prune" else ()
            known = ", ".join(other for other in (*place, *more) if other != "group")
            raise ValueError(
                f"--set={change}: config.{part} has no field {field!r} to set by NAME=VALUE, only "
                f"{known}"
            )
        place[field] = parsed(f"--set={change}", value, type(place[field]))
    if stage == "prune":
        anneal(config.optim, config.total_steps)
    return config


def parsed(change: str, value: str, kind: type) -> Any:
    """value as the type of the field it changes; ValueError where it is none."""
    with contextlib.suppress(ValueError, KeyError):
        if kind is tuple:
            return tuple(int(number) for number in value.split(","))
        return BOOLEANS[value.lower()] if kind is bool else kind(value)
    raise ValueError(f"{change}: {value!r} is no {kind.__name__}: give one")


def anneal(optim, steps: int) -> None:
    """Let the rate rise, if it does, over at most a fifth of so many steps and fall to 0 in them:
    a specialist has few."""
    optim.warmup_steps, optim.decay_steps = min(optim.warmup_steps, steps // 5), steps


def make_set(
    configured: Callable[[str, int], Any], folder: str, groups: Sequence[int] = ()
) -> dict:
    """The summary of the assessment and of every group's fine-tuning.

    configured("assess" or "prune", group) -> that stage's config, with teacher and folder.
    """
    assess = configured("assess", 0)
    count = assess.prune.groups
    unknown = sorted(set(groups) - set(range(count)))
    if unknown:
        raise ValueError(f"there is no group {unknown[0]}: {folder} has groups 0 ... {count - 1}")
    summary = run(assess, f"{folder}/assess")
    members = []
    for group in groups or range(count):
        logging.info("group %d of %d", group, count)
        config = configured("prune", group)
        config.prune.group = group
        members.append(run(config, specialists.group_folder(folder, group)))
        jax.clear_caches()
    return summary | {"members": members}


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    folder = options.workdir

    def configured(stage, group):
        del group  # all alike
        return stage_config(
            options.config, options.arg, stage, options.teacher, folder, options.set
        )

    def body() -> dict:
        for stage in ("assess", "prune"):  # before hours of search: whatever --set names is there
            configured(stage, 0)
        groups = [parsed(f"--groups={group}", group, int) for group in options.groups]
        return make_set(configured, folder, groups)

    execute("specialists", folder, body)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file with get_config.")
    flags.DEFINE_string("arg", "", "Argument string for the config file.")
    flags.DEFINE_string("teacher", None, "Work directory of the teacher to prune.")
    flags.DEFINE_string("workdir", None, "The folder of the set.")
    flags.DEFINE_multi_string(
        "set",
        [],
        "NAME=VALUE of a field of config.prune (all are in configs/common.py); of the fine-tuning "
        "total_steps=, batch_size=, optim.NAME= and ema.NAME=; may be repeated.",
    )
    flags.DEFINE_list("groups", [], "Fine-tune only these groups, counted from the cleanest.")
    flags.mark_flags_as_required(["config", "teacher", "workdir"])
    start(main)
