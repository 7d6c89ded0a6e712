"""Classifier-free guidance (Ho & Salimans 2022) on denoised estimates.

    (1)  D_w = D_u + w (D_c - D_u)

w = `cfg_scale`: 1 is the conditional model itself, 0 the unconditional one, above 1 sharpens. The
score of (1) is that of p(x|c)^w p(x)^(1-w).
"""

from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.diffusion.denoiser import Denoiser
from cheapscale.diffusion.process import over_pixels


def guided(denoise: Denoiser, cfg_scale: Any, null: dict[str, Any]) -> Denoiser:
    """Denoiser of equation (1).

    Args:
        denoise: conditional denoiser D(x, sigma, **cond), trained with dropped conditions.
        cfg_scale: number, or an array [] or [b]. The plain numbers 1 and 0 call the network once
            (and give exactly the conditional and the unconditional estimate); otherwise both
            estimates come from one call with twice the batch.
        null: name of a condition -> the value that means "none", broadcast to the condition's
            shape, e.g. {"label": num_classes}. Other conditions are kept in both halves.

    Returns:
        D_w(x, sigma, **cond); every condition is an array (or tree) with leading axis b.
    """
    if not null:
        raise ValueError("guidance needs a null value, e.g. null={'label': num_classes}, got none")

    def unconditional(cond: dict[str, Any]) -> dict[str, Any]:
        missing = sorted(set(null) - set(cond))
        if missing:
            raise ValueError(f"guidance drops {missing}, but the call gives only {sorted(cond)}")
        return cond | {
            name: jnp.broadcast_to(jnp.asarray(value, cond[name].dtype), cond[name].shape)
            for name, value in null.items()
        }

    def denoise_guided(x: jax.Array, sigma: Any, **cond: Any) -> jax.Array:
        dropped = unconditional(cond)
        if isinstance(cfg_scale, (int, float)) and cfg_scale in (0, 1):
            return denoise(x, sigma, **(cond if cfg_scale == 1 else dropped))
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, dropped)
        D_c, D_u = jnp.split(
            denoise(jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), **both), 2
        )
        return D_u + over_pixels(cfg_scale, x) * (D_c - D_u)

    return denoise_guided


def dropped(key: jax.Array, label: jax.Array, probability: float, null: int) -> jax.Array:
    """label [b] with each replaced by `null` at random: what guidance needs the network to see in
    training. Probability 0 draws nothing."""
    if not probability:
        return label
    return jnp.where(jax.random.bernoulli(key, probability, label.shape), null, label)
