"""Controllable generation with a one-step generator G that is not trained any further (PaGoDA, Kim
et al. 2024, arXiv 2405.14822, "controllable generation" and Fig. 8).

    y = A(x)                                an observation of the picture x: A masks or averages
    z = E(x_lo, c)                          inversion: the teacher's ODE maps x_lo to its noise
    z* = argmin_z ||y - A(G(z, c))||^2      latent optimisation, with Adam
    G(z, c')                                the edited picture; c' = c except for class transfer

The paper inpaints by latent optimisation; it super-resolves, changes the class and interpolates by
inversion, and finds that inversion beats optimisation for super-resolution. It states no steps,
rate, start or regulariser. Ours: Adam moves u = z / sigma_max from several starts; its rate falls
along a cosine; (|u|^2 / d - 1)^2 keeps u near the sphere where the prior's noise lies. The latent
keeps the place of what it draws: a start that is E's noise where the picture is known, and the
prior's elsewhere, leads to the picture's own ground and colours, where one of the prior alone is
often stuck.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from cheapscale.data.pairs import PairStore
from cheapscale.data.pixels import check_finite
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.load import load
from cheapscale.teacher.sampling import inverter, one_step, prior
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.training.checkpoint import read_meta
from cheapscale.training.exported import PREFIX, model_file, pretrained, read_header
from cheapscale.training.mesh import in_batches, pinned

LINES = 10  # of the log, in one optimisation


class Inversion(NamedTuple):
    """How E made the latents from which a generator learnt: `invert.nodes`, the deviation of the
    noise that is added first and the level at which the ODE starts (both `invert.noise`),
    `invert.clip`, and a factor of z (`rescale_latents`)."""

    nodes: int = 40
    noise: float = 0.0
    level: float = 0.0
    clip: bool = False
    scale: float = 1.0


def inversion_of(generator: Generator) -> Inversion:
    """How the latents of a generator were made, from its checkpoint or from the store that its run
    read; ValueError if neither tells."""
    meta = generator.meta
    if "inversion" in meta:
        return Inversion(**meta["inversion"])
    config = meta.get("config", {})
    try:
        store = PairStore.open(config.get("latents", ""))
    except ValueError as error:
        raise ValueError(
            f"{generator.workdir} does not record how its latents were made, and {error}: put the "
            "folder back, or name another generator as --model"
        ) from error
    return Inversion(**store.inversion(config.get("rescale_latents", False)))


def teacher_of(generator: Generator, place: str = "") -> Teacher | Experts:
    """The teacher whose noise a generator maps to images, from `place` or, by default, from where
    the generator's runs found it or the package has it. ValueError for a model of other weights."""
    wanted = generator.meta.get("teacher")
    found = place or _recorded_teacher(generator.meta)
    fix = f"give --teacher=DIR, the pretrain run of weights {wanted}"
    if not found:
        raise ValueError(f"{generator.workdir} does not say where its teacher is: {fix}")
    model = load(found)
    weights = model.meta["experts"]["base"] if isinstance(model, Experts) else model.fingerprint
    if weights != wanted:
        raise ValueError(f"{found} is not the teacher of {generator.workdir}: {fix}")
    return model


def _recorded_teacher(meta: dict) -> str:
    """The work directory of a generator's teacher, or the shipped model that is it; else ""."""
    wanted, config = meta.get("teacher"), meta.get("config", {})
    try:
        while config.get("base"):  # a grown generator names the smaller one
            config = read_meta(config["base"])[1]["config"]
        if config.get("teacher") and read_meta(config["teacher"]):
            return config["teacher"]
    except (FileNotFoundError, ValueError):
        pass  # the runs were moved
    for name in pretrained():
        if read_header(model_file(PREFIX + name))[1]["exported"].get("from") == wanted:
            return PREFIX + name
    return ""


def encode(
    teacher: Teacher | Experts, x: np.ndarray, label: np.ndarray, how: Inversion, seed: int = 0
) -> np.ndarray:
    """z = E(x_lo, c) [n, h, w, c] at scale sigma_max, for x_lo [n, h, w, c] in [-1, 1]."""
    n_x = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    solve = inverter(teacher, nodes=how.nodes, level=how.level, clip=how.clip)
    return np.float32(how.scale) * solve(x + np.float32(how.noise) * n_x, label)


def decode(
    generator: Generator, z: np.ndarray, label: np.ndarray, batch_size: int = 16
) -> np.ndarray:
    """G(z, c) in [-1, 1]. label: [n] classes, [n, num_classes] weights of their embeddings, or
    [n, l] tokens of captions."""
    images = in_batches(one_step, generator, z, label, batch_size=batch_size)
    return np.clip(check_finite(images), -1.0, 1.0)


def repeated(row: np.ndarray, n: int) -> np.ndarray:
    """[n, ...]: one row n times."""
    return np.repeat(np.asarray(row)[None], n, axis=0)


@pinned()
def optimise(
    generator: Generator,
    y: np.ndarray,
    A: Callable[[Any], Any],
    c: np.ndarray,
    start: np.ndarray,
    *,
    steps: int = 300,
    rate: float = 0.02,
    penalty: float = 1e-3,
) -> np.ndarray:
    """z* = argmin_z ||y - A(G(z, c))||^2 [restarts, h, w, c] with Adam, from every z in `start`.

    Args:
        y: what is observed of one picture. A: images [b, H, W, c] -> [b, *y.shape].
        rate: of Adam at the first step, for u = z / sigma_max; it falls along a cosine to 0.
        penalty: weight of (|u|^2 / d - 1)^2 beside the mean over the entries of y.
    """
    sigma_max, restarts = generator.process.sigma_max, len(start)
    c = jnp.asarray(repeated(c, restarts))
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def objective(u, G):
        fit = jnp.square(A(G(sigma_max * u, c)) - y[None]).reshape(restarts, -1).mean(axis=1)
        radius = jnp.square(u).reshape(restarts, -1).mean(axis=1)  # |u|^2 / d
        return jnp.sum(fit + penalty * jnp.square(radius - 1)), fit

    @jax.jit
    def descend(G, u, moments, n):
        def step(_, carry):
            u, moments, _ = carry
            slope, fit = jax.grad(objective, has_aux=True)(u, G)
            change, moments = adam.update(slope, moments)
            return optax.apply_updates(u, change), moments, fit

        return jax.lax.fori_loop(0, n, step, (u, moments, jnp.zeros(restarts)))

    u = jnp.asarray(start, jnp.float32) / sigma_max
    moments, done = adam.init(u), 0
    while done < steps:
        n = min(-(-steps // LINES), steps - done)
        u, moments, fit = descend(generator, u, moments, n)
        done += n
        logging.info("step %d/%d  loss %s", done, steps, " ".join(f"{v:.5f}" for v in fit))
    return check_finite(np.asarray(sigma_max * u), "optima", fix="give a lower --rate")


class Found(NamedTuple):
    """The noise of a picture, the best of n first. z: [n, h, w, c] at scale sigma_max. images:
    G(z, c) [n, H, W, c] in [-1, 1]. loss: ||y - A(G(z, c))||^2 for each entry of y, [n]."""

    z: np.ndarray
    images: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Search:
    """How the noise of a picture is found: by `method` "invert", or "optimise" from a `start`.

    start: "inversion", or "prior" alone. The inversion needs the teacher, and how it was used.
    """

    generator: Generator
    method: str = "invert"
    start: str = "prior"
    teacher: Teacher | Experts | None = None
    inversion: Inversion = Inversion()
    restarts: int = 4
    seed: int = 0
    adam: dict = dataclasses.field(default_factory=dict)  # options of `optimise`

    @property
    def inverts(self) -> bool:
        """Whether the teacher is needed."""
        return self.method == "invert" or self.start == "inversion"

    def __call__(
        self,
        y: np.ndarray,
        A: Callable[[Any], Any],
        x_lo: np.ndarray,
        c: np.ndarray,
        hole: np.ndarray | None = None,
    ) -> Found:
        """The noise of the picture with the observation y = A(x), as `optimise` takes it.

        x_lo: [h, w, c] of z's size, for the inversion. hole: [h, w], which of its pixels are
        unknown and were only filled.
        """
        G, n = self.generator, self.restarts if self.method == "optimise" else 1
        z = np.asarray(prior(self.seed, np.arange(n), G.shape, G.process.sigma_max))
        if self.inverts:
            rows = repeated(x_lo, n), repeated(c, n)
            inverted = encode(self.teacher, *rows, self.inversion, self.seed)
            fresh = hole is not None and self.method == "optimise"
            z = np.where(hole[..., None], z, inverted) if fresh else inverted
        if self.method == "optimise":
            z = optimise(G, y, A, c, z, **self.adam)
        images = decode(G, z, repeated(c, n))
        loss = np.square(np.asarray(A(images)) - y).reshape(n, -1).mean(axis=1)
        order = np.argsort(loss)
        return Found(z[order], images[order], loss[order])


def slerp(z1: np.ndarray, z2: np.ndarray, a: np.ndarray) -> np.ndarray:
    """z(a) = [sin((1 - a) t) z1 + sin(a t) z2] / sin t [n, h, w, c], t the angle between z1 and z2.

    Noise in between has the norm of its ends, as the prior's noise has. a: [n] in [0, 1]. Equal
    directions are interpolated linearly; opposite ones have no shortest arc: ValueError.
    """
    z1, z2, a = np.asarray(z1, np.float64), np.asarray(z2, np.float64), np.asarray(a, np.float64)
    t = angle(z1, z2)
    if np.pi - t < 1e-6:
        raise ValueError("the two noises are opposite, so that no shortest arc joins them")
    weights = (np.sin((1 - a) * t), np.sin(a * t)) if t > 1e-6 else (1 - a, a)
    first, second = (w.reshape(-1, *[1] * z1.ndim) for w in weights)
    return ((first * z1 + second * z2) / (np.sin(t) if t > 1e-6 else 1)).astype(np.float32)


def angle(z1: np.ndarray, z2: np.ndarray) -> float:
    """The angle between two noises in radians, 0 ... pi; independent draws have about pi / 2."""
    cosine = np.vdot(z1, z2) / (np.linalg.norm(z1) * np.linalg.norm(z2))
    return float(np.arccos(np.clip(cosine, -1, 1)))
