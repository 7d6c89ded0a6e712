"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) on denoised estimates.

    D_w = D_u + w (D_c - D_u)

w = `cfg_scale`: 1 gives the conditional model, 0 the unconditional one, more than 1 sharpens (the
paper's w is ours minus 1). The score of D_w is that of p(x|c)^w p(x)^(1-w) at each noise level.

A generator that takes the scale as an input, there called omega, trains on scales of a distribution
pi(omega) of `SCALES` (PaGoDA, Kim et al. 2024, arXiv 2405.14822, section 4.2).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.diffusion.denoiser import Denoiser
from cheapscale.diffusion.noise import over_pixels

# pi(omega): (lowest, highest, centre, deviation), a normal distribution truncated to the range; an
# infinite deviation makes it uniform. Captions that describe more need less guidance.
SCALES = {"uniform": (2.0, 10.0, 6.0, math.inf), "normal": (1.0, 10.0, 2.0, 3.0)}
LARGEST_SCALE = max(high for _, high, *_ in SCALES.values())
UNGUIDED = 1.0  # the scale of the conditional model itself


def draw_scale(key: jax.Array, shape: tuple[int, ...], distribution: str) -> jax.Array:
    """omega ~ pi(omega), float32 of this shape. "uniform": on [2, 10], for labels and raw captions.
    "normal": of centre 2 and deviation 3 on [1, 10], for recaptions."""
    low, high, centre, deviation = SCALES[distribution]
    if math.isinf(deviation):
        return jax.random.uniform(key, shape, jnp.float32, low, high)
    low, high = (low - centre) / deviation, (high - centre) / deviation
    return centre + deviation * jax.random.truncated_normal(key, low, high, shape, jnp.float32)


def omega_feature(omega: jax.Array) -> jax.Array:
    """What a network embeds of omega, as it embeds the noise level: 100 omega (section 4.2), from
    which that of no guidance is subtracted, so that 0 means none."""
    return 100.0 * (omega - UNGUIDED)


def guided(D: Denoiser, cfg_scale: Any, null: dict[str, Any]) -> Denoiser:
    """D_w(x, sigma, **cond), the guided denoiser; a condition is a tree of arrays [b, ...].

    Args:
        D: conditional denoiser D(x, sigma, **cond), trained with dropped conditions.
        cfg_scale: number, or an array [] or [b]. The plain numbers 1 and 0 call the network once
            (and give exactly the conditional and the unconditional estimate); otherwise both
            estimates come from one call with twice the batch.
        null: {condition: the value that means "none"}, broadcast to the condition's shape, for
            example {"label": num_classes}. Other conditions are kept in both halves.
    """
    if not null:
        raise ValueError("guidance needs a null value, e.g. null={'label': num_classes}, got none")

    def unconditional(cond: dict[str, Any]) -> dict[str, Any]:
        missing = sorted(set(null) - set(cond))
        if missing:
            raise ValueError(f"guidance drops {missing}, but the call gives only {sorted(cond)}")
        return cond | {
            name: jax.tree.map(
                lambda v, c: jnp.broadcast_to(jnp.asarray(v, c.dtype), c.shape), value, cond[name]
            )
            for name, value in null.items()
        }

    def D_w(x: jax.Array, sigma: Any, **cond: Any) -> jax.Array:
        dropped = unconditional(cond)
        if isinstance(cfg_scale, (int, float)) and cfg_scale in (0, 1):
            return D(x, sigma, **(cond if cfg_scale == 1 else dropped))
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        # One call with twice the batch keeps one copy of the network in the compiled program.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, dropped)
        D_c, D_u = jnp.split(D(jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), **both), 2)
        return D_u + over_pixels(cfg_scale, x) * (D_c - D_u)

    return D_w


def drop_labels(key: jax.Array, label: jax.Array, probability: float, null: int) -> jax.Array:
    """label [b] or rows of tokens [b, n], each replaced by `null` with this probability, to train a
    network for guidance."""
    if not probability:
        return label
    # The draw would be another in float64, the type of a Python number under JAX_ENABLE_X64.
    dropped = jax.random.bernoulli(key, jnp.float32(probability), label.shape[:1])
    return jnp.where(dropped if label.ndim == 1 else dropped[:, None], null, label)
