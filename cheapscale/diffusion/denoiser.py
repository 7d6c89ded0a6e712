"""From a raw network F to a denoiser D, the loss that trains it, and the one-step generator.

    F(x_in, noise, **cond)    raw network: x_in [b, h, w, c] scaled to order one, noise [b] feature
    D(x, sigma, **cond)       denoiser: x = x0 + sigma eps at EDM's scale, sigma scalar or [b];
                              returns the estimate of x0, in x's shape and dtype

EDM preconditioning (Karras et al. 2022, Table 1; s = sigma, sd = sigma_data):

    (1)  D(x; s) = c_skip x + c_out F(c_in x, noise(s))
    (2)  c_skip = sd^2 / (s^2 + sd^2),  c_out = s sd c_in,  c_in = 1 / sqrt(s^2 + sd^2)
    (3)  L = E[ (s^2 + sd^2) / (s sd)^2  mean_pixels (D(x0 + s eps; s) - x0)^2 ],
         ln s ~ N(P_mean, P_std^2)

Networks of the variance-preserving family see x_vp = alpha x with alpha = 1 / sqrt(1 + s^2) and
predict eps, x0 or v = alpha eps - sqrt(1 - alpha^2) x0 (Salimans & Ho 2022):

    (4)  eps:  D = x - s F        x0:  D = F        v:  D = alpha^2 x - alpha s F

PaGoDA's one-step generator (Kim et al. 2024, stage 2) is the raw network at the top of the range,

    (5)  G(z) = F(z / sqrt(smax^2 + sd^2), noise(smax)),

with neither c_skip nor c_out: a freshly copied teacher is about twice its denoised mean, because
c_out(80) = 0.49999 for sd = 0.5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cheapscale.diffusion import process

Denoiser = Callable[..., jax.Array]
Network = Callable[..., jax.Array]


class Preconditioning(NamedTuple):
    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array


def preconditioning(sigma: Any, sigma_data: float) -> Preconditioning:
    """Equation (2) at `sigma`, elementwise."""
    total = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / total, c_out=sigma * sigma_data / total**0.5, c_in=1 / total**0.5
    )


def edm(
    F: Network,
    sigma_data: float = 0.5,
    feature: str = "edm",
    dtype: Any = None,
    noise_shift: float = 1.0,
) -> Denoiser:
    """EDM-preconditioned denoiser, equation (1).

    Args:
        feature: kind of noise feature F was built for, see `process.noise_feature`.
        dtype: precision F is called in; by default x's. The state outside keeps its own, so that a
            float64 (or float32) ODE can be solved with a float32 (or bfloat16) network.
        noise_shift: F is told sigma / noise_shift, while c_skip, c_out and c_in follow sigma: how a
            larger canvas keeps a base model's schedule in block means (MegaFusion, 2408.11001).
    """
    _check_feature(feature)

    def denoise(x: jax.Array, sigma: Any, **cond: Any) -> jax.Array:
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        c_skip, c_out, _ = preconditioning(sigma, sigma_data)
        x_in, noise = edm_inputs(x, sigma, sigma_data, feature, noise_shift)
        F_x = _call(F, x_in, noise, dtype, cond)
        return process.over_pixels(c_skip, x) * x + process.over_pixels(c_out, x) * F_x

    return denoise


def edm_inputs(
    x: jax.Array, sigma: Any, sigma_data: float, feature: str, noise_shift: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """What F is given for x [b, ...] at sigma (scalar or [b]): (c_in x, noise feature [b])."""
    sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
    c_in = preconditioning(sigma, sigma_data).c_in
    return process.over_pixels(c_in, x) * x, process.noise_feature(feature, sigma / noise_shift)


def vp_inputs(
    x: jax.Array, sigma: Any, schedule: process.VPSchedule, noise_shift: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """The same of a variance-preserving network: (alpha x, fractional time [b])."""
    sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
    time = schedule.time_of_sigma(sigma / noise_shift).astype(x.dtype)
    return process.to_vp(x, sigma), time


def check_prediction(prediction: str) -> None:
    """Refuse what no network of a VP process returns."""
    if prediction not in ("eps", "x0", "v"):
        raise ValueError(f"unknown prediction {prediction!r}: choose 'eps', 'x0' or 'v'")


def vp_denoiser(
    F: Network,
    schedule: process.VPSchedule,
    prediction: str = "eps",
    feature: str = "time",
    dtype: Any = None,
    noise_shift: float = 1.0,
) -> Denoiser:
    """A variance-preserving network behind the same D(x; sigma), equation (4).

    Args:
        prediction: what F returns: "eps", "x0" or "v".
        feature: "time" feeds the (fractional) table index of sigma, as networks trained on a
            discrete schedule expect; or a kind of `process.noise_feature`.
        dtype, noise_shift: as in `edm`.
    """
    check_prediction(prediction)
    if feature != "time":
        _check_feature(feature)

    def denoise(x: jax.Array, sigma: Any, **cond: Any) -> jax.Array:
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        x_in, noise = vp_inputs(x, sigma, schedule, noise_shift)
        if feature != "time":
            noise = process.noise_feature(feature, sigma / noise_shift)
        F_x = _call(F, x_in, noise, dtype, cond)
        if prediction == "x0":
            return F_x
        if prediction == "eps":
            return x - process.over_pixels(sigma, x) * F_x
        alpha = 1 / jnp.sqrt(1 + sigma**2)
        return process.over_pixels(alpha**2, x) * x - process.over_pixels(alpha * sigma, x) * F_x

    return denoise


def one_step(
    F: Network,
    z: jax.Array,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    feature: str = "edm",
    dtype: Any = None,
    **cond: Any,
) -> jax.Array:
    """One-step generator, equation (5). z: [b, h, w, c] at scale sigma_max. Returns F's image."""
    sigma = jnp.full(z.shape[:1], sigma_max, z.dtype)
    x_in = z / (sigma_max**2 + sigma_data**2) ** 0.5
    return _call(F, x_in, process.noise_feature(feature, sigma), dtype, cond)


def clipped(denoise: Denoiser) -> Denoiser:
    """The same denoiser with its estimate of x0 clamped to [-1, 1]."""

    def denoise_clipped(x: jax.Array, sigma: Any, **cond: Any) -> jax.Array:
        return jnp.clip(denoise(x, sigma, **cond), -1.0, 1.0)

    return denoise_clipped


def edm_loss(
    D: Denoiser,
    x: jax.Array,
    key: jax.Array,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    sigma_data: float = 0.5,
    sigma_range: tuple[float, float] | None = None,
    **cond: Any,
) -> tuple[jax.Array, jax.Array]:
    """Denoising loss of equation (3), one noise level per sample.

    Args:
        D: denoiser preconditioned with the same sigma_data.
        x: clean images [b, h, w, c] in [-1, 1].
        sigma_range: restricts the draw, see `process.draw_sigma`.

    Returns:
        loss [b] (average it), and the sigma [b] it was taken at.
    """
    key_sigma, key_eps = jax.random.split(key)
    sigma = process.draw_sigma(key_sigma, x.shape[:1], P_mean, P_std, sigma_range)
    return edm_weight(sigma, sigma_data) * squared_error(D, x, sigma, key_eps, cond), sigma


def edm_weight(sigma: Any, sigma_data: float) -> Any:
    """The weight of equation (3)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def vp_loss(
    D: Denoiser,
    x: jax.Array,
    key: jax.Array,
    schedule: process.VPSchedule,
    steps: int | None = None,
    **cond: Any,
) -> tuple[jax.Array, jax.Array]:
    """DDPM's simple loss, mean_pixels (eps_hat - eps)^2 = mean_pixels (D - x0)^2 / sigma^2.

    The time is uniform over the first `steps` of the table (default: all). Returns as `edm_loss`.
    """
    steps = schedule.num_steps if steps is None else steps
    if not 1 <= steps <= schedule.num_steps:
        raise ValueError(f"steps must be in 1 .. {schedule.num_steps}, got {steps}")
    key_time, key_eps = jax.random.split(key)
    t = jax.random.randint(key_time, x.shape[:1], 0, steps)
    sigma = jnp.asarray(schedule.sigmas, x.dtype)[t]
    return squared_error(D, x, sigma, key_eps, cond) / sigma**2, sigma


def squared_error(
    D: Denoiser, x: jax.Array, sigma: jax.Array, key: jax.Array, cond: dict[str, Any]
) -> jax.Array:
    """mean_pixels (D(x + sigma eps; sigma) - x)^2, [b]; sigma [b], cond: D's conditions."""
    noise = process.over_pixels(sigma, x) * jax.random.normal(key, x.shape, x.dtype)
    error = D(x + noise, sigma, **cond) - x
    return jnp.mean(jnp.square(error), axis=tuple(range(1, x.ndim)))


def _call(F, x_in, noise, dtype, cond):
    # the network may compute in its own precision; what comes back joins the state's
    inner = x_in.dtype if dtype is None else dtype
    return F(x_in.astype(inner), noise.astype(inner), **cond).astype(x_in.dtype)


def _check_feature(feature):
    if feature not in process.NOISE_FEATURES:
        raise ValueError(
            f"unknown noise feature {feature!r}: choose one of {process.NOISE_FEATURES}"
        )
