"""From a raw network F to a denoiser D(x; sigma): two noise processes, and the loss that trains D.

    F(x_in, c_noise, **cond)   raw network: x_in [b, h, w, c] of about unit scale, c_noise [b]
    D(x, sigma, **cond)        denoiser: x = x0 + sigma eps at EDM's scale, sigma scalar or [b];
                               returns its estimate of x0 in x's shape and dtype

`EDM` and `VP` hold plain numbers, so they can be compared, hashed and stored in a checkpoint. Both
offer the same methods, so other code does not need to know which of the two it has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from cheapscale.diffusion.noise import (
    SPACINGS,
    VPSchedule,
    karras_grid,
    noise_feature,
    over_pixels,
    vp_schedule,
)

Denoiser = Callable[..., jax.Array]
Network = Callable[..., jax.Array]

EDM_NODES = 40  # PaGoDA inverts on 40 nodes (arXiv 2405.14822, section 5.1)


class Preconditioning(NamedTuple):
    c_skip: Any
    c_out: Any
    c_in: Any


def preconditioning(sigma: Any, sigma_data: float) -> Preconditioning:
    """EDM's coefficients at `sigma`, elementwise (Karras et al. 2022, Table 1)."""
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total, c_out=sigma * sigma_data / total**0.5, c_in=1 / total**0.5
    )


class _OneStepAndGrids:
    """Methods that both processes share: PaGoDA's one-step generator and its inversion grid."""

    sigma_min: float
    sigma_max: float
    rho: float
    inputs: Callable[..., tuple[jax.Array, jax.Array]]

    def one_step(self, F: Network, z: jax.Array, *, feature: str = "", **cond: Any) -> jax.Array:
        """PaGoDA's generator G(z) = F(c_in z, c_noise(sigma_max)): images of z [b, ...] at scale
        sigma_max (Kim et al. 2024, arXiv 2405.14822, section 3.2).

        G is the raw network F at the highest noise level; the published code applies neither c_skip
        nor c_out. Since c_out(80) = 0.49999 for sigma_data = 0.5, a freshly copied teacher returns
        about twice its denoised mean.
        """
        return F(*self.inputs(z, self.sigma_max, feature), **cond)

    def inversion_grid(self, nodes: int, level: float = 0.0) -> np.ndarray:
        """float64 [nodes]: Karras levels, ascending from where inversion starts: the higher one of
        sigma_min and `level`."""
        first = max(level, self.sigma_min)
        return karras_grid(nodes, first, self.sigma_max, self.rho)[::-1].copy()


@dataclasses.dataclass(frozen=True)
class EDM(_OneStepAndGrids):
    """EDM's noise process (Karras et al. 2022, arXiv 2206.00364) with PaGoDA's range of sigma."""

    process: str = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < np.inf:
            raise ValueError(
                f"diffusion.sigma_min {self.sigma_min} and sigma_max {self.sigma_max}: need "
                "0 < sigma_min < sigma_max, as 0.002 and 80"
            )

    def denoise(
        self,
        F: Network,
        x: jax.Array,
        sigma: Any,
        *,
        feature: str = "edm",
        noise_shift: float = 1.0,
        **cond: Any,
    ) -> jax.Array:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, Eq. 7).

        Args:
            x: [b, ...] at EDM's scale. sigma: scalar or [b].
            feature: the kind of c_noise that F was built for, see `noise.noise_feature`.
            noise_shift: F is conditioned on sigma / noise_shift, while c_skip, c_out and c_in
                follow sigma. Larger canvases use it to shift the schedule (MegaFusion, arXiv
                2408.11001).
        """
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        # c_in gives F an input, and c_out a target, of unit variance at every sigma.
        c_skip, c_out, c_in = (over_pixels(c, x) for c in preconditioning(sigma, self.sigma_data))
        c_noise = noise_feature(feature, sigma / noise_shift)
        return c_skip * x + c_out * F(c_in * x, c_noise, **cond)

    def inputs(self, x: jax.Array, sigma: Any, feature: str) -> tuple[jax.Array, jax.Array]:
        """(c_in x, c_noise [b]): the inputs of F inside `denoise`."""
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        c_in = preconditioning(sigma, self.sigma_data).c_in
        return over_pixels(c_in, x) * x, noise_feature(feature, sigma)

    def weight(self, sigma: Any) -> Any:
        """The weight of the squared error at `sigma`: 1 / c_out^2 (Karras et al. 2022, Table 1)."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def draw_sigma(
        self,
        key: jax.Array,
        n: int,
        low: float = 0.0,
        high: float = np.inf,
        antithetic: bool = False,
    ) -> jax.Array:
        """[n] training levels: ln sigma ~ N(P_mean, P_std^2), restricted to low < sigma <= high.

        antithetic: the second half of the draws mirrors the first, at opposite quantiles.
        """
        check_interval(low, high)
        with np.errstate(divide="ignore"):  # low = 0 gives the quantile's end a = -inf
            a, b = (np.log([low, high]) - self.P_mean) / self.P_std
        # Invert the distribution function from the nearer tail: near 1 float32 has too few values.
        side = -1.0 if -a < b else 1.0
        a, b = map(float, ndtr(np.sort([side * a, side * b])))
        quantile = a + (b - a) * _uniform(key, n, antithetic)
        return jnp.exp(self.P_mean + side * self.P_std * jax.scipy.special.ndtri(quantile))

    def grid(self, steps: int, spacing: str = "karras") -> np.ndarray:
        """float64 [steps + 1]: `steps` Karras levels, descending, and a final 0."""
        if spacing != "karras":
            raise ValueError(
                f"{spacing!r} names times of a VP schedule, but this model's process is edm: use "
                "the spacing 'karras'"
            )
        return np.append(karras_grid(steps, self.sigma_min, self.sigma_max, self.rho), 0.0)

    def start(self, grid: np.ndarray, spacing: str) -> float:
        """The deviation of the noise from which sampling along a grid starts."""
        return float(grid[0])

    def levels(self) -> np.ndarray:
        """float64 [40], ascending: the levels that step-adaptive training divides into groups."""
        return self.inversion_grid(EDM_NODES)


@dataclasses.dataclass(frozen=True)
class VP(_OneStepAndGrids):
    """A variance-preserving process: the network reads x_vp = alpha x and a time, D as in EDM.

    betas, zero_snr: of `noise.vp_schedule`. spacing, offset, end: the grid "own" of the model's
    published sampler, see `VPSchedule.grid`.
    """

    process: str = "linear"
    prediction: str = "eps"
    sigma_min: float = 0.02
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    num_steps: int = 1000
    betas: tuple[float, ...] = ()
    zero_snr: bool = False
    spacing: str = "leading"
    offset: int = 1
    end: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))  # a list after JSON
        if self.prediction not in ("eps", "x0", "v"):
            raise ValueError(f"unknown prediction {self.prediction!r}: choose 'eps', 'x0' or 'v'")
        table = self.schedule.sigmas
        if not table[0] <= self.sigma_min < self.sigma_max <= table[-1]:
            raise ValueError(
                f"diffusion.sigma_min {self.sigma_min} and sigma_max {self.sigma_max} leave the "
                f"{self.process} schedule, whose sigmas run from {table[0]:.7g} to "
                f"{table[-1]:.7g}: set them inside it, as 0.02 and 80"
            )

    @property
    def schedule(self) -> VPSchedule:
        """The process's table."""
        return vp_schedule(self.process, self.num_steps, self.betas, self.zero_snr)

    def denoise(
        self,
        F: Network,
        x: jax.Array,
        sigma: Any,
        *,
        feature: str = "time",
        noise_shift: float = 1.0,
        **cond: Any,
    ) -> jax.Array:
        """D(x; sigma) of a network that predicts eps, x0 or v (Salimans & Ho 2022).

        F receives the (fractional) time of sigma / noise_shift. `feature` has no effect; it keeps
        the signature equal to that of `EDM.denoise`.
        """
        del feature
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        alpha = 1 / jnp.sqrt(1 + sigma**2)  # sqrt(alpha_bar) of the level
        time = self.schedule.time_of_sigma(sigma / noise_shift).astype(x.dtype)
        F_x = F(over_pixels(alpha, x) * x, time, **cond)
        # x0, eps and v are linear in one another given x_vp, so D needs no further network call.
        if self.prediction == "x0":
            return F_x
        if self.prediction == "eps":  # x = x0 + sigma eps
            return x - over_pixels(sigma, x) * F_x
        # v = alpha eps - sqrt(1 - alpha^2) x0, in terms of x = x_vp / alpha
        return over_pixels(alpha**2, x) * x - over_pixels(alpha * sigma, x) * F_x

    def inputs(self, x: jax.Array, sigma: Any, feature: str) -> tuple[jax.Array, jax.Array]:
        """(alpha x, time [b]): the inputs of F inside `denoise`."""
        del feature
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        alpha = 1 / jnp.sqrt(1 + sigma**2)
        return over_pixels(alpha, x) * x, self.schedule.time_of_sigma(sigma).astype(x.dtype)

    def weight(self, sigma: Any) -> Any:
        """1 / sigma^2, which makes the loss DDPM's mean (eps_hat - eps)^2 (Ho et al., Eq. 14)."""
        return 1 / sigma**2

    def draw_sigma(
        self,
        key: jax.Array,
        n: int,
        low: float = 0.0,
        high: float = np.inf,
        antithetic: bool = False,
    ) -> jax.Array:
        """[n] training levels: times uniform over the table's entries with low < sigma <= high.

        antithetic: the second half of the draws mirrors the first, t' = first + last - t.
        """
        check_interval(low, high)
        table = self.schedule.sigmas
        # The tolerance keeps an interval end that is itself a table entry on the right side.
        inside = np.flatnonzero((table > low * (1 + 1e-9)) & (table <= high * (1 + 1e-9)))
        if not len(inside):
            raise ValueError(f"no sigma of the {self.process} schedule lies in ({low}, {high}]")
        t = inside[0] + jnp.floor(_uniform(key, n, antithetic) * len(inside)).astype(jnp.int32)
        return jnp.asarray(table, jnp.float32)[jnp.minimum(t, inside[-1])]

    def grid(self, steps: int, spacing: str = "karras") -> np.ndarray:
        """float64, descending, ending in 0: Karras levels from sigma_max, or times of the schedule,
        which start near the end of its table and ignore sigma_max (`VPSchedule.grid`)."""
        if spacing == "karras":
            return np.append(karras_grid(steps, self.sigma_min, self.sigma_max, self.rho), 0.0)
        if spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
        if spacing == "own":
            return self.schedule.grid(
                steps, spacing=self.spacing, offset=self.offset, end=self.end
            )  # fmt: skip
        return self.schedule.grid(steps, spacing=spacing)

    def start(self, grid: np.ndarray, spacing: str) -> float:
        """The deviation of the noise from which sampling along a grid starts; along the grid "own"
        x_vp = alpha x is unit noise, as in the published samplers."""
        return float(np.hypot(grid[0], 1.0) if spacing == "own" else grid[0])

    def levels(self) -> np.ndarray:
        """float64 [T], ascending: the sigmas of the table."""
        return self.schedule.sigmas


Process = EDM | VP


def process_from(fields: dict) -> Process:
    """The noise process of a config's or checkpoint's `diffusion` fields.

    Raises ValueError on an unknown process or prediction, or a range that the schedule lacks.
    """
    kind = EDM if fields["process"] == "edm" else VP
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in known})


def denoising_loss(
    D: Denoiser, process: Process, x: jax.Array, sigma: jax.Array, key: jax.Array
) -> jax.Array:
    """[b]: weight(sigma) * mean_pixels (D(x + sigma eps; sigma) - x)^2, eps ~ N(0, I).

    Karras et al. 2022, Eq. 8, with EDM's weight; Ho et al. 2020, Eq. 14, with VP's. x: clean images
    [b, h, w, c] in [-1, 1]. sigma: [b]. D has its conditions bound.
    """
    eps = jax.random.normal(key, x.shape, x.dtype)
    error = D(x + over_pixels(sigma, x) * eps, sigma) - x
    return process.weight(sigma) * jnp.mean(jnp.square(error), axis=tuple(range(1, x.ndim)))


def clipped(D: Denoiser) -> Denoiser:
    """The same denoiser with its estimate of x0 clamped to [-1, 1]."""
    return lambda x, sigma, **cond: jnp.clip(D(x, sigma, **cond), -1.0, 1.0)


def check_interval(low: float, high: float) -> None:
    """Refuse an interval of noise levels that is empty."""
    if not 0 <= low < high:
        raise ValueError(f"noise levels from {low} to {high}: the interval needs 0 <= low < high")


def _uniform(key: jax.Array, n: int, antithetic: bool) -> jax.Array:
    """[n] in (0, 1); antithetic: u and 1 - u in two halves."""
    # minval excludes 0, the quantile of an infinite ln sigma.
    if not antithetic:
        return jax.random.uniform(key, (n,), jnp.float32, minval=1e-7)
    u = jax.random.uniform(key, ((n + 1) // 2,), jnp.float32, minval=1e-7)
    return jnp.concatenate([u, 1 - u])[:n]
