"""Distances: zero iff equal, symmetric, the closed form on known maps, gradients, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.features.diffaugment import augment
from cheapscale.features.distances import (
    feature_distance,
    lpips_distance,
    normalise,
    pixel_distance,
)
from cheapscale.features.mixing import mix
from cheapscale.features.network import FeatureNetwork, enlarge


def linear_network(lin=False):
    """Two maps: the pixels themselves mixed to 4 channels at strides 2 and 4."""
    rng = np.random.default_rng(0)
    params = {"mix": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    if lin:
        params["lin"] = [jnp.asarray([1.0, 2.0, 0.0, 1.0]), jnp.ones(4)]

    def apply(params, x):
        x = enlarge(x, 8)
        b, h, w, _ = x.shape
        return tuple(
            x.reshape(b, h // s, s, w // s, s, 3).mean((2, 4)) @ params["mix"] for s in (2, 4)
        )

    return FeatureNetwork("linear", apply, params, input_size=8)


def images(seed):
    return jax.random.uniform(jax.random.key(seed), (3, 4, 4, 3), minval=-1.0, maxval=1.0)


CASES = {
    "pixel": lambda: pixel_distance(),
    "feature": lambda: feature_distance([linear_network()], resolution=4, width=4),
    "lpips": lambda: lpips_distance(linear_network(lin=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_zero_iff_equal_symmetric_and_finite_gradients(name):
    distance = CASES[name]()
    frozen = distance.init_frozen(jax.random.key(0))
    value_and_grad = jax.jit(
        jax.value_and_grad(
            lambda y, x, key: (lambda d: (jnp.sum(d), d))(distance.apply(frozen, x, y, key)),
            has_aux=True,
        )
    )
    x, y, key = images(1), images(2).at[0].set(images(1)[0]), jax.random.key(3)
    (_, d), grad = value_and_grad(y, x, key)
    assert d.shape == (3,) and d[0] == 0 and float(d[1:].min()) > 1e-3
    assert float(jnp.abs(grad[0]).max()) < 1e-5 and float(jnp.abs(grad[1:]).max()) > 1e-5
    np.testing.assert_allclose(value_and_grad(x, y, key)[0][1], d, rtol=1e-5)
    (_, flat), grad = value_and_grad(jnp.zeros_like(x), jnp.zeros_like(x), key)
    assert not jnp.any(flat) and jnp.all(jnp.isfinite(grad))


def test_closed_forms_on_the_maps():
    x, y, key = images(1), images(2), jax.random.key(3)
    network = linear_network(lin=True)
    maps = [network.apply(network.params, v) for v in (x, y)]
    squares = [np.asarray(normalise(f) - normalise(g)) ** 2 for f, g in zip(*maps)]
    lpips = lpips_distance(network)
    np.testing.assert_allclose(
        lpips.apply(lpips.init_frozen(key), x, y, key),
        (squares[0] @ np.asarray([1.0, 2.0, 0.0, 1.0])).mean((1, 2))
        + squares[1].sum(3).mean((1, 2)),
        rtol=1e-5,
    )
    feature = feature_distance([network], resolution=4, width=4, policy=())
    frozen = feature.init_frozen(key)
    mixed = [mix(frozen["linear"]["mixing"], m) for m in maps]
    squares = [np.asarray(normalise(f) - normalise(g)) ** 2 for f, g in zip(*mixed)]
    expected = sum(s.sum(3).mean((1, 2)) for s in squares)
    np.testing.assert_allclose(feature.apply(frozen, x, y, key), expected, rtol=1e-5)


def test_both_images_are_augmented_alike_after_enlarging():
    x, y, key = images(1), images(2), jax.random.key(3)
    augmented, plain = (
        feature_distance([linear_network()], resolution=4, width=4, policy=policy)
        for policy in (("translation", "cutout", "brightness"), ())
    )
    frozen = plain.init_frozen(jax.random.key(0))
    large = [augment(enlarge(v, 8), key, ("translation", "cutout", "brightness")) for v in (x, y)]
    np.testing.assert_allclose(
        augmented.apply(frozen, x, y, key), plain.apply(frozen, *large, key), rtol=1e-5
    )


def test_projections_are_drawn_from_the_key():
    distance = CASES["feature"]()
    one, two = (distance.init_frozen(jax.random.key(k))["linear"] for k in (0, 1))
    np.testing.assert_array_equal(one["network"]["mix"], two["network"]["mix"])
    for a, b in zip(jax.tree.leaves(one["mixing"]), jax.tree.leaves(two["mixing"])):
        assert not np.array_equal(a, b)


def test_wrong_networks_are_named():
    with pytest.raises(ValueError, match="'linear' has none"):
        lpips_distance(linear_network())
    with pytest.raises(ValueError, match="distinct names"):
        feature_distance([], resolution=4)
