"""Solvers of the probability-flow ODE: Euler (= DDIM) and Heun, downwards and upwards; and the
ancestral sampler, downwards.

In EDM's variables the ODE is

    (1)  dx / dsigma = d(x, sigma) = (x - D(x; sigma)) / sigma       Karras et al. 2022, Eq. 1 and 3

From s to t, with h = t - s,

    (2)  Euler:  x' = x + h d(x, s)
    (3)  Heun:   x' = x + h (d(x, s) + d(x + h d(x, s), t)) / 2           (Euler where t = 0)

Divided by sqrt(1 + sigma^2), (2) is DDIM's deterministic update (Song et al. 2021). A grid that
runs down samples; the same grid reversed inverts (PaGoDA, Kim et al. 2024, section 3.1): an image
is treated as living at sigma_min, and nothing is evaluated at the end of the path, so that 40 nodes
cost 39 x 2 = 78 network calls.

Ancestral sampling (DDPM, Ho et al. 2020) draws each state from the posterior q(x_t | x_s, x_0 = D),

    (4)  x' = x + h d(x, s) + u n,   u^2 = t^2 (s^2 - t^2) / s^2,   h = sqrt(t^2 - u^2) - s

which is its "small" variance, in EDM's variables, between any two levels.

A segment is one `lax.scan` over *network calls*, not over steps: predictor and corrector are turns
of the same loop. The network is therefore compiled once, whatever the method, and the length of the
scan is the NFE.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.denoiser import Denoiser, clipped

METHODS = ("euler", "heun", "ancestral")

Segment = tuple[Denoiser, Any]


def solve(
    segments: Sequence[Segment],
    x: jax.Array,
    *,
    method: str = "heun",
    clip: bool = False,
    noise: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Carries x along the segments in order.

    Args:
        segments: (denoise, sigmas) pairs. `denoise(x, sigma)` has its conditions bound already;
            `sigmas` is a host array of at least two levels, monotone, positive except perhaps for
            a final 0; each segment starts where the one before ended. Steps own specialists: both
            Heun calls of a step go to the denoiser of the segment that holds it, up or down.
        x: state [b, ...] at scale sigmas[0] of the first segment; its dtype is the solver's.
        clip: clamp every estimate of x0 to [-1, 1]. The state itself is never clamped.
        noise: of "ancestral" alone, n(i) -> unit noise like x for the i-th step from the start.

    Returns:
        the state at the last level of the last segment.
    """
    grids = _checked_grids(segments, method)
    if method == "ancestral" and noise is None:
        raise ValueError(
            "method 'ancestral' needs `noise`: use euler or heun where nothing may be drawn"
        )
    if method != "ancestral" and noise is not None:
        raise ValueError(
            "ancestral sampling draws noise at every step and the other solvers draw none: give "
            f"`noise` with method='ancestral' and with no other, not with {method!r}"
        )
    first = 0
    for (denoise, _), sigmas in zip(segments, grids, strict=True):
        denoise = clipped(denoise) if clip else denoise
        if noise is None:
            x = _scan_calls(denoise, x, _calls(sigmas, method))
        else:
            x = _scan_ancestral(denoise, x, sigmas, lambda i, start=first: noise(start + i))
        first += len(sigmas) - 1
    return x


def nfe(segments: Sequence[Segment], method: str = "heun") -> tuple[int, ...]:
    """Network calls that `solve` makes in each segment."""
    return tuple(len(_calls(sigmas, method)[0]) for sigmas in _checked_grids(segments, method))


def split_grid(sigmas: np.ndarray, borders: Sequence[int]) -> list[np.ndarray]:
    """Cuts a grid of n nodes at node indices `borders` into len(borders) + 1 touching grids."""
    ends = [0, *borders, len(sigmas) - 1]
    if any(a >= b for a, b in zip(ends, ends[1:])):
        raise ValueError(
            f"borders {list(borders)} must increase strictly inside a grid of {len(sigmas)} nodes"
        )
    return [np.asarray(sigmas)[a : b + 1] for a, b in zip(ends, ends[1:])]


def _calls(sigmas, method):
    """A row per network call: the level it is made at, the step's h, is it a corrector."""
    level, width, corrector = [], [], []
    for s, t in zip(sigmas, sigmas[1:]):
        level.append(s), width.append(t - s), corrector.append(False)
        if method == "heun" and t > 0:
            level.append(t), width.append(t - s), corrector.append(True)
    return np.array(level), np.array(width), np.array(corrector)


def _scan_calls(denoise, x, calls):
    level, width, corrector = calls
    rows = (jnp.asarray(level, x.dtype), jnp.asarray(width, x.dtype), jnp.asarray(corrector))

    def call(carry, row):
        x, start, slope = carry  # at a corrector, x is the Euler point and start the step's start
        sigma, h, second = row
        d = (x - denoise(x, sigma)) / sigma
        start = jnp.where(second, start, x)
        slope = jnp.where(second, 0.5 * (slope + d), d)
        return (start + h * slope, start, slope), None

    (x, _, _), _ = jax.lax.scan(call, (x, x, jnp.zeros_like(x)), rows)
    return x


def _scan_ancestral(denoise, x, sigmas, noise):
    s, t = sigmas[:-1], sigmas[1:]
    up = t * np.sqrt(s**2 - t**2) / s
    rows = (np.arange(len(s)), *(jnp.asarray(v, x.dtype) for v in (s, t**2 / s - s, up)))

    def step(x, row):
        i, sigma, h, up = row
        d = (x - denoise(x, sigma)) / sigma
        return x + h * d + up * noise(i), None  # (4); sqrt(t^2 - u^2) = t^2 / s

    return jax.lax.scan(step, x, rows)[0]


def _checked_grids(segments, method):
    if method not in METHODS:
        raise ValueError(f"unknown solver {method!r}: choose one of {METHODS}")
    if not segments:
        raise ValueError("nothing to solve: give at least one (denoise, sigmas) segment")
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
        raise ValueError("ancestral sampling runs down: invert with euler or heun")
    return grids
