"""The U-Net: counts, names, sizes, conditions, taps and injection, precision, remat, overrides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models.unet import plan, unet
from cheapscale.training.cost import param_count
from configs.models import PRESETS, preset

TINY = dict(
    resolution=8, channels=8, channel_mult=(1, 2), attention=(4,), head_dim=8, num_classes=3,
    augment_dim=9, extra_conditions=2, caption_dim=5,
)  # fmt: skip
X = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
NOISE = np.array([0.3, -1.0], np.float32)
LABEL = np.array([0, 2], np.int32)


def shapes(net):
    side, channels = net.config.resolution, net.config.in_channels
    x = jnp.zeros((1, side, side, channels))
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1))["params"]


def random_params(net, seed=0):
    """Parameters without zeros, so that no test passes trivially."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + rng.normal(size=leaf.shape) / np.sqrt(fan)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(net))


@functools.cache
def tiny(**changes):
    """(params, jitted apply) of the tiny network; train is static."""
    net = unet(**TINY | changes)
    return random_params(net), jax.jit(
        lambda params, *args, **kwargs: net.apply({"params": params}, *args, **kwargs),
        static_argnames=("train", "taps"),
    )


PLACE, LATER = "enc_4_block0", "dec_4_in1"
ZERO = np.zeros((2, 4, 4, 16), np.float32)


def run(label=LABEL, augment=0.0, extra=0.0, caption=0.0, stream=ZERO, skip=ZERO):
    """(out, taps) with every argument given, so that many tests share one compiled program."""
    params, apply = tiny()
    in_range = (label[:, None] == np.arange(3)).astype(np.float32)
    return apply(
        params, X, NOISE, in_range,
        augment=np.full((2, 9), augment, np.float32),
        extra=np.full((2, 2), extra, np.float32),
        caption=np.full((2, 5), caption, np.float32),
        inject={PLACE: stream, f"{PLACE}/skip": skip},
        taps=(PLACE, LATER),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, millions",
    [
        ("imagenet64_adm", 295.9),
        ("imagenet32_adm", 370.8),
        ("cifar10_ddpmpp", 55.7),
        ("cifar10_ncsnpp", 56.4),
        ("small16", 8.0),
        ("tiny8", 0.8),
        ("tiny16", 0.8),
    ],
)
def test_parameter_counts_of_the_presets(name, millions):
    assert round(param_count(shapes(unet(**preset(name)))) / 1e6, 1) == millions
    assert set(PRESETS) >= {name}


@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
def test_plan_and_module_agree(family):
    net = unet(**TINY | {"family": family, "growth": (8, 4)})
    params = shapes(net)
    assert set(params) == {block.name for block in plan(net.config)}
    for block in plan(net.config):
        leaves = params[block.name]
        if block.kind == "res":
            assert leaves["conv0"]["kernel"].shape[2:] == (block.in_channels, block.inner)
            assert leaves["conv1"]["kernel"].shape[2:] == (block.inner, block.out_channels)
            assert ("skip" in leaves) == block.shortcut
            assert ("qkv" in leaves) == bool(block.heads)
            assert leaves["affine"]["kernel"].shape[0] == block.emb
        elif block.kind == "map" and block.name != "map_noise":
            assert leaves["kernel"].shape == (block.in_channels, block.out_channels)


def test_names_carry_native_resolutions():
    names = [block.name for block in plan(unet(**TINY | {"growth": (8,)}).config)]
    assert [name for name in names if not name.startswith("map_")] == [
        "enc_8_conv", "enc_8_block0", "enc_4_down", "enc_4_block0", "dec_4_in0", "dec_4_in1",
        "dec_4_block0", "dec_4_block1", "dec_8_up", "dec_8_block0", "dec_8_block1",
        "grow_16_up", "grow_16_block0", "grow_16_block1", "head",
    ]  # fmt: skip


def test_weights_do_not_depend_on_the_resolution():
    """A 16-px network equals the 8-px one up to block names, and both run at any size."""
    params, apply = tiny()
    twice = dict(TINY, resolution=16, attention=(8,))
    names = [b.name for b in plan(unet(**TINY).config)]
    others = [b.name for b in plan(unet(**twice).config)]
    renamed = {other: params[name] for name, other in zip(names, others)}
    wide = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    ours = apply(params, wide, NOISE, LABEL)
    theirs = jax.jit(
        lambda p: unet(**twice).apply({"params": p}, wide, NOISE, LABEL)
    )(renamed)  # fmt: skip
    assert ours.shape == wide.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "shape, message", [((1, 9, 8, 3), "9 x 8 px.*stride 2"), ((1, 8, 8, 4), "give .b, h, w, 3")]
)
def test_inputs_that_do_not_fit_are_refused(shape, message):
    params, apply = tiny()
    with pytest.raises(ValueError, match=message):
        apply(params, jnp.zeros(shape), jnp.zeros(1))


def test_fresh_network_is_zero():
    net = unet(**TINY)
    x, noise = jnp.asarray(X), jnp.asarray(NOISE)
    params = jax.jit(net.init)(jax.random.key(0), x, noise)["params"]
    assert not tiny()[1](params, X, NOISE, LABEL).any()
    kernel = params["dec_8_block0"]["conv0"]["kernel"]
    assert kernel.std() > 0 and params["map_label"]["kernel"].std() > 0.5


def test_no_class_is_the_zero_embedding():
    params, apply = tiny()
    labelled = apply(params, X, NOISE, LABEL)
    null = apply(params, X, NOISE, np.array([3, 3], np.int32))
    assert np.abs(labelled - null).max() > 1e-3
    negative = apply(params, X, NOISE, np.array([-1, 7], np.int32))
    np.testing.assert_allclose(negative, null, atol=1e-6)
    np.testing.assert_allclose(apply(params, X, NOISE), null, atol=1e-6)
    # it equals the unconditional network, which ignores labels
    bare = {k: v for k, v in params.items() if k != "map_label"}
    unconditional = tiny(num_classes=0)[1](bare, X, NOISE, LABEL)
    np.testing.assert_allclose(unconditional, null, atol=1e-5)


def test_conditions_act_and_default_to_nothing():
    base = run()[0]
    for name in ("augment", "extra", "caption"):
        assert np.abs(run(**{name: 0.7})[0] - base).max() > 1e-4
    # Zeros mean no augmentation, no scalars and no caption, whatever the weights are.
    params, apply = tiny()
    absent = apply(params, X, NOISE, LABEL)
    given = apply(
        params, X, NOISE, LABEL, augment=np.zeros((2, 9)), extra=np.zeros((2, 2)),
        caption=np.zeros((2, 5)),
    )  # fmt: skip
    np.testing.assert_allclose(given, absent, atol=1e-6)


def test_label_weights_are_indices_made_soft():
    params, apply = tiny()
    hot = np.eye(3, dtype=np.float32)[LABEL]
    by_index, by_weight = apply(params, X, NOISE, LABEL), apply(params, X, NOISE, hot)
    np.testing.assert_allclose(by_weight, by_index, atol=1e-6)


def test_taps_and_injection():
    out, taps = run()
    assert taps[PLACE].shape == ZERO.shape
    u = np.random.default_rng(2).normal(size=ZERO.shape).astype(np.float32)

    main, tapped = run(stream=u)
    np.testing.assert_allclose(tapped[PLACE], taps[PLACE] + u, atol=1e-5)
    assert np.abs(tapped[LATER] - taps[LATER]).max() > 1e-3

    skip, tapped = run(skip=u)
    np.testing.assert_array_equal(tapped[LATER], taps[LATER])  # later blocks are unchanged
    assert np.abs(skip - out).max() > 1e-3 and np.abs(skip - main).max() > 1e-3


def test_unknown_places_and_shapes_are_refused():
    params, apply = tiny()
    with pytest.raises(ValueError, match="no block 'enc_5_block0'"):
        apply(params, X, NOISE, taps=("enc_5_block0",))
    with pytest.raises(ValueError, match="no block 'dec_4_in0/skip'"):
        apply(params, X, NOISE, inject={"dec_4_in0/skip": X})
    with pytest.raises(ValueError, match="has shape .2, 8, 8, 3., but the stream there has"):
        apply(params, X, NOISE, inject={"enc_4_block0": X})


def test_dropout_needs_train_and_a_key():
    params, apply = tiny(dropout=0.5)
    quiet = apply(params, X, NOISE, LABEL)
    np.testing.assert_allclose(quiet, tiny()[1](params, X, NOISE, LABEL), atol=1e-6)
    a, b, again = (
        apply(params, X, NOISE, LABEL, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1, 0)
    )
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - quiet).max() > 1e-3


def test_bfloat16_is_close_and_returns_the_input_dtype():
    params, apply = tiny()
    exact = apply(params, X, NOISE, LABEL)
    rough = tiny(dtype="bfloat16")[1](params, X, NOISE, LABEL)
    assert rough.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert 1e-5 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.05


def test_remat_changes_memory_only():
    small = dict(resolution=4, channels=8, channel_mult=(1,), head_dim=8, dropout=0.3)
    params = random_params(unet(**small))
    x, rngs = X[:, :4, :4], {"dropout": jax.random.key(0)}

    def loss(params, remat):
        net = unet(**small, remat=remat)
        return jnp.mean(jnp.square(net.apply({"params": params}, x, NOISE, train=True, rngs=rngs)))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, recomputed = grad(params, ()), grad(params, ("dec",))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), plain, recomputed)
    blocks = str(jax.make_jaxpr(loss, static_argnums=1)(params, ("dec_4_block",))).count("remat2[")
    assert blocks == 2


def test_overrides_change_widths_and_nothing_else():
    base = plan(unet(**TINY).config)
    narrow = unet(
        **TINY | {"overrides": [["dec_8_block0", "inner", 4], ["map_layer0", "out_channels", 20]]}
    )
    changed = plan(narrow.config)
    assert [b.name for b in changed] == [b.name for b in base]
    block = next(b for b in changed if b.name == "dec_8_block0")
    assert (block.inner, block.groups1) == (4, 2)  # as many groups, each smaller
    params = shapes(narrow)
    assert params["dec_8_block0"]["conv0"]["kernel"].shape[-1] == 4
    assert params["dec_8_block0"]["affine"]["kernel"].shape == (32, 8)
    assert params["map_layer1"]["kernel"].shape == (20, 32)

    # The next block and the decoder block with this skip connection read fewer channels. The
    # shortcut stays, although the widths are now equal.
    stream = unet(**TINY | {"overrides": [["enc_4_block0", "out_channels", 8]] + [
        [name, "out_channels", 8] for name in ("dec_4_in0", "dec_4_in1")]})  # fmt: skip
    widths = {b.name: b for b in plan(stream.config)}
    assert widths["enc_4_block0"].shortcut and widths["enc_4_block0"].in_channels == 8
    assert widths["dec_4_block0"].in_channels == 16
    assert shapes(stream)["enc_4_block0"]["qkv"]["kernel"].shape == (
        8,
        48,
    )  # qk, v keep their widths


@pytest.mark.parametrize(
    "override, message",
    [
        (("enc_9_block0", "inner", 4), "names the block 'enc_9_block0'"),
        (("head", "out_channels", 4), "sets out_channels = 4 of 'head'"),
        (("dec_4_in1", "shortcut", 1), "sets shortcut = 1"),
        (("dec_4_in1", "inner", 0), "give a positive value"),
        (("dec_4_in1", "inner", 7), "splits 7 channels into groups1 = 4"),
        (("dec_4_in1", "out_channels", 8), "adds 16 to 8 channels and has no shortcut"),
        (("dec_4_in0", "qk", 9), "splits 9 channels into heads = 2"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        unet(**TINY, overrides=(override,))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"resolution": 9}, "9 is not a multiple of the stride 2"),
        ({"attention": (16,)}, "attention names .16."),
        ({"group_size": 3}, "splits 16 channels into groups. = 5, which does not divide them"),
    ],
)
def test_configs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        unet(**TINY | fields)


def test_lists_from_json_give_the_same_network():
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items()}
    assert unet(**listed).config == unet(**TINY).config
    assert unet(**TINY).config.noise_feature == "openai"
    assert unet(**TINY | {"family": "ncsnpp"}).config.noise_feature == "edm"
