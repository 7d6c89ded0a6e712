"""Self-cascade (Guo et al. 2024, arXiv 2402.10491): a frozen teacher at sizes beyond its training.

`self_cascade` is Algorithm 2. `cascade` draws images with it in one call; `make_cascade` makes the
samplers for several draws. A method is defined by its denoiser at each scale,

    denoiser(model, pivot, label, grid) -> segments, [(D(x, sigma), levels)],

which is called once per scale, outside the loop over steps: everything that depends only on the
pivot is computed once. At scale 0 and in direct sampling the pivot is None.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cheapscale.cascade.baselines import baseline_denoiser, num_windows
from cheapscale.cascade.pivot import resize, scale_noise
from cheapscale.cascade.plan import (
    CascadePlan,
    Size,
    cascade_plan,
    in_latents,
    named,
    network_calls,
    schedule_shift,
)
from cheapscale.cascade.tuned import Tuned, load_tuned, tuned_denoisers
from cheapscale.data.numbers import consecutive, image_ids, whole
from cheapscale.data.pixels import check_finite, from_uint8, pictures
from cheapscale.diffusion.noise import decibels
from cheapscale.diffusion.samplers import Segment, solve
from cheapscale.teacher.codec import enter, factor_of, leave
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.sampling import check_guidance, check_labels, labels_for
from cheapscale.teacher.teacher import Teacher
from cheapscale.training.mesh import in_batches

StageDenoiser = Callable[[Any, jax.Array | None, jax.Array, np.ndarray], Sequence[Segment]]
Noise = Callable[[int, jax.Array], jax.Array]  # (scale, ids [b]) -> unit noise [b, H, W, c]
EXPERT_RULES = ("level", "snr")


def self_cascade(
    model: Any,
    ids: jax.Array,
    label: jax.Array,
    pivots: jax.Array | None = None,
    *,
    plan: CascadePlan,
    denoisers: Sequence[StageDenoiser],
    noise: Noise,
    method: str = "heun",
    kernel: str = "bilinear",
) -> list[jax.Array]:
    """[z0 of scale 0, ..., z0 of scale R] by Algorithm 2, a pure function of model and arrays.

    Args:
        model: the pytree that is passed to the denoisers. ids, label: [b]. pivots: [b, h, w, c],
            images that take the place of scale 0. denoisers: one for each scale.
    """
    z0 = pivots
    if z0 is None:  # a full run of the sampler at the trained size
        z = float(plan.start * plan.grid[0]) * noise(0, ids)
        z0 = solve(denoisers[0](model, None, label, plan.grid), z, method=method)
    scales = [z0]
    for r, grid in enumerate(plan.restarts, 1):
        pivot, z0 = z0, resize(z0, plan.sizes[r], kernel)  # U_r z0
        if len(grid) > 1:  # else K = 0
            sigma_K = float(grid[0])
            z = z0 + sigma_K * noise(r, ids)  # Eq. 6: q(z_K | U_r z0) stands in for q(z_K | z0)
            z0 = solve(denoisers[r](model, pivot, label, grid), z, method=method)  # K ... 0
        scales.append(z0)
    return scales


def tuning_free(
    model: Teacher | Experts,
    pivot: jax.Array | None,
    label: jax.Array,
    grid: np.ndarray,
    *,
    cfg_scale: float = 1.0,
    expert_shift: float = 1.0,
) -> Sequence[Segment]:
    """The denoiser of the tuning-free cascade: the teacher, which does not read the pivot."""
    del pivot
    return model.segments(label, grid, cfg_scale=cfg_scale, expert_shift=expert_shift)


class CascadeSamples(NamedTuple):
    """scales: float32 images [n, h, w, 3] in [-1, 1] of every scale, scale 0 first, decoded if the
    teacher draws latents. labels: [n]."""

    scales: list[np.ndarray]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cascade:
    """The samplers of one plan; `draw` and `direct` each compile at their first use.

    model: passed to the denoisers; a teacher, a set of experts, or `tuned.Beside`.
    denoisers: one for each scale. cfg_scale: the guidance of the denoisers. method: "heun" or
    "euler". kernel: see `pivot.resize`. coupled: the block means of each stage's noise are the
    noise of the previous scale, see `pivot.coupled_noise`.
    """

    model: Any
    plan: CascadePlan
    denoisers: Sequence[StageDenoiser]
    direct_denoiser: StageDenoiser
    seed: int = 0
    batch_size: int = 64
    method: str = "heun"
    cfg_scale: float = 1.0
    kernel: str = "bilinear"
    coupled: bool = False

    def __post_init__(self):
        check_guidance(self.teacher, self.cfg_scale)
        whole(self.seed, "seed")
        whole(self.batch_size, "batch_size", 1)

    @property
    def teacher(self) -> Teacher | Experts:
        return getattr(self.model, "teacher", self.model)

    def draw(
        self,
        ids: np.ndarray,
        labels: np.ndarray | None = None,
        pivots: np.ndarray | None = None,
        *,
        model: Any = None,
    ) -> CascadeSamples:
        """The images numbered `ids` at every scale; `model`: other weights of the same model."""
        ids, labels = self.rows(ids, labels)
        meta = self.teacher.meta
        images = [] if pivots is None else [enter(meta, np.asarray(pivots, np.float32))]
        shape = (len(ids), *self.plan.sizes[0], self.teacher.shape[-1])
        found, wanted = [x.shape for x in images], [shape] if self.plan.given else []
        if found != wanted:
            raise ValueError(
                f"plan and ids ask for pivots of the shapes {wanted}, but {found} are given: "
                "make the plan with the pivots' size, or without one to sample them"
            )
        model = self.model if model is None else model
        scales = in_batches(self._draw, model, ids, labels, *images, batch_size=self.batch_size)
        for z0, size in zip(scales, self.plan.sizes):
            check_finite(z0, f"samples of {named(size)} px", ids)
        return CascadeSamples([leave(meta, z0) for z0 in scales], labels)

    def direct(
        self, ids: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(images, labels) of the paper's baseline: a full run at the last size, from the noise of
        the last stage, so that images can be compared in pairs."""
        rows = self.rows(ids, labels)
        (images,) = in_batches(self._direct, self.model, *rows, batch_size=self.batch_size)
        return leave(self.teacher.meta, check_finite(images, "samples", rows[0])), rows[1]

    @property
    def nfe(self) -> tuple[int, ...]:
        """Network calls for one image at each scale."""
        return network_calls(self.plan, method=self.method, cfg_scale=self.cfg_scale)[0]

    def summary(self) -> dict:
        """Sizes, restart levels and network calls as plain values."""
        sigmas = [float(grid[0]) for grid in self.plan.restarts]
        nfe, direct = network_calls(self.plan, method=self.method, cfg_scale=self.cfg_scale)
        return {
            "sizes": [named(size) for size in self.plan.sizes],
            "restart_sigmas": sigmas,
            "restart_decibels": [float(decibels(sigma)) if sigma else None for sigma in sigmas],
            "nfe": list(nfe),
            "nfe_direct": direct,
        }

    def rows(self, ids: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, their classes), checked; classes that are None are drawn."""
        ids, classes = image_ids(ids), self.teacher.num_classes
        if labels is None and self.plan.given and classes:
            raise ValueError(
                f"the teacher has {classes} classes, but the pivots have no labels: "
                "say which class each of them is (--labels)"
            )
        labels = np.asarray(labels_for(self.seed, ids, classes) if labels is None else labels, "i4")
        check_labels(labels, classes)
        return ids, labels

    # One function object each, so that it is compiled once.
    @functools.cached_property
    def _draw(self) -> Callable:
        return functools.partial(
            self_cascade, plan=self.plan, denoisers=self.denoisers, noise=self._noise,
            method=self.method, kernel=self.kernel,
        )  # fmt: skip

    @functools.cached_property
    def _direct(self) -> Callable:  # a cascade of one scale, with the noise of the last stage
        last = len(self.plan.restarts)
        alone = self.plan._replace(sizes=self.plan.sizes[last:], grid=self.plan.direct, restarts=())
        return functools.partial(
            self_cascade, plan=alone, denoisers=[self.direct_denoiser], method=self.method,
            noise=lambda _, ids: self._noise(last, ids),
        )  # fmt: skip

    def _noise(self, r: int, ids: jax.Array) -> jax.Array:
        channels = self.teacher.shape[-1]
        return scale_noise(
            r, ids, seed=self.seed, sizes=self.plan.sizes, channels=channels, coupled=self.coupled
        )


def cascade(
    model: Teacher | Experts,
    sizes: str,
    *,
    num: int = 16,
    start: int = 0,
    labels: np.ndarray | None = None,
    pivots: np.ndarray | None = None,
    **options: Any,
) -> CascadeSamples:
    """(images of every scale, labels): `num` images at the sizes "2x,4x", or up to "64x96", see
    `plan.read_sizes`. ValueError before anything compiles where something does not fit.

    Args:
        start: number of the first image; image i depends only on (seed, i).
        labels: int [num] classes; drawn uniformly by default.
        pivots: [num, h, w, c], uint8 or floats in [-1, 1]: images to enlarge instead of the model's
            samples; a conditional model needs their labels.
        options: of `make_cascade`: k, seed, steps, method, cfg_scale, tuned, baseline, ...
    """
    size = None
    if pivots is not None:
        pivots = pictures(pivots, "pivots")
        pivots = from_uint8(pivots) if pivots.dtype == np.uint8 else pivots
        size = pivots.shape[1:3]
    ids = consecutive(start, num, model.shape)
    chosen = make_cascade(model, sizes, pivot_size=size, **options)
    return chosen.draw(ids, labels, pivots)


def make_cascade(
    model: Teacher | Experts,
    sizes: str,
    *,
    k: str | Sequence[str] = "t0.7",
    steps: int = 40,
    spacing: str = "karras",
    pivot_size: Size | None = None,
    tuned: Sequence[str | Tuned | None] = (),
    baseline: str = "",
    expert_rule: str = "level",
    cfg_scale: float = 1.0,
    **options: Any,
) -> Cascade:
    """The samplers of a tuning-free or tuned cascade, or of a baseline on every larger canvas.

    Args:
        k, steps, spacing: of `cascade_plan`. pivot_size: of the images that `draw` gets as scale 0.
        tuned: work directories of cascade runs, or runs loaded by `load_tuned`: one for all stages,
            or one for each.
        baseline: a name in `baselines.BASELINES`; "" is self-cascade.
        expert_rule: how an expert is chosen for a step at a larger size: by the noise "level" or by
            the "snr" of the block means of pixels, see `plan.schedule_shift`.
        options: of `Cascade`: seed, method, batch_size, kernel, coupled.
    """
    if tuned and baseline:
        raise ValueError(
            f"tuned weights and the baseline {baseline!r} are two methods for the same canvas: "
            "give one of them"
        )
    f = factor_of(model.meta)  # pixels of one latent
    sizes = in_latents(sizes, f)
    pivot_size = (pivot_size[0] // f, pivot_size[1] // f) if pivot_size else None
    plan = cascade_plan(
        model, sizes, k=k, steps=steps, spacing=spacing, pivot_size=pivot_size,
        shifted=baseline == "shifted",
    )  # fmt: skip
    larger, options = plan.sizes[1:], options | {"cfg_scale": cfg_scale}
    if isinstance(model, Experts) and expert_rule == "level":
        for grid in (plan.grid, *plan.restarts):
            if len(grid) > 1:
                model.check_levels(grid, options.get("method", "heun"))
    if tuned:
        runs = [load_tuned(run, model) if isinstance(run, str) else run for run in tuned]
        beside, denoisers, direct = tuned_denoisers(model, runs, plan, cfg_scale)
        return Cascade(beside, plan, denoisers, direct, **options)
    if baseline:
        denoisers = [baseline_denoiser(baseline, model, size, cfg_scale) for size in larger]
        denoisers.insert(0, functools.partial(tuning_free, cfg_scale=cfg_scale))
        if baseline == "windows":
            calls = (num_windows(size, model.resolution) for size in larger)
            plan = plan._replace(calls=(1, *calls))
    else:
        by_snr = expert_rule == "snr"
        shifts = [schedule_shift(model, size) if by_snr else 1.0 for size in plan.sizes]
        denoisers = [
            functools.partial(tuning_free, cfg_scale=cfg_scale, expert_shift=shift)
            for shift in shifts
        ]
    return Cascade(model, plan, denoisers, denoisers[-1], **options)
