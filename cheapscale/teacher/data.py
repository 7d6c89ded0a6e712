"""Checks that a network or a trained teacher fits the images, made before anything compiles."""

from typing import Any

import numpy as np
from absl import logging

from cheapscale.data.resize import RESIZE_ID
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.teacher import Teacher


def check_model(model: dict, source) -> None:
    """Refuse a new network with another resolution or other classes than the images have."""
    if model["resolution"] != source.resolution:
        raise ValueError(
            f"model.resolution is {model['resolution']}, but data.resolution is "
            f"{source.resolution}: give --config.data.resolution={model['resolution']}"
        )
    if (channels := model.get("in_channels", 3)) != source.channels:
        raise ValueError(
            f"model.in_channels is {channels}, but {source.name} has {source.channels} channels: "
            f"give --config.model.in_channels={source.channels}"
        )
    count = source.num_classes
    if model["num_classes"] not in (0, count):
        raise ValueError(
            f"model.num_classes is {model['num_classes']}, but {source.name} has {count} classes: "
            f"give --config.model.num_classes={count}"
            + (", or 0 for an unconditional model" if count else "")
        )


def match_classes(meta: dict[str, Any], num_classes: int, source, where: str) -> None:
    """Number the classes of the images as the model in `where` does, by their names.

    A model of captions gets their token numbers as labels instead. meta: of the model's checkpoint.
    num_classes: of the model; an unconditional one takes any images. Raises ValueError for classes
    that it does not know, and for images without labels or captions.
    """
    network = next(iter(meta.get("networks", {}).values()), {})
    if text := network.get("text"):
        source.use_captions(text["tokenizer"], text["length"])
    if not num_classes:
        return
    if not source.num_classes:
        raise ValueError(
            f"the model in {where} has {num_classes} classes, but {source.name}:{source.split} has "
            "no labels: use one sub-folder for each class, named as in its training images"
        )
    names = meta.get("data", {}).get("class_names") or [str(n) for n in range(num_classes)]
    source.number_classes(names)


def check_teacher(teacher: Teacher | Experts, source) -> None:
    """Number the images' classes as the teacher does, and refuse images that do not fit it.

    They fit if resolution, resize and kind of source are those that it was trained with, and it
    knows their classes. Other images than its own only log a warning.
    """
    model, trained = teacher.fields, teacher.meta["data"]
    match_classes(teacher.meta, teacher.num_classes, source, teacher.workdir)
    check_model(model, source)
    if trained["name"] != source.name:
        raise ValueError(
            f"the teacher in {teacher.workdir} was trained on name {trained['name']!r}, but "
            f"these images have {source.name!r}: choose the data set of the teacher"
        )
    codecs = [d.get("codec", {}).get("sha256", "none") for d in (trained, source.describe())]
    if codecs[0] != codecs[1]:
        raise ValueError(
            f"the teacher in {teacher.workdir} was trained on latents of another autoencoder "
            f"({codecs[0][:16]}, not {codecs[1][:16]}): give its own data set as "
            "--config.data.data_dir=DIR"
        )
    if trained["resize"] != RESIZE_ID:
        raise ValueError(
            f"the teacher in {teacher.workdir} was trained on images made by {trained['resize']}, "
            f"but this version makes them by {RESIZE_ID}: retrain it, or use its own version"
        )
    if trained.get("fingerprint", source.fingerprint()) != source.fingerprint():
        logging.warning("these are not the images that %s was trained on", teacher.workdir)


def preview_labels(source, count: int = 16) -> np.ndarray:
    """The labels of a preview: the captions of the first images, or classes in turn, int32 [n]."""
    if source.captioned:
        return np.stack([source[i % len(source)]["label"] for i in range(count)])
    return (np.arange(count) % max(source.num_classes, 1)).astype(np.int32)
