"""Captions in the U-Net: what the encoders compute, and how the network reads them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.experts.structure import flops
from cheapscale.models.growth import trainable_names
from cheapscale.models.text import TextConfig, TextEncoder, _bucket
from cheapscale.models.unet import ResBlock, plan, unet
from cheapscale.training.cost import cost_of_call
from tests.models.test_unet import random_params

TEXT = dict(kind="transformer", vocab=11, length=5, width=8, depth=1, heads=2, mlp=16)
NET = dict(
    resolution=8, channels=8, channel_mult=(1, 2), attention=(4,), head_dim=8, caption_dim=8,
    text=TEXT,
)  # fmt: skip
X = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
NOISE = np.array([0.3, -1.0, 0.1], np.float32)
IDS = np.array([[3, 1, -1, -1, -1], [4, 2, 7, 10, 0], [-1] * 5], np.int32)


@functools.cache
def net():
    made = unet(**NET)
    return (
        made,
        random_params(made),
        jax.jit(lambda params, *args: made.apply({"params": params}, *args)),
    )


def test_captions_act_and_the_empty_one_is_the_network_without_text():
    made, params, apply = net()
    out = apply(params, X, NOISE, IDS)
    bare = {name: leaf for name, leaf in params.items() if name not in ("text", "map_caption")}
    alone = unet(**NET | {"text": None, "caption_dim": 0})
    without = jax.jit(lambda p: alone.apply({"params": p}, X, NOISE))(bare)
    np.testing.assert_allclose(out[2], without[2], atol=1e-5)
    np.testing.assert_allclose(apply(params, X, NOISE, np.zeros(3, np.int32)), without, atol=1e-5)
    assert np.abs(out - without)[:2].max(axis=(1, 2, 3)).min() > 1e-3
    # What is encoded once gives the same, and tokens beyond the end do not matter.
    encoded = made.encode(params, jnp.asarray(IDS))
    np.testing.assert_allclose(apply(params, X, NOISE, encoded), out, atol=1e-5)
    junk = encoded._replace(tokens=encoded.tokens.at[0, 2:].set(99.0))
    np.testing.assert_allclose(apply(params, X, NOISE, junk)[0], out[0], atol=1e-5)


def test_a_fresh_block_is_as_without_text():
    """Only random weights would show it: a fresh network is zero for any input."""
    made, params, _ = net()
    block = next(block for block in plan(made.config) if block.text)
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, block.in_channels))
    emb, text = jnp.ones((3, block.emb)), made.encode(params, jnp.asarray(IDS))
    fresh = ResBlock(block, (1.0, "fan_in"), 0.0)
    start = fresh.init(jax.random.key(1), x, emb, False, text)
    bare = dataclasses.replace(block, text=0)
    without = ResBlock(bare, (1.0, "fan_in"), 0.0).apply(start, x, emb, False)
    np.testing.assert_array_equal(fresh.apply(start, x, emb, False, text), without)


def test_plan_declares_what_reads_text():
    made, params, _ = net()
    blocks = {block.name: block for block in plan(made.config)}
    assert set(params) == set(blocks) | {"text"}
    for name, block in blocks.items():
        assert ("text_q" in params[name]) == bool(block.text) == bool(block.heads)
    assert "text" not in trainable_names(unet(**NET | {"growth": (8,)}).config)  # it is frozen
    encoded = jax.eval_shape(lambda: made.encode(params, jnp.asarray(IDS)))
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), encoded)
    call = lambda p, x, text: made.apply({"params": p}, x, jnp.zeros(1), text)  # noqa: E731
    measured = cost_of_call(call, params, X[:1], one).flops
    assert 1.0 < measured / flops(made.config) < 1.6  # norms and activations are not counted


def test_classes_and_captions_exclude_each_other():
    with pytest.raises(ValueError, match="num_classes 3 and captions"):
        unet(**NET | {"num_classes": 3})
    with pytest.raises(ValueError, match="encoder 'lstm' is unknown"):
        TextConfig(**TEXT | {"kind": "lstm"})


def test_a_causal_encoder_does_not_look_ahead():
    config = TextConfig(**TEXT | {"kind": "clip"})
    encoder = TextEncoder(config)
    params = encoder.init(jax.random.key(0), IDS)
    changed = IDS.copy()
    changed[1, 4] = 9
    ours, other = (encoder.apply(params, ids) for ids in (IDS, changed))
    np.testing.assert_allclose(ours.tokens[1, :4], other.tokens[1, :4], atol=1e-6)
    assert np.abs(ours.tokens[1, 4] - other.tokens[1, 4]).max() > 1e-3
    # token 10 has the highest number: it is the end mark, and its feature is the pooled one
    np.testing.assert_allclose(ours.pooled[1], ours.tokens[1, 3], atol=1e-6)
    assert not ours.pooled[2].any()


def test_buckets_of_distance_are_those_of_t5(torchvision):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    import torch

    distance = torch.arange(200)[None, :] - torch.arange(200)[:, None]
    theirs = t5.T5Attention._relative_position_bucket(distance)
    np.testing.assert_array_equal(_bucket(200), theirs.numpy())
