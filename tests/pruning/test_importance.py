"""Scores of channels: first-order changes, what squares keep, and the controls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models.unet import UNet, unet
from cheapscale.pruning import importance, structure
from cheapscale.training.sharding import make_mesh

FIELDS = dict(
    resolution=8, channels=8, channel_mult=(1, 2), num_blocks=1, attention=(4,), head_dim=8,
    groups=2, num_classes=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


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


@pytest.mark.parametrize(
    "variable", ["enc_8_block0.inner", "enc_4_block0.v", "enc_4_block0.qk", "dec_8_block1.out"]
)
def test_a_score_is_the_square_of_the_first_order_change(variable):
    """Shrink what reads channel c by a factor 1 - e: the loss changes by -e sum theta g."""
    config, params = network()
    found = structure.layout(config)
    width = found.variables[variable].width
    weights = jnp.ones(width)

    def scaled(weights):
        tree = jax.tree.map(jnp.asarray, params)

        def walk(node, prefix):
            return {
                name: walk(value, f"{prefix}{name}/")
                if isinstance(value, dict)
                else factor(value, f"{prefix}{name}")
                for name, value in node.items()
            }

        def factor(value, path):
            for axis, segments in structure.members(found, path):
                parts = [weights if s.variable == variable else jnp.ones(s.width) for s in segments]
                shape = [1] * value.ndim
                shape[axis] = -1
                value = value * jnp.concatenate(parts).reshape(shape)
            return value

        return walk(tree, "")

    x, target = batch(0)
    slope = jax.jit(jax.grad(lambda w: loss(scaled(w), x, target)))(weights)
    grads = importance.gradients(GRAD, params, [batch(0)])
    scores = importance.taylor(grads, params, config)
    np.testing.assert_allclose(scores[variable], np.asarray(slope) ** 2, rtol=2e-3, atol=1e-12)


def test_queries_and_keys_agree_on_what_a_dimension_is_worth():
    """Logits are bilinear: shrinking q's channel or k's is the same first-order change."""
    config, params = network()
    (grads,) = importance.gradients(GRAD, params, [batch(1)])
    qkv, g = params["enc_4_block0"]["qkv"], grads["enc_4_block0"]["qkv"]
    product = (qkv["kernel"] * g["kernel"]).sum(0) + qkv["bias"] * g["bias"]
    width = structure.layout(config).variables["enc_4_block0.qk"].width
    np.testing.assert_allclose(product[:width], product[width : 2 * width], rtol=1e-2, atol=1e-7)


def test_squares_keep_what_cancels_in_a_sum():
    config, params = network()
    (grads,) = importance.gradients(GRAD, params, [batch(0)])
    opposed = [grads, jax.tree.map(np.negative, grads)]
    squared = importance.taylor(opposed, params, config)
    once = importance.taylor([grads], params, config)
    summed = importance.taylor(opposed, params, config, accumulated=True)
    for name in structure.layout(config).variables:
        np.testing.assert_allclose(squared[name], once[name])
        assert summed[name].max() < 1e-12
    with pytest.raises(ValueError, match="no batches to score with"):
        importance.taylor([], params, config)


def test_every_variable_is_scored_by_every_criterion():
    config, params = network()
    variables = structure.layout(config).variables
    (grads,) = importance.gradients(GRAD, params, [batch(2)])
    for scores in (
        importance.taylor([grads], params, config),
        importance.magnitude(params, config),
        importance.chance(config, 3),
    ):
        assert {name: len(s) for name, s in scores.items()} == {
            name: v.width for name, v in variables.items()
        }
        assert all(np.ptp(s) > 0 for s in scores.values())
    kernel = params["enc_8_block0"]["conv1"]["kernel"]
    found = importance.magnitude(params, config)["enc_8_block0.inner"]
    np.testing.assert_allclose(found, np.sum(kernel.astype(float) ** 2, axis=(0, 1, 3)))


def test_diff_prunings_levels_end_where_the_loss_falls():
    losses = [0.2, 0.3, 0.1, 0.014, 0.5]
    assert importance.informative_levels(losses, 0.05) == 3
    assert importance.informative_levels(losses, 0.0) == 5
