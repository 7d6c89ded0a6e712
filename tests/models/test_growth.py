"""Growth: parameter counts, the freezing rule, copying by name and shape, the output at step 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cheapscale.models import growth as generator
from cheapscale.models.plan import plan
from cheapscale.models.unet import UNet, unet
from configs.models import GROWTH, preset

TINY = dict(resolution=8, channels=8, channel_mult=(1, 2), attention=(4,), head_dim=8)
Z = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
NOISE = np.ones(2, np.float32)


def shapes(net: UNet):
    x = jnp.zeros((1, net.config.resolution, net.config.resolution, 3))
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1))["params"]


def random_params(net: UNet, seed=0):
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + rng.normal(size=leaf.shape) / np.sqrt(fan)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(net))


@functools.cache
def fresh(growth):
    net = unet(**TINY, growth=growth)
    return jax.jit(net.init)(jax.random.key(5), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))["params"]


# millions of parameters in all, and trainable while growing
@pytest.mark.parametrize(
    "base, doublings, total, trains",
    [
        (64, 0, 295.9, 295.9),
        (64, 1, 298.3, 27.2),
        (64, 2, 300.8, 29.6),
        (64, 3, 301.6, 30.4),
        (32, 0, 370.8, 370.8),
        (32, 1, 375.1, None),
        (32, 3, 383.8, None),
    ],
)
def test_parameter_counts_of_the_published_generators(base, doublings, total, trains):
    net = unet(**preset(f"imagenet{base}_adm", growth=GROWTH[f"imagenet{base}_adm"][:doublings]))
    params = shapes(net)
    assert net.config.output_resolution == base * 2**doublings
    sizes = {path: leaf.size for path, leaf in flatten_dict(params, sep="/").items()}
    assert round(sum(sizes.values()) / 1e6, 1) == total
    groups = {n for b in plan(net.config) for n in (b.groups0, b.groups1, b.groups2) if n}
    assert groups == {32}  # even in grown blocks of 96 channels
    if trains:
        moves = generator.trainable(net.config)
        assert round(sum(n for path, n in sizes.items() if moves(path)) / 1e6, 1) == trains


def test_trainable_blocks_of_the_64px_adm_are_output_blocks_from_9():
    config = unet(**preset("imagenet64_adm", growth=(192,))).config
    assert generator.trainable_names(config) == {
        "dec_32_block1", "dec_32_block2", "dec_32_block3", "dec_64_up",
        "dec_64_block0", "dec_64_block1", "dec_64_block2", "dec_64_block3",
        "grow_128_up", "grow_128_block0", "grow_128_block1", "head",
    }  # fmt: skip
    trains = generator.trainable(config)
    assert trains("dec_32_block1/conv0/kernel") and not trains("dec_32_block0/conv0/kernel")
    assert not trains("map_layer0/kernel") and not trains("dec_32_up/conv0/kernel")


def test_without_freezing_all_trains_but_an_encoder_of_published_weights():
    text = dict(kind="transformer", vocab=300, length=6, width=8, depth=1, heads=1, mlp=8)
    for kind, learnt in (("transformer", True), ("clip", False)):
        net = unet(**TINY, growth=(8,), caption_dim=8, text=text | {"kind": kind})
        blocks = {block.name for block in plan(net.config)}
        assert generator.trainable_names(net.config, freeze=False) - blocks == set(
            ["text"] * learnt
        )
        assert blocks < generator.trainable_names(net.config, freeze=False) | {"text"}
        assert not generator.trainable(net.config)("text/position")


@pytest.mark.parametrize("growth", [(8,), (8, 8)])
def test_grown_generator_starts_as_nearest_enlargement(growth):
    """Grown features are the old ones repeated, so the head reads constant patches except at seams:
    every pixel whose 3x3 neighbourhood lies in one patch is the head's answer to a constant."""
    small, large = unet(**TINY), unet(**TINY, growth=growth)
    old = random_params(small)
    params, report = generator.grow_params(fresh(growth), old, large.config)
    assert not report.dropped and all(path.startswith("grow_") for path in report.fresh)

    last = f"grow_{8 * 2 ** len(growth)}_block1"
    before = jax.jit(lambda p: small.apply({"params": p}, Z, NOISE, taps=("dec_8_block1",)))(old)
    after = jax.jit(lambda p: large.apply({"params": p}, Z, NOISE, taps=(last,)))(params)
    side = 2 ** len(growth)
    repeated = before[1]["dec_8_block1"].repeat(side, axis=1).repeat(side, axis=2)
    np.testing.assert_array_equal(after[1][last], repeated)
    assert after[0].shape == (2, 8 * side, 8 * side, 3)


def test_grown_image_is_the_enlarged_image_for_a_pointwise_head():
    """A 1x1 head has no seams: the grown image is the old image with repeated pixels."""
    small, large = unet(**TINY), unet(**TINY, growth=(8,))
    old = random_params(small)
    centre = np.zeros((3, 3, 1, 1), np.float32)
    centre[1, 1] = 1
    old["head"]["conv"]["kernel"] = old["head"]["conv"]["kernel"] * centre
    params, _ = generator.grow_params(fresh((8,)), old, large.config)
    before = jax.jit(lambda p: small.apply({"params": p}, Z, NOISE))(old)
    after = jax.jit(lambda p: large.apply({"params": p}, Z, NOISE))(params)
    np.testing.assert_allclose(after, before.repeat(2, axis=1).repeat(2, axis=2), atol=1e-5)


def test_head_is_fresh_where_its_width_changes():
    config = unet(**TINY, growth=(4,)).config
    old = random_params(unet(**TINY))
    params, report = generator.grow_params(fresh((4,)), old, config)
    assert "head/conv/kernel" in report.fresh and "head/norm/scale" in report.dropped
    assert not params["head"]["conv"]["kernel"].any()
    assert "head/conv/bias" in report.copied


def test_frozen_weights_that_were_not_copied_are_refused():
    config = unet(**TINY, growth=(8,)).config
    other = random_params(unet(**TINY | {"channels": 16}))
    with pytest.raises(ValueError, match="would freeze random weights: dec_4_block0.* .88 in all"):
        generator.grow_params(fresh((8,)), other, config)


def test_growing_again_keeps_the_grown_blocks():
    once, config = fresh((8,)), unet(**TINY, growth=(8, 8)).config
    params, report = generator.grow_params(fresh((8, 8)), once, config)
    assert all(path.startswith("grow_32") for path in report.fresh)
    np.testing.assert_array_equal(
        params["grow_16_up"]["conv0"]["kernel"], once["grow_16_up"]["conv0"]["kernel"]
    )


def test_last_layer_is_a_kernel_of_the_network():
    for growth, path in [((), "dec_8_block1/conv1/kernel"), ((8,), "grow_16_block1/conv1/kernel")]:
        net = unet(**TINY, growth=growth)
        assert generator.last_layer(net.config) == path
        leaf = shapes(net)
        for name in path.split("/"):
            leaf = leaf[name]
        assert leaf.shape == (3, 3, 8, 8)


def test_frozen_trunk_has_no_backward_pass():
    """The gradient of the trainable leaves has no backward convolutions of the frozen blocks."""
    net = unet(**TINY, growth=(8,))
    params = shapes(net)
    trains = generator.trainable_names(net.config)
    moving = {name: value for name, value in params.items() if name in trains}
    fixed = {name: value for name, value in params.items() if name not in trains}

    def loss(moving, fixed):
        return jnp.sum(net.apply({"params": moving | fixed}, Z, NOISE))

    def convolutions(*trees, **options):
        jaxpr = jax.make_jaxpr(jax.grad(loss, **options))(*trees)
        return str(jaxpr).count("conv_general_dilated[")

    forward = str(jax.make_jaxpr(loss)(moving, fixed)).count("conv_general_dilated[")
    trunk = sum(len(leaf.shape) == 4 for leaf in jax.tree.leaves(fixed))  # frozen 3x3 kernels
    # every trainable convolution has two gradients; frozen ones have none
    assert convolutions(moving, fixed) == forward + 2 * (forward - trunk)
    assert convolutions(moving, fixed, argnums=(0, 1)) == 3 * forward - 1  # none for the input
