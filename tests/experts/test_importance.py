"""Scores of channels: first-order changes of the loss, squared per batch, and the magnitude."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.experts import importance, structure
from cheapscale.models.unet import UNet, unet

FIELDS = dict(
    resolution=8, channels=8, channel_mult=(1, 2), num_blocks=1, attention=(4,), head_dim=8,
    groups=2, num_classes=3,
)  # fmt: skip


@functools.cache
def network():
    config = unet(**FIELDS).config
    x = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), x, jnp.zeros(1))["params"]
    rng = np.random.default_rng(0)
    fill = lambda s: rng.normal(0.1, 0.2, s.shape).astype(np.float32)  # noqa: E731
    return config, jax.tree.map(fill, shapes)


def loss(params, x, target):
    config, _ = network()
    label = jnp.zeros(len(x), jnp.int32)
    out = UNet(config).apply({"params": params}, x, jnp.zeros(len(x)), label)
    return jnp.mean((out - target) ** 2)


GRAD = jax.jit(jax.grad(loss))


def batch(seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(2, 8, 8, 3)).astype(np.float32) for _ in range(2))


@functools.cache
def gradient(seed):
    _, params = network()
    return jax.device_get(GRAD(params, *batch(seed)))


def test_a_score_is_the_square_of_the_first_order_change():
    """If the weights that read channel c shrink by 1 - e, the loss changes by -e sum theta g."""
    config, params = network()
    known = structure.variables(config)

    def scaled(factors):
        flat = flatten_dict(params, sep="/")
        for path, (axis, (name,)) in structure.layout(config).reads.items():
            width = known[name].width
            full = jnp.ones(flat[path].shape[axis]).at[:width].set(factors[name])
            others = [i for i in range(flat[path].ndim) if i != axis]
            flat[path] = flat[path] * jnp.expand_dims(full, others)
        return unflatten_dict(flat, sep="/")

    slope = jax.jit(jax.grad(lambda factors: loss(scaled(factors), *batch(0))))
    slopes = slope({name: jnp.ones(v.width) for name, v in known.items()})
    scores = importance.taylor([gradient(0)], params, config)
    assert {"enc_8_block0.inner", "enc_4_block0.v", "enc_4_block0.qk"} < set(scores)
    for name, found in scores.items():
        np.testing.assert_allclose(found, np.asarray(slopes[name]) ** 2, rtol=2e-3, atol=1e-11)


def test_queries_and_keys_agree_on_what_a_dimension_is_worth():
    """Logits are bilinear, so shrinking a channel of q or of k changes the loss equally."""
    config, params = network()
    qkv, g = params["enc_4_block0"]["qkv"], gradient(1)["enc_4_block0"]["qkv"]
    product = (qkv["kernel"] * g["kernel"]).sum(0) + qkv["bias"] * g["bias"]
    width = structure.variables(config)["enc_4_block0.qk"].width
    np.testing.assert_allclose(product[:width], product[width : 2 * width], rtol=1e-2, atol=1e-7)


def test_squares_keep_what_cancels_in_a_sum():
    config, params = network()
    opposed = [gradient(0), jax.tree.map(np.negative, gradient(0))]
    squared = importance.taylor(opposed, params, config)
    once = importance.taylor([gradient(0)], params, config)
    for name in structure.variables(config):
        np.testing.assert_allclose(squared[name], once[name])
        assert squared[name].max() > 0


def test_every_variable_is_scored_by_every_criterion():
    config, params = network()
    for scores in (
        importance.taylor([gradient(0)], params, config),
        importance.magnitude(params, config),
    ):
        widths = {name: v.width for name, v in structure.variables(config).items()}
        assert {name: len(s) for name, s in scores.items()} == widths
        assert all(np.ptp(s) > 0 for s in scores.values())
    kernel = params["enc_8_block0"]["conv1"]["kernel"]
    found = importance.magnitude(params, config)["enc_8_block0.inner"]
    np.testing.assert_allclose(found, np.sum(kernel.astype(float) ** 2, axis=(0, 1, 3)))
