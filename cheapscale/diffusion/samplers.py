"""Solvers of the probability-flow ODE, Euler (= DDIM) and Heun, in both directions; and DDPM's
ancestral sampler.

In EDM's variables the ODE is (Karras et al. 2022, arXiv 2206.00364, Eq. 1 and 3)

    dx / dsigma = d(x, sigma) = (x - D(x; sigma)) / sigma

A descending grid of sigmas samples; the same grid reversed inverts (PaGoDA, Kim et al. 2024, arXiv
2405.14822, section 3.2). Inversion starts with the clean image at sigma_min. Heun's method takes
two network calls per step, so 40 nodes cost 39 x 2 = 78 calls; section 5.1 counts 79, because the
published code makes one more call at sigma_max and discards the result.

Each sampler is one `lax.scan` over steps, and its body contains one network call: the network is
compiled once, and compiling the network is most of the cost of compiling a sampler.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.denoiser import Denoiser, clipped

METHODS = ("euler", "heun", "ancestral")

Segment = tuple[Denoiser, np.ndarray]  # D(x, sigma) with its conditions bound, and its levels


def euler(D: Denoiser, x: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """x at sigmas[0] -> x at sigmas[-1] by Euler's method.

    A step is DDIM's deterministic update (Song et al. 2021, arXiv 2010.02502, Eq. 13).
    """

    def step(x, row):
        s, _, h = row
        d = (x - D(x, s)) / s  # dx / dsigma at s
        return x + h * d, None

    return jax.lax.scan(step, x, _steps(sigmas, x.dtype))[0]


def heun(D: Denoiser, x: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """x at sigmas[0] -> x at sigmas[-1] by Heun's method (Karras et al. 2022, Algorithm 1)."""

    def step(x, row):
        s, t, h = row

        def slope(i, carry):
            d, total = carry
            y, sigma = x + i * h * d, jnp.where(i == 0, s, t)  # x at s, then the Euler point at t
            d = (y - D(y, sigma)) / sigma
            return d, total + d

        # A loop of two turns compiles the network once. At t = 0, d is undefined: an Euler step.
        slopes = jnp.where(t == 0, 1, 2)
        zero = jnp.zeros_like(x)
        _, total = jax.lax.fori_loop(0, slopes, slope, (zero, zero))
        return x + h * total / slopes, None  # along the mean slope

    return jax.lax.scan(step, x, _steps(sigmas, x.dtype))[0]


def ancestral(
    D: Denoiser, x: jax.Array, sigmas: np.ndarray, noise: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """x at sigmas[0] -> x at sigmas[-1] by draws from the posterior q(x_t | x_s, x_0 = D).

    The posterior between any two levels s > t has DDPM's mean and variance (Ho et al. 2020, Eq. 7),
    here in EDM's variables. noise(i): unit noise of x's shape for step i of these sigmas.
    """

    # x_t ~ N(x0 + (t / s)^2 (x_s - x0), t^2 (s^2 - t^2) / s^2); at t = 0 this is x0 itself.
    s, t = sigmas[:-1], sigmas[1:]
    deviation = t * np.sqrt(s**2 - t**2) / s
    rows = [jnp.asarray(row, x.dtype) for row in (s, (t / s) ** 2, deviation)]

    def step(x, row):
        i, s, ratio, deviation = row
        x0 = D(x, s)
        return x0 + ratio * (x - x0) + deviation * noise(i), None

    return jax.lax.scan(step, x, (jnp.arange(len(s)), *rows))[0]


def solve(
    segments: Sequence[Segment],
    x: jax.Array,
    *,
    method: str = "heun",
    clip: bool = False,
    noise: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The state at the last level of the last segment: x carried along the segments in order.

    Args:
        segments: (D, sigmas) pairs. `D(x, sigma)` has its conditions bound; `sigmas` is a host
            array of at least two levels, monotone, positive except perhaps for a final 0; each
            segment starts where the one before ended. One network needs one segment; a set of
            experts needs one for each run of steps that one expert takes.
        x: state [b, ...] at scale sigmas[0] of the first segment; its dtype is the solver's.
        clip: clamp every estimate of x0 to [-1, 1]. The state itself is never clamped.
        noise: only for "ancestral": noise(i) is unit noise like x for step i, counted over all
            segments.
    """
    grids = _checked_grids(segments, method)
    if (method == "ancestral") != (noise is not None):
        raise ValueError(
            f"method {method!r} with{'out' if noise is None else ''} noise: ancestral sampling "
            "draws noise at every step, euler and heun draw none"
        )
    first = 0
    for (D, _), sigmas in zip(segments, grids, strict=True):
        D = clipped(D) if clip else D
        if method == "ancestral":
            x = ancestral(D, x, sigmas, lambda i, first=first: noise(first + i))
        else:
            x = {"euler": euler, "heun": heun}[method](D, x, sigmas)
        first += len(sigmas) - 1
    return x


def nfe(sigmas: np.ndarray, method: str = "heun") -> int:
    """Network calls (number of function evaluations) of a sampler along these levels."""
    steps = len(sigmas) - 1
    return 2 * steps - (sigmas[-1] == 0) if method == "heun" else steps


def split_grid(sigmas: np.ndarray, nodes: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """The len(nodes) + 1 pieces of a grid cut at these indices; neighbours share the cut node."""
    ends = [0, *nodes, len(sigmas) - 1]
    if any(a >= b for a, b in zip(ends, ends[1:])):
        raise ValueError(
            f"nodes {list(nodes)} must increase strictly inside a grid of {len(sigmas)} nodes"
        )
    return [np.asarray(sigmas)[a : b + 1] for a, b in zip(ends, ends[1:])]


def _steps(sigmas: np.ndarray, dtype) -> tuple[jax.Array, ...]:
    """(s, t, h = t - s) of every step, [n] each, rounded once from float64 to the state's dtype."""
    # The difference is taken in float64: neighbouring levels share their leading digits.
    return tuple(jnp.asarray(v, dtype) for v in (sigmas[:-1], sigmas[1:], np.diff(sigmas)))


def _checked_grids(segments: Sequence[Segment], method: str) -> list[np.ndarray]:
    """The segments' levels as float64; ValueError unless they form one path that `method` takes."""
    if method not in METHODS:
        raise ValueError(f"unknown solver {method!r}: choose one of {METHODS}")
    if not segments:
        raise ValueError("nothing to solve: give at least one (D, sigmas) segment")
    grids = [np.asarray(sigmas, np.float64) for _, sigmas in segments]
    for i, grid in enumerate(grids):
        if grid.ndim != 1 or len(grid) < 2:
            raise ValueError(f"segment {i} needs at least two sigmas, got shape {grid.shape}")
        if not (np.all(grid[:-1] > 0) and grid[-1] >= 0):
            raise ValueError(f"segment {i}: only the last sigma may be 0, got {grid}")
        if i and grid[0] != grids[i - 1][-1]:
            raise ValueError(
                f"segment {i} starts at sigma {grid[0]}, but segment {i - 1} ends at "
                f"{grids[i - 1][-1]}: cut one grid with split_grid"
            )
    widths = np.concatenate([np.diff(grid) for grid in grids])
    if not (np.all(widths > 0) or np.all(widths < 0)):
        raise ValueError("the sigmas of all segments must run strictly up or strictly down")
    if method == "ancestral" and np.all(widths > 0):
        raise ValueError("ancestral sampling cannot invert: use method euler or heun")
    return grids
