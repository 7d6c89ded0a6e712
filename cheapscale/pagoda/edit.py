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
from cheapscale.data.resize import area_mean
from cheapscale.teacher.codec import codec_of, enter, leave
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.load import load
from cheapscale.teacher.sampling import inverter, prior
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.training.checkpoint import read_meta
from cheapscale.training.exported import PREFIX, model_file, pretrained, read_header
from cheapscale.training.mesh import in_batches, pinned

STEPS = 100  # of Adam
RATES = {"inversion": 0.02, "prior": 0.1}  # of Adam, by start
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
    """z = E(x_lo, c) [n, h, w, c] at scale sigma_max, for pictures x_lo in [-1, 1] of that size, or
    of a teacher of latents of the size that they decode to."""
    x = enter(teacher.meta, x)
    n_x = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    solve = inverter(teacher, nodes=how.nodes, level=how.level, clip=how.clip)
    return np.float32(how.scale) * solve(x + np.float32(how.noise) * n_x, label)


def decode(
    generator: Generator, z: np.ndarray, label: np.ndarray, omega: float = 1.0, batch_size: int = 16
) -> np.ndarray:
    """G(z, c, omega) in [-1, 1]. label: [n] classes, [n, num_classes] weights of their embeddings,
    or [n, l] tokens of captions. omega: the guidance scale, which an unguided G ignores."""
    rows = z, label, np.full(len(z), omega, np.float32)
    images = in_batches(type(generator).__call__, generator, *rows, batch_size=batch_size)
    return leave(generator.meta, check_finite(images))


class Observed(NamedTuple):
    """What is known of n pictures.

    y: [n, ...] = A(x). A: images [b, H, W, c] -> [b, ...]. x_lo: [n, h, w, c] of z's size, from
    which the inversion starts. hole: bool [h, w], which of its pixels are unknown and only filled.
    """

    y: np.ndarray
    A: Callable[[Any], Any]
    x_lo: np.ndarray
    hole: np.ndarray | None = None


def outside(x: np.ndarray, hole: np.ndarray, side: int, factor: int = 1) -> Observed:
    """The pixels of x [n, H, W, c] outside of the hole [H, W]. For the inversion, at `side` pixels,
    or latents of `factor` pixels, it is filled with the mean colour of the others."""
    rows, columns = np.nonzero(~hole)

    def A(x):
        return x[:, rows, columns]

    y = A(x)
    filled = np.where(hole[..., None], y.mean(axis=1)[:, None, None], x)
    hole_lo = area_mean(hole[..., None].astype(np.float32), side)[..., 0] > 0
    return Observed(y, A, area_mean(filled, factor * side), hole_lo)


def reduced(x_lo: np.ndarray) -> Observed:
    """The block means x_lo [n, h, w, c] of larger pictures."""
    return Observed(x_lo, lambda x: area_mean(x, x_lo.shape[1]), x_lo)


def whole(x: np.ndarray, x_lo: np.ndarray) -> Observed:
    """All of the pictures x [n, H, W, c], and the same ones at z's size."""
    return Observed(x, lambda x: x, x_lo)


@pinned()
def optimise(
    generator: Generator,
    y: np.ndarray,
    A: Callable[[Any], Any],
    c: np.ndarray,
    start: np.ndarray,
    *,
    steps: int = STEPS,
    rate: float = 0.02,
    penalty: float = 1e-3,
    omega: float = 1.0,
) -> np.ndarray:
    """z* = argmin_z ||y - A(G(z, c, omega))||^2 [n, h, w, c] with Adam, from every z in `start`.

    Args:
        y, A: as in `Observed`, and c the labels, for each start.
        rate: of Adam at the first step, for u = z / sigma_max; it falls along a cosine to 0.
        penalty: weight of (|u|^2 / d - 1)^2 beside the mean over the entries of y.
    """
    sigma_max, n = generator.process.sigma_max, len(start)
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))
    omegas = jnp.full(n, omega, jnp.float32)

    def objective(u, G, codec, c):
        x = G(sigma_max * u, c, omegas)
        x = codec.decode(x) if codec else x
        fit = jnp.square(A(x) - y).reshape(n, -1).mean(axis=1)
        radius = jnp.square(u).reshape(n, -1).mean(axis=1)  # |u|^2 / d
        return jnp.sum(fit + penalty * jnp.square(radius - 1)), fit

    @jax.jit
    def step(G, codec, c, u, moments):
        slope, fit = jax.grad(objective, has_aux=True)(u, G, codec, c)
        change, moments = adam.update(slope, moments)
        return optax.apply_updates(u, change), moments, fit

    u, c = jnp.asarray(start, jnp.float32) / sigma_max, generator.encode(jnp.asarray(c))
    codec = codec_of(generator.meta)
    moments = adam.init(u)
    # Not lax.fori_loop: XLA:CPU runs the convolutions of a loop's body nine times as slowly.
    for done in range(1, steps + 1):
        u, moments, fit = step(generator, codec, c, u, moments)
        if done % max(steps // LINES, 1) == 0:
            losses = " ".join(f"{v:.5f}" for v in fit[:8])
            logging.info("step %d/%d  loss %s", done, steps, losses)
    return check_finite(np.asarray(sigma_max * u), "optima", fix="give a lower --rate")


class Found(NamedTuple):
    """The noises of n pictures, the best of r first. z: [n, r, h, w, c] at scale sigma_max. images:
    G(z, c, omega) [n, r, H, W, c] in [-1, 1]. loss: ||y - A(G)||^2 for each entry of y, [n, r]."""

    z: np.ndarray
    images: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Search:
    """How the noise of pictures is found: by `method` "invert", or "optimise" from a `start`.

    start: "inversion", or "prior" alone. The inversion needs the teacher, and how it was used.
    tries: starts for each picture; Adam continues from the `restarts` best of them. omega: the
    guidance scale of G. The inversion is not guided, as G learnt from unguided latents.
    """

    generator: Generator
    method: str = "invert"
    start: str = "prior"
    teacher: Teacher | Experts | None = None
    inversion: Inversion = Inversion()
    tries: int = 16
    restarts: int = 2
    seed: int = 0
    omega: float = 1.0
    adam: dict = dataclasses.field(default_factory=dict)  # options of `optimise`

    @property
    def inverts(self) -> bool:
        """Whether the teacher is needed."""
        return self.method == "invert" or self.start == "inversion"

    def by(self, method: str, start: str) -> "Search":
        """The same search by another method, from another start."""
        return dataclasses.replace(self, method=method, start=start)

    def __call__(self, seen: Observed, c: np.ndarray) -> Found:
        """The noises of n pictures with the labels c [n] or, of captions, [n, l]."""
        G, n, z = self.generator, len(seen.y), None
        if self.inverts:
            z = encode(self.teacher, seen.x_lo, c, self.inversion, self.seed)[:, None]
        if self.method == "optimise":
            if z is None or seen.hole is not None:
                ids = np.arange(n * self.tries)
                drawn = np.asarray(prior(self.seed, ids, G.shape, G.process.sigma_max))
                drawn = drawn.reshape(n, self.tries, *G.shape)
                z = drawn if z is None else np.where(seen.hole[..., None], drawn, z)
            z = self.ranked(seen, c, z).z[:, : self.restarts]
            r, options = z.shape[1], {"rate": RATES[self.start], "omega": self.omega} | self.adam
            y, labels = (np.repeat(rows, r, axis=0) for rows in (seen.y, c))
            z = optimise(G, y, seen.A, labels, z.reshape(-1, *G.shape), **options).reshape(z.shape)
        return self.ranked(seen, c, z)

    def ranked(self, seen: Observed, c: np.ndarray, z: np.ndarray) -> Found:
        """What noises z [n, r, h, w, c] show, those of each picture in the order of their loss."""
        n, r = z.shape[:2]
        y, labels = (np.repeat(rows, r, axis=0) for rows in (seen.y, c))
        images = decode(self.generator, z.reshape(n * r, *z.shape[2:]), labels, self.omega)
        loss = np.square(np.asarray(seen.A(images)) - y).reshape(n, r, -1).mean(axis=2)
        order = np.arange(n)[:, None], np.argsort(loss, axis=1)
        return Found(z[order], images.reshape(n, r, *images.shape[1:])[order], loss[order])


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
