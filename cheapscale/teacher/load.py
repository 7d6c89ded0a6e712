"""Loads teachers, experts and generators from their work directories."""

import pathlib

from cheapscale.teacher.codec import codec_of
from cheapscale.teacher.experts import (
    Experts,
    is_begun,
    is_packed,
    is_set,
    load_experts,
    unpacked,
)
from cheapscale.teacher.teacher import Generator, Teacher, make_generator, make_teacher
from cheapscale.training.checkpoint import load_network


def load(
    workdir: str | pathlib.Path, *, ema: bool = True, step: int | None = None
) -> Teacher | Experts | Generator:
    """The model of a work directory: a pretraining run's Teacher, a distilled or grown Generator,
    or the Experts of a set's folder.

    Args:
        ema: the averaged weights, else the raw ones.
        step: of the checkpoint; the newest by default.

    Raises FileNotFoundError if nothing is trained yet, ValueError if the folder holds only a part
    of a model (one expert, or weights tuned for a cascade).
    """
    if is_begun(workdir):
        raise FileNotFoundError(
            f"the assessment of {workdir} is not finished: run the same command again"
        )
    if is_set(workdir):
        if step is not None:
            raise ValueError(
                f"--step={step} picks a checkpoint of one run, but {workdir} is a set of experts: "
                "leave it out"
            )
        return decodable(load_experts(workdir, ema=ema))
    loaded = load_network(workdir, step=step, ema=ema)
    if is_packed(loaded.meta):
        return decodable(unpacked(loaded))
    if loaded.meta["stage"] == "prune":
        raise ValueError(
            f"{workdir} holds one expert, which covers only a part of the noise levels: name the "
            "folder of its set"
        )
    if loaded.meta["stage"] == "cascade":
        raise ValueError(
            f"{workdir} holds weights tuned for larger canvases, not a whole model: name its "
            "teacher, and this folder as --tuned beside --cascade"
        )
    if loaded.meta["stage"] == "autoencode":
        raise ValueError(
            f"{workdir} holds an autoencoder, which draws nothing: make latents with it by stage "
            f"encode (--config.encode.autoencoder={workdir}) and train on those"
        )
    make = make_generator if "generator" in loaded.meta["networks"] else make_teacher
    return decodable(make(*loaded))


def decodable(model: Teacher | Experts | Generator) -> Teacher | Experts | Generator:
    """The same model, whose autoencoder is there if it draws latents; else ValueError, before
    anything is computed."""
    codec_of(model.meta)
    return model


def load_teacher(workdir: str | pathlib.Path, *, dtype: str = "") -> Teacher | Experts:
    """The EMA weights of a pretraining run, or a set of experts; ValueError for another stage's.

    dtype: compute in this precision instead of the one trained in.
    """
    if not str(workdir):
        raise ValueError("teacher is empty: give --config.teacher=DIR, a pretrain run")
    model = load(workdir)
    if isinstance(model, Generator):
        raise ValueError(
            f"{workdir} is the work directory of stage {model.meta['stage']}, not a teacher's: "
            "give --config.teacher=DIR, a pretrain run or a set of experts"
        )
    return model.in_precision(dtype)


def load_network_teacher(workdir: str | pathlib.Path, purpose: str) -> Teacher:
    """`load_teacher` for methods that need one network; ValueError for a set of experts."""
    teacher = load_teacher(workdir)
    if isinstance(teacher, Experts):
        raise ValueError(
            f"{workdir} is a set of experts, but {purpose}: name the work directory of its base"
        )
    return teacher
