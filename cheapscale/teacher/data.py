"""Checks that a network or a trained teacher fits the images, made before anything compiles."""

from absl import logging

from cheapscale.data.resize import RESIZE_ID
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.teacher import Teacher


def check_model(model: dict, source) -> None:
    """Refuse a network with another resolution or other classes than the images have."""
    if model["resolution"] != source.resolution:
        raise ValueError(
            f"model.resolution is {model['resolution']}, but data.resolution is "
            f"{source.resolution}: set both to the base resolution"
        )
    if model["num_classes"] not in (0, source.num_classes):
        raise ValueError(
            f"model.num_classes is {model['num_classes']}, but {source.name} has "
            f"{source.num_classes} classes: set it to that, or to 0 for an unconditional model"
        )


def check_teacher(teacher: Teacher | Experts, source) -> None:
    """Refuse a teacher trained at another resolution, with another resize or with other classes.

    Other images of the same data set only log a warning.
    """
    model, trained = teacher.fields, teacher.meta["data"]
    check_model(model, source)
    for key, value in (("name", source.name), ("class_names", list(source.class_names))):
        if trained[key] != value:
            raise ValueError(
                f"the teacher in {teacher.workdir} was trained on {key} {trained[key]!r}, but "
                f"these images have {value!r}: choose the data set of the teacher"
            )
    if trained["resize"] != RESIZE_ID:
        raise ValueError(
            f"the teacher in {teacher.workdir} was trained on images made by {trained['resize']}, "
            f"but this version makes them by {RESIZE_ID}: retrain it, or use its own version"
        )
    if trained.get("fingerprint", source.fingerprint()) != source.fingerprint():
        logging.warning("these are not the images that %s was trained on", teacher.workdir)
