"""The interface of notebooks and commands to any checkpoint: `cheapscale.load(workdir)`.

model = cheapscale.load("runs/quickstart/pretrain")       # teacher, experts or generator
images, labels = model.sample(16, seed=1)                  # float32 in [-1, 1], NHWC
z = model.invert(images, labels)                           # teachers: noise by the ODE
again = model.reconstruct(z, labels)
scales, labels = model.cascade("2x,4x", num=16)            # teachers: beyond the trained size
"""

import os
import pathlib
from typing import Any

import numpy as np
from absl import logging

from cheapscale import teacher
from cheapscale.cascade.sample import CascadeSamples, cascade
from cheapscale.data.numbers import consecutive, whole
from cheapscale.data.pixels import check_finite, from_uint8, pictures
from cheapscale.interop.diffusers import is_pipeline, read_pipeline
from cheapscale.interop.unconditional import is_unconditional, read_unconditional
from cheapscale.teacher.codec import codec_of, enter, factor_of, leave
from cheapscale.teacher.cost import sampler_cost
from cheapscale.teacher.sampling import Samples, check_labels, inverter, one_step, sample
from cheapscale.teacher.teacher import Generator
from cheapscale.teacher.text import tokenise
from cheapscale.training.mesh import in_batches


class Model:
    """A teacher, a set of experts or a generator, with methods to sample, invert and enlarge.

    network: the `Teacher`, `Experts` or `Generator` itself, for all other uses.
    """

    def __init__(self, network: teacher.Teacher | teacher.Experts | teacher.Generator):
        self.network = network

    def __repr__(self) -> str:
        return (
            f"{type(self.network).__name__} of {self.network.workdir!r}, step {self.network.step}: "
            f"{self.resolution} px, {self.network.num_classes} classes"
        )

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that `sample` draws."""
        return self.network.net.config.output_resolution * factor_of(self.network.meta)

    @property
    def base(self) -> int:
        """Side in pixels of the images of the teacher, from which a generator grew."""
        return self.network.resolution * factor_of(self.network.meta)

    @property
    def captioned(self) -> bool:
        """Whether labels are captions."""
        return self.network.net.config.text is not None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return list(self.network.meta["data"].get("class_names", ()))

    def sample(
        self,
        num: int = 16,
        *,
        start: int = 0,
        labels: np.ndarray | int | str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Samples:
        """(images float32 [num, h, w, c] in [-1, 1], labels int32 [num]).

        Args:
            start: number of the first image; image i depends only on (seed, i).
            labels: one class or several, as numbers or names, repeated until there are `num`; by
                default classes are drawn uniformly. Of a model of captions: captions, by
                default the empty one.
            options: `batch_size`, cfg_scale of a model that was trained for guidance, and for
                teachers steps, method, spacing; see `teacher.sampling.sampler`.
        """
        ids = consecutive(start, num, (self.resolution, self.resolution, 3))
        return sample(self.network, ids, labels=self.labels(labels, num), seed=seed, **options)

    def invert(
        self, images: np.ndarray, labels: np.ndarray | int | str | None = None, **options: Any
    ) -> np.ndarray:
        """z [n, h, w, c] at scale sigma_max: the noise that the ODE maps to the images.

        images: [n, h, w, c] at the trained size, uint8 or floats in [-1, 1]. labels: one class for
        all images or one for each, 0 by default. options: nodes (40), clip, batch_size.
        """
        self._needs_ode("invert")
        images = pictures(images)
        images = from_uint8(images) if images.dtype == np.uint8 else images
        return self._solve("invert", enter(self.network.meta, images), labels, options)

    def reconstruct(
        self, z: np.ndarray, labels: np.ndarray | int | str | None = None, **options: Any
    ) -> np.ndarray:
        """The images of noise z: a teacher solves the ODE back on `invert`'s nodes, a generator
        returns G(z)."""
        if isinstance(self.network, Generator):
            rows = self._rows(z, labels)
            images = in_batches(one_step, self.network, *rows, **{"batch_size": 64, **options})
            images = check_finite(images)
        else:
            images = self._solve("round_trip", z, labels, options)
        return leave(self.network.meta, images) if codec_of(self.network.meta) else images

    def cascade(
        self,
        sizes: str,
        *,
        num: int = 16,
        labels: np.ndarray | int | str | None = None,
        **options: Any,
    ) -> CascadeSamples:
        """(images of every scale, labels) at sizes beyond the trained one, by self-cascade.

        sizes: scales per side, cumulative ("2x,4x"), or a last size, height first ("64x96").
        options: pivots, k, tuned, baseline, seed, steps, method ...; see `cascade.sample.cascade`.
        """
        self._needs_ode("cascade")
        labels = self.labels(labels, num)
        return cascade(self.network, sizes, num=num, labels=labels, **options)

    def avoiding(self, caption: str) -> "Model":
        """The same teacher with guidance that leads away from this caption (a negative prompt),
        instead of from pictures without one."""
        if not self.captioned or isinstance(self.network, Generator):
            kind = "is a one-step generator" if self.captioned else "knows no captions"
            raise ValueError(
                f"{self.network.workdir} {kind}, so that a negative prompt has no effect: leave it "
                "out"
            )
        (tokens,) = tokenise(self.network.net.config.text, [caption])
        members = tuple(member.replace(negative=tokens) for member in self.network.members)
        one = isinstance(self.network, teacher.Teacher)
        return Model(members[0] if one else self.network.replace(members=members))

    def cost(self, batch_size: int = 16, **options: Any) -> dict:
        """Network calls, FLOPs, seconds and memory of one image; see `teacher.cost`."""
        return sampler_cost(self.network, batch_size=batch_size, **options)

    def labels(self, labels: Any, num: int) -> np.ndarray | None:
        """int32 [num] from numbers or class names, repeated in turn; None stays None."""
        if labels is None:
            return None
        given = [labels] if isinstance(labels, str) or np.ndim(labels) == 0 else list(labels)
        if not given:
            raise ValueError("labels are empty: name one class or several, or leave labels out")
        num = whole(num, "num", 1)
        if self.captioned:
            text = self.network.net.config.text
            rows = np.asarray(given if np.ndim(labels) == 2 else tokenise(text, [*map(str, given)]))
            return rows[np.arange(num) % len(rows)]
        return np.resize(np.asarray([self._label(label) for label in given], np.int32), num)

    def _label(self, label: Any) -> int:
        text = str(label).strip()
        if isinstance(label, str) and text in self.class_names:
            number = self.class_names.index(text)
            if _is_number(text) and int(text) != number:
                logging.warning("class %s is taken by its name: its number is %d", text, number)
            return number
        if _is_number(text):
            return whole(int(text), "label", high=2**31 - 1)
        known = ", ".join(f"{i} {name}" for i, name in enumerate(self.class_names)) or "none"
        raise ValueError(f"{text!r} is no class: give a number or a name; the classes are {known}")

    def _rows(self, x: np.ndarray, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        """(x as float32 [n, h, w, c] of the network's shape, int32 [n] classes)."""
        x = np.asarray(x, np.float32)
        if x.shape[1:] != self.network.shape or not len(x):
            raise ValueError(f"the shape is {x.shape}: give [n, *{self.network.shape}] with n > 0")
        if np.ndim(labels) and len(labels) not in (1, len(x)):
            raise ValueError(f"{len(labels)} labels for {len(x)} images: give one for each")
        none = "" if self.captioned else 0
        found = self.labels(none if labels is None else labels, len(x))
        check_labels(found, self.network.num_classes)
        return check_finite(x, "inputs", fix="give finite numbers"), found

    def _solve(self, direction: str, x: np.ndarray, labels: Any, options: dict) -> np.ndarray:
        return inverter(self.network, direction=direction, **options)(*self._rows(x, labels))

    def _needs_ode(self, what: str) -> None:
        if isinstance(self.network, Generator):
            raise ValueError(
                f"{self.network.workdir} holds a one-step generator, which has no ODE to {what}: "
                "load the work directory of its teacher, a pretrain run"
            )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def load(
    workdir: str | pathlib.Path, *, ema: bool = True, step: int | None = None, dtype: str = ""
) -> Model:
    """The model of a work directory: a pretrain, distill or grow run, or a set of experts; or of a
    folder of diffusers: Stable Diffusion (also as a single file) or an unconditional U-Net.

    ema: load the averaged weights instead of the raw ones. step: the checkpoint's training step, by
    default the newest. dtype: compute in this precision instead of the one trained in; a folder of
    diffusers keeps its weights in it too.
    """
    if not isinstance(workdir, str | os.PathLike):
        raise ValueError(f"{workdir!r} is no folder: give the work directory of a run")
    place = os.path.expanduser(workdir)
    for known, read in ((is_unconditional, read_unconditional), (is_pipeline, read_pipeline)):
        if known(place):
            if step is not None:
                raise ValueError(f"{place} has no checkpoint of step {step}: leave the step out")
            return Model(read(place, dtype=dtype))
    return Model(teacher.load(place, ema=ema, step=step).in_precision(dtype))
