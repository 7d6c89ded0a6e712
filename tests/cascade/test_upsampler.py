"""Feature upsamplers: published sizes, both initialisations, and the part computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.cascade.pivot import resize
from cheapscale.cascade.upsampler import (
    BASES,
    UpsamplerConfig,
    Upsamplers,
    init_upsamplers,
    places,
    time_basis,
    upsampler_config,
)
from cheapscale.models.unet import unet
from configs.models import preset

SDXL = (("a", 320), ("b", 640), ("c", 1280), ("d", 1280))


def count(config):
    shapes = jax.eval_shape(lambda key: init_upsamplers(config, key), jax.random.key(0))
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}


def test_parameters_are_the_published_formulas():
    """full: two blocks of 18 c^2 + (E + 7) c; gain: five numbers per channel; 2k: 0.002 M."""
    full = count(UpsamplerConfig("full", SDXL, 1280, init="identity"))
    assert full == {name: 2 * (18 * c * c + (1280 + 7) * c) for name, c in SDXL}
    assert sum(full.values()) == 145_457_280
    gated = count(UpsamplerConfig("full", SDXL, 1280))
    assert {name: gated[name] - full[name] for name in full} == dict(SDXL)  # one gate per channel
    assert sum(count(UpsamplerConfig("gain", SDXL, 1280)).values()) == 5 * 3520
    assert sum(count(UpsamplerConfig("2k", SDXL, 1280)).values()) == 2200
    b, E = 8, 1280
    neck = count(UpsamplerConfig("neck", SDXL, E, width=b))
    for name, c in SDXL:
        assert neck[name] == (c * b + b) + 2 * (18 * b * b + (E + 7) * b) + (b * c + c)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("imagenet64_adm", ("enc_64_block2", "enc_32_block2", "enc_16_block2", "dec_8_in1")),
        ("small16", ("enc_16_block1", "enc_8_block1", "enc_4_block1", "dec_4_in1")),
        ("tiny16", ("enc_16_block0", "enc_8_down", "enc_8_block0", "dec_8_in1")),
    ],
)
def test_four_places_in_the_networks_order(name, expected):
    """Three encoder levels and the bottleneck; networks of fewer levels use more blocks of each."""
    assert places(unet(**preset(name)).config) == expected


CHANNELS = (("x", 8), ("y", 16))


def features(key):
    kx, ky = jax.random.split(key)
    return {"x": jax.random.normal(kx, (2, 4, 6, 8)), "y": jax.random.normal(ky, (2, 2, 3, 16))}


def lifted_and_added(config, params, f, sigma, seed=1):
    module = Upsamplers(config)
    emb = jax.random.normal(jax.random.key(seed), (2, config.emb))

    def both(params, f, sigma):
        once = module.apply({"params": params}, f, (2.0, 2.0), method=Upsamplers.lift)
        return module.apply({"params": params}, once, emb, sigma)

    return jax.jit(both)(params, f, sigma)


@pytest.mark.parametrize("design", ["full", "neck", "gain", "2k"])
def test_a_zero_start_adds_nothing_and_still_learns(design, key):
    """u is exactly 0, and not after one gradient step, because only one factor is zero."""
    config = UpsamplerConfig(design, CHANNELS, 12, width=4)
    params, f, sigma = init_upsamplers(config, key), features(key), jnp.array([0.3, 2.0])
    u = lifted_and_added(config, params, f, sigma)
    assert {name: value.shape for name, value in u.items()} == {
        "x": (2, 8, 12, 8), "y": (2, 4, 6, 16)
    }  # fmt: skip
    assert all(np.array_equal(value, np.zeros_like(value)) for value in u.values())

    def fit(params):
        u = lifted_and_added(config, params, f, sigma)
        return sum(jnp.sum((v - resize(f[n], v.shape[1:3])) ** 2) for n, v in u.items())

    grads = jax.grad(fit)(params)
    by_place = {n: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[n])) for n in grads}
    assert all(size > 1e-3 for size in by_place.values())
    moved = jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)
    second = jax.grad(fit)(moved)
    assert fit(moved) < fit(params)
    # after the first step, every parameter that affects the output has a gradient
    still = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(second)
        if not np.any(g)
    ]
    assert not still


@pytest.mark.parametrize("design", ["full", "gain", "2k"])
def test_an_identity_start_is_the_enlarged_feature(design, key):
    config = UpsamplerConfig(design, CHANNELS, 12, init="identity")
    f = features(key)
    u = lifted_and_added(config, init_upsamplers(config, key), f, jnp.array([0.1, 3.0]))
    for name, value in u.items():
        expected = resize(f[name], value.shape[1:3])
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)


def test_a_gain_is_its_series_in_the_cosine_schedules_time(key):
    """u_c = sum_k W[k, c] cos(k tau) up(f)_c; eight channels share W in the design 2k."""
    sigma = jnp.array([0.0, 0.7])
    tau = 2 * np.arctan([0.0, 0.7])
    np.testing.assert_allclose(
        time_basis(sigma), np.cos(tau[:, None] * np.arange(BASES)), rtol=1e-5, atol=1e-6
    )
    f = features(key)
    for design, shared in (("gain", 1), ("2k", 8)):
        config = UpsamplerConfig(design, CHANNELS, 12)
        params = jax.tree.map(
            lambda p: jax.random.normal(key, p.shape), init_upsamplers(config, key)
        )
        u = lifted_and_added(config, params, f, sigma)
        W = np.repeat(np.asarray(params["y"]["gain"]), shared, axis=1)
        for i in range(2):
            gain = np.cos(tau[i] * np.arange(BASES)) @ W
            expected = gain * np.asarray(resize(f["y"], (4, 6)))[i]
            np.testing.assert_allclose(u["y"][i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("design", ["full", "neck", "gain"])
def test_time_enters(design, key):
    config = UpsamplerConfig(design, CHANNELS, 12, width=4)
    fill = lambda p: 0.3 * jax.random.normal(key, p.shape)  # noqa: E731
    params, f = jax.tree.map(fill, init_upsamplers(config, key)), features(key)
    one = lifted_and_added(config, params, f, jnp.array([0.3, 0.3]))
    # a gain depends on sigma, the blocks on the network's embedding of sigma
    other = lifted_and_added(config, params, f, jnp.array([2.0, 2.0]), seed=2)
    assert min(float(jnp.abs(one[n] - other[n]).max()) for n in one) > 1e-2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"design": "neck", "width": 14}, "width 14 does not divide into 3 norm groups"),
        ({"design": "neck", "init": "identity"}, "cannot pass through a neck"),
        ({"design": "2k", "channels": (("z", 12),)}, "among 8 channels, but z has 12"),
    ],
)
def test_designs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UpsamplerConfig(**{"design": "gain", "channels": CHANNELS, "emb": 12} | change)


def test_the_modules_fit_their_network():
    model = unet(**preset("tiny16")).config
    config = upsampler_config(model, "neck", width=4)
    assert config.channels == (
        ("enc_16_block0", 32), ("enc_8_down", 32), ("enc_8_block0", 64), ("dec_8_in1", 64)
    )  # fmt: skip
    assert config.emb == 128 and config.width == 4
    small = unet(resolution=8, channels=8, channel_mult=(1,), num_blocks=1).config
    with pytest.raises(ValueError, match="offers 3 places for upsamplers instead of 4"):
        upsampler_config(small, "gain")
