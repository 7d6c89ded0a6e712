"""Noise levels: grids of sigma, VP schedules, and the units that noise is measured in.

All code outside this file measures noise by EDM's sigma: a noisy image is x = x0 + sigma * eps.
Other units are converted here.

    sigma       EDM noise level; the data keep their own scale
    alpha_bar   VP schedules: x_vp = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    t           time of a VP network: index 0 .. T-1 into the alpha_bar table, fractional in between
                (papers that count steps 1 .. T call index t "step t + 1")

    (1)  sigma_i = (smax^(1/rho) + i/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho,
         Karras et al. 2022 (arXiv 2206.00364), Eq. 5
    (2)  sigma(t) = sqrt((1 - alpha_bar_t) / alpha_bar_t),  alpha = 1 / sqrt(1 + sigma^2)
    (3)  x_vp = alpha x
    (4)  SNR = alpha_bar / (1 - alpha_bar) = 1 / sigma^2;  in decibels -20 log10 sigma

Grids and tables are float64 NumPy arrays made on the host, and constants of a compiled program.
They are rounded to float32 only where the solver uses them: earlier rounding changes what inversion
returns. Functions of sigma or t take NumPy values or (traced) JAX arrays and return the same kind.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The released consistency-model code computes ln(sigma + 1e-44); this is its value at sigma = 0.
_LOG_SIGMA_ZERO = math.log(1e-44)

NOISE_FEATURES = ("openai", "edm")
SPACINGS = ("karras", "leading", "trailing", "linspace", "quadratic", "own")
# alpha_bar in place of 0, or less: a schedule of zero terminal SNR then ends at sigma = 4096.
ZERO_SNR = 2.0**-24
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # ends, of 1000 steps


def karras_grid(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """n levels from sigma_max down to sigma_min, equation (1). Returns float64 [n]."""
    if n < 2:
        raise ValueError(f"a sigma grid has a start and an end: n must be at least 2, got {n}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    ramp = np.linspace(0.0, 1.0, n)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    grid = (start + ramp * (end - start)) ** rho
    grid[0], grid[-1] = sigma_max, sigma_min  # the powers miss the ends by an ulp or two
    return grid


def decibels(sigma: Any) -> Any:
    """SNR in decibels, -20 log10 sigma, equation (4): 0 dB at sigma = 1."""
    return -20.0 * _numpy_of(sigma).log10(sigma)


def noise_feature(kind: str, sigma: Any) -> Any:
    """c_noise, the input of a network's noise embedding, in the shape of `sigma`.

    kind: "openai" gives 250 ln sigma, "edm" ln(sigma) / 4. sigma = 0 counts as 1e-44.
    """
    xp = _numpy_of(sigma)
    sigma = xp.asarray(sigma)
    # Both `where`: without the inner one, the gradient at sigma = 0 would be NaN.
    positive = sigma > 0
    log_sigma = xp.where(positive, xp.log(xp.where(positive, sigma, 1)), _LOG_SIGMA_ZERO)
    if kind == "openai":
        return 250.0 * log_sigma
    if kind == "edm":
        return log_sigma / 4.0
    raise ValueError(f"unknown noise feature {kind!r}: choose one of {NOISE_FEATURES}")


def over_pixels(value: Any, x: jax.Array) -> jax.Array:
    """A scalar or [b] value in x's dtype, shaped [b, 1, ..., 1] to multiply x of shape [b, ...]."""
    value = jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape[:1])
    return value.reshape(x.shape[:1] + (1,) * (x.ndim - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class VPSchedule:
    """A discrete variance-preserving schedule: its alpha_bar table, float64 [T], decreasing."""

    name: str
    alpha_bar: np.ndarray

    def __post_init__(self):
        table = np.asarray(self.alpha_bar, np.float64)
        if table.ndim != 1 or len(table) < 2 or not np.all(np.diff(table) < 0):
            raise ValueError(f"alpha_bar of {self.name!r} must be a decreasing 1-D table")
        if not (table[-1] > 0 and table[0] < 1):
            raise ValueError(
                f"alpha_bar of {self.name!r} must lie strictly between 0 and 1, got "
                f"[{table[-1]}, {table[0]}]: a zero-SNR end has no finite sigma"
            )
        object.__setattr__(self, "alpha_bar", table)

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return len(self.alpha_bar)

    @property
    def sigmas(self) -> np.ndarray:
        """Equation (2) on the table: float64 [T], increasing."""
        return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    def sigma(self, t: Any) -> Any:
        """Noise level at time t; ln sigma is interpolated linearly between table entries."""
        xp = _numpy_of(t)
        times = np.arange(self.num_steps, dtype=np.float64)
        return xp.exp(_interp(t, times, np.log(self.sigmas)))

    def time_of_sigma(self, sigma: Any) -> Any:
        """Inverse of `sigma`; levels outside the table give its first or last time."""
        xp = _numpy_of(sigma)
        sigma = xp.maximum(sigma, self.sigmas[0])  # keeps sigma = 0 out of the logarithm
        times = np.arange(self.num_steps, dtype=np.float64)
        return _interp(xp.log(sigma), np.log(self.sigmas), times)

    def grid(
        self,
        n: int,
        *,
        spacing: str = "leading",
        offset: int = 1,
        last: int | None = None,
        end: float = 0.0,
    ) -> np.ndarray:
        """The sigma levels of an n-step DDIM run, descending, then `end`: float64 [<= n + 1].

        Args:
            spacing: "leading" takes times k (T // n) + offset, as latent diffusion's samplers do;
                "trailing" takes T - 1, T - T/n - 1, ...; "linspace" takes n evenly spaced numbers
                from T - 1 to 0, rounded; "quadratic" takes the squares of n evenly spaced numbers
                up to sqrt(0.8 T), as DDIM does for CIFAR-10, and drops repeats.
            last: keep only times <= last, the tail of the same grid. A self-cascade restarts from
                step K (index K - 1) on this tail, not on a denser grid.
        """
        T = self.num_steps
        if not 1 <= n <= T:
            raise ValueError(f"{n} sampler steps do not fit the {T} steps of {self.name!r}")
        if spacing == "leading":
            times = np.minimum(np.arange(n)[::-1] * (T // n) + offset, T - 1)
        elif spacing == "trailing":
            times = np.round(T - np.arange(n) * (T / n)).astype(int) - 1
        elif spacing == "linspace":
            times = np.unique(np.round(np.linspace(0, T - 1, n)).astype(int))[::-1]
        elif spacing == "quadratic":
            times = np.unique((np.linspace(0, math.sqrt(0.8 * T), n) ** 2).astype(int))[::-1]
        else:
            raise ValueError(f"unknown spacing {spacing!r}: choose one of {SPACINGS[1:-1]}")
        if last is not None:
            times = times[times <= last]
            if not len(times):
                raise ValueError(f"no time of the {n}-step grid lies at or below {last}")
        levels = self.sigmas[times]
        return np.append(levels[levels > end], end)


@functools.lru_cache
def vp_schedule(
    name: str, num_steps: int = 1000, betas: tuple[float, ...] = (), zero_snr: bool = False
) -> VPSchedule:
    """The named schedule's table.

    linear         beta from 1e-4 to 0.02 (DDPM, Ho et al. 2020, scaled to num_steps)
    scaled_linear  sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012) (latent diffusion)
    cosine         Nichol & Dhariwal 2021, Eq. 17, beta capped at 0.999

    betas: other ends than those above. zero_snr: shift and stretch sqrt(alpha_bar) so that its last
    value is 0 (Lin et al. 2023, arXiv 2305.08891, Algorithm 1), for which ZERO_SNR stands.
    """
    if num_steps < 2:
        raise ValueError(f"a schedule needs at least 2 steps, got {num_steps}")
    ends = np.asarray(betas or beta_ends(name, num_steps))
    if name == "linear":
        beta = np.linspace(ends[0], ends[1], num_steps)
    elif name == "scaled_linear":
        beta = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, num_steps) ** 2
    elif name == "cosine":
        edges = np.cos((np.linspace(0, 1, num_steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    else:
        raise ValueError(
            f"unknown VP schedule {name!r}: choose 'linear', 'scaled_linear' or 'cosine'"
        )
    if beta[-1] >= 1:
        raise ValueError(f"{num_steps} steps are too few for {name!r}: its last beta reaches 1")
    alpha_bar = np.cumprod(1 - beta)
    if zero_snr:
        root = np.sqrt(alpha_bar)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alpha_bar = np.append(root[:-1] ** 2, min(ZERO_SNR, root[-2] ** 2 / 4))
    return VPSchedule(name, alpha_bar)


def beta_ends(name: str, num_steps: int) -> tuple[float, ...]:
    """The first and the last beta of a named schedule; () of one that is not made of betas."""
    return tuple(1000 / num_steps * beta for beta in BETAS.get(name, ()))


def _interp(x: Any, xs: np.ndarray, ys: np.ndarray) -> Any:
    """np.interp, also for JAX arrays."""
    # jnp.interp would put a bisection loop into every network call; the table is compared at once.
    if not isinstance(x, jax.Array):
        return np.interp(x, xs, ys)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    xs, ys = jnp.asarray(xs, x.dtype), jnp.asarray(ys, x.dtype)
    above = jnp.searchsorted(xs, x, side="right", method="compare_all")
    high = jnp.clip(above, 1, len(xs) - 1)
    low = high - 1
    inside = ys[low] + (x - xs[low]) / (xs[high] - xs[low]) * (ys[high] - ys[low])
    return jnp.where(x < xs[0], ys[0], jnp.where(x >= xs[-1], ys[-1], inside))


def _numpy_of(value: Any):
    # jnp for (traced) device arrays, float64 NumPy for everything computed on the host
    return jnp if isinstance(value, jax.Array) else np
