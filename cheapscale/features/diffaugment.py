"""DiffAugment: differentiable augmentation of the images for a discriminator or feature distance.

Zhao et al. 2020 (arXiv 2006.10738), with the strengths of PaGoDA's code. For an image x in [-1, 1],
in this order:

    brightness   x + U(-0.5, 0.5)
    saturation   m + U(0, 2) (x - m),      m = mean over channels, per pixel
    contrast     m + U(0.5, 1.5) (x - m),  m = mean over pixels and channels
    translation  whole pixels in +-12.5 % of the side, zeros (mid-grey) drawn in
    cutout       a square of 20 % of the side, centred anywhere, set to zero

Every sample has its own parameters, and the same key gives the same parameters to two batches (real
and fake in one discriminator step, both sides of a distance) at any resolution.
"""

import jax
import jax.numpy as jnp

POLICY = ("brightness", "saturation", "contrast", "translation", "cutout")
RANGES = {"brightness": (-0.5, 0.5), "saturation": (0.0, 2.0), "contrast": (0.5, 1.5)}
MAX_SHIFT = 0.125
CUTOUT = 0.2


def augment(x: jax.Array, key: jax.Array, policy: tuple[str, ...] = POLICY) -> jax.Array:
    """Images x [b, h, w, c] in [-1, 1], augmented with parameters drawn from `key`.

    `policy` is a subset of POLICY; () returns x. Values may leave [-1, 1], as in the paper.
    """
    return transform(x, parameters(key, x.shape[0], policy))


def parameters(
    key: jax.Array, batch: int, policy: tuple[str, ...] = POLICY
) -> dict[str, jax.Array]:
    """Parameters of each sample: "brightness", "saturation", "contrast" [batch], uniform in RANGES;
    "translation" and "cutout" [batch, 2] in [0, 1), positions independent of the resolution (0.5 is
    no translation)."""
    if not set(policy) <= set(POLICY):
        raise ValueError(f"augmentation policy {policy!r}: give a tuple with names from {POLICY}")
    # One key per name, so that leaving one out does not change the others.
    keys = dict(zip(POLICY, jax.random.split(key, len(POLICY))))
    drawn = {}
    for name in policy:
        shape = (batch,) if name in RANGES else (batch, 2)
        low, high = RANGES.get(name, (0.0, 1.0))
        drawn[name] = jax.random.uniform(keys[name], shape, jnp.float32, low, high)
    return drawn


def transform(x: jax.Array, drawn: dict[str, jax.Array]) -> jax.Array:
    """x [b, h, w, c] after the operations of the `parameters` in `drawn`."""
    if "brightness" in drawn:
        x = x + drawn["brightness"][:, None, None, None]
    for name, axes in (("saturation", (3,)), ("contrast", (1, 2, 3))):
        if name in drawn:
            m = jnp.mean(x, axis=axes, keepdims=True)
            x = m + (x - m) * drawn[name][:, None, None, None]
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


def _shift_matrix(position: jax.Array, size: int) -> jax.Array:
    """[b] in [0, 1) -> [b, size, size] with a one where out[i] takes in[i - shift].

    The gradient of a matrix product is a matrix product; that of a gather would be a scatter.
    """
    largest = int(size * MAX_SHIFT + 0.5)
    shift = jnp.floor(position * (2 * largest + 1)).astype(jnp.int32) - largest
    index = jnp.arange(size)
    source = index[None, :, None] - shift[:, None, None]
    return (source == index[None, None, :]).astype(jnp.float32)


def _in_square(position: jax.Array, size: int) -> jax.Array:
    """[b] in [0, 1) -> [b, size], one inside the cut-out interval.

    The centre may be any pixel, so the border can shorten the interval. An even length has one more
    possible centre.
    """
    length = int(size * CUTOUT + 0.5)
    centre = jnp.floor(position * (size + 1 - length % 2)).astype(jnp.int32)
    index = jnp.arange(size)[None, :]
    start = centre[:, None] - length // 2
    return ((index >= start) & (index < start + length)).astype(jnp.float32)
