"""DiffAugment: differentiable augmentation in front of a discriminator or a feature distance.

Zhao et al. 2020 (arXiv 2006.10738), with the strengths used by PaGoDA (spec 3.4). For an image x
in [-1, 1], in this order:

    brightness   x + U(-0.5, 0.5)
    saturation   m + U(0, 2) (x - m),      m = mean over channels, per pixel
    contrast     m + U(0.5, 1.5) (x - m),  m = mean over pixels and channels
    translation  whole pixels in +-12.5 % of the side, zeros (mid-grey) drawn in
    cutout       a square of 20 % of the side, centred anywhere, set to zero

Every sample has its own parameters and all of them come from the key: the same key gives the same
parameters to two batches (real and fake in one discriminator step, both sides of a distance), at
any resolution. Translation is a product with a 0-1 matrix rather than a gather, because its
transpose is then a product too, not a scatter.
"""

import jax
import jax.numpy as jnp

POLICY = ("brightness", "saturation", "contrast", "translation", "cutout")
MAX_SHIFT = 0.125
CUTOUT = 0.2


def augment(x: jax.Array, key: jax.Array, policy: tuple[str, ...] = POLICY) -> jax.Array:
    """Augment images x [b, h, w, c] in [-1, 1] with parameters drawn from `key`.

    `policy` is a subset of POLICY; () returns x. Values may leave [-1, 1], as in the paper.
    """
    return transform(x, parameters(key, x.shape[0], policy))


def check_policy(policy: tuple[str, ...]) -> tuple[str, ...]:
    """The policy as a tuple, or a ValueError that names what is not in POLICY."""
    unknown = [name for name in policy if name not in POLICY]
    if isinstance(policy, str) or unknown:
        raise ValueError(f"augmentation policy {policy!r}: give a tuple with names from {POLICY}")
    return tuple(policy)


def parameters(
    key: jax.Array, batch: int, policy: tuple[str, ...] = POLICY
) -> dict[str, jax.Array]:
    """Per-sample parameters: "brightness", "saturation", "contrast" [batch] as factors or offsets;
    "translation" and "cutout" [batch, 2] in [0, 1), a position independent of the resolution
    (0.5 is no translation).
    """
    policy = check_policy(policy)
    # One key per name, so that leaving one out does not change the others.
    keys = dict(zip(POLICY, jax.random.split(key, len(POLICY))))
    ranges = {"brightness": (-0.5, 0.5), "saturation": (0.0, 2.0), "contrast": (0.5, 1.5)}
    drawn = {}
    for name in policy:
        shape = (batch,) if name in ranges else (batch, 2)
        low, high = ranges.get(name, (0.0, 1.0))
        drawn[name] = jax.random.uniform(keys[name], shape, minval=low, maxval=high)
    return drawn


def transform(x: jax.Array, drawn: dict[str, jax.Array]) -> jax.Array:
    """Apply `parameters`' result to x [b, h, w, c]; what `drawn` lacks is left out."""
    if "brightness" in drawn:
        x = x + _per_sample(drawn["brightness"])
    if "saturation" in drawn:
        x = _scale_about(x, jnp.mean(x, axis=3, keepdims=True), drawn["saturation"])
    if "contrast" in drawn:
        x = _scale_about(x, jnp.mean(x, axis=(1, 2, 3), keepdims=True), drawn["contrast"])
    if "translation" in drawn:
        rows = _shift_matrix(drawn["translation"][:, 0], x.shape[1])
        columns = _shift_matrix(drawn["translation"][:, 1], x.shape[2])
        exact = jax.lax.Precision.HIGHEST  # a shift must not round pixels to bfloat16
        x = jnp.einsum("bij,bjwc->biwc", rows, x, precision=exact)
        x = jnp.einsum("bij,bhjc->bhic", columns, x, precision=exact)
    if "cutout" in drawn:
        rows = _in_square(drawn["cutout"][:, 0], x.shape[1])[:, :, None, None]
        columns = _in_square(drawn["cutout"][:, 1], x.shape[2])[:, None, :, None]
        x = x * (1.0 - rows * columns)
    return x


def _per_sample(value: jax.Array) -> jax.Array:
    return value[:, None, None, None]


def _scale_about(x: jax.Array, centre: jax.Array, factor: jax.Array) -> jax.Array:
    return centre + (x - centre) * _per_sample(factor)


def _shift_matrix(position: jax.Array, size: int) -> jax.Array:
    """[b] in [0, 1) -> [b, size, size] with a one where out[i] takes in[i - shift]."""
    largest = int(size * MAX_SHIFT + 0.5)
    shift = jnp.floor(position * (2 * largest + 1)).astype(jnp.int32) - largest
    index = jnp.arange(size)
    source = index[None, :, None] - shift[:, None, None]
    return (source == index[None, None, :]).astype(jnp.float32)


def _in_square(position: jax.Array, size: int) -> jax.Array:
    """[b] in [0, 1) -> [b, size], one inside the cut-out interval; its centre is any pixel, so an
    interval at the border is cut short. An even length has one more possible centre."""
    length = int(size * CUTOUT + 0.5)
    centre = jnp.floor(position * (size + 1 - length % 2)).astype(jnp.int32)
    index = jnp.arange(size)[None, :]
    start = centre[:, None] - length // 2
    return ((index >= start) & (index < start + length)).astype(jnp.float32)
