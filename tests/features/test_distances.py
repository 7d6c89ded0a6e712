"""Distances: zero iff equal, symmetric, the closed form on known maps, gradients, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.features.diffaugment import POLICY, augment
from cheapscale.features.distances import (
    feature_distance,
    lpips_distance,
    normalise,
    pixel_distance,
)
from cheapscale.features.mixing import View, apart, mix, projections, together
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


def feature(policy=POLICY):
    """(distance (frozen, x, y, key) -> [b], frozen) of projected features."""
    p = projections([linear_network()], resolution=4, width=4, policy=policy)

    def distance(frozen, x, y, key):
        views = {"x": View("distance", x, key), "y": View("distance", y, key)}
        maps = p.apply(frozen, views)
        return feature_distance(maps["x"], maps["y"])

    return distance, p.init_frozen(jax.random.key(0))


def lpips():
    network = linear_network(lin=True)
    return lambda frozen, x, y, key: lpips_distance(network)(frozen, x, y), network.params


CASES = {
    "pixel": lambda: (lambda frozen, x, y, key: pixel_distance(x, y), {}),
    "feature": feature,
    "lpips": lpips,
}


@pytest.mark.parametrize("name", CASES)
def test_zero_iff_equal_symmetric_and_finite_gradients(name):
    distance, frozen = CASES[name]()
    value_and_grad = jax.jit(
        jax.value_and_grad(
            lambda y, x, key: (lambda d: (jnp.sum(d), d))(distance(frozen, x, y, key)),
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
    np.testing.assert_allclose(
        lpips_distance(network)(network.params, x, y),
        (squares[0] @ np.asarray([1.0, 2.0, 0.0, 1.0])).mean((1, 2))
        + squares[1].sum(3).mean((1, 2)),
        rtol=1e-5,
    )
    distance, frozen = feature(policy=())
    mixed = [mix(frozen["linear"]["distance"], m) for m in maps]
    squares = [np.asarray(normalise(f) - normalise(g)) ** 2 for f, g in zip(*mixed)]
    expected = sum(s.sum(3).mean((1, 2)) for s in squares)
    np.testing.assert_allclose(distance(frozen, x, y, key), expected, rtol=1e-5)


def test_both_images_are_augmented_alike_after_enlarging():
    x, y, key = images(1), images(2), jax.random.key(3)
    policy = ("translation", "cutout", "brightness")
    augmented, frozen = feature(policy)
    large = [augment(enlarge(v, 8), key, policy) for v in (x, y)]
    kept = projections([linear_network()], resolution=8, width=4, policy=())
    maps = [kept.apply(frozen, {"v": View("distance", v, key)})["v"] for v in large]
    np.testing.assert_allclose(augmented(frozen, x, y, key), feature_distance(*maps), rtol=1e-5)


def test_several_batches_in_one_pass_are_the_same_as_one_by_one():
    """Each reader has its own random projections of the same frozen network."""
    p = projections([linear_network()], resolution=4, width=4)
    frozen = p.init_frozen(jax.random.key(0))
    views = {
        "a": View("discriminator", images(1), jax.random.key(1)),
        "b": View("distance", images(2), jax.random.key(2)),
        "c": View("discriminator", images(3), jax.random.key(3)),
    }
    found = p.apply(frozen, views)
    for name, view in views.items():
        alone = p.apply(frozen, {name: view})[name]
        for one, other in zip(found[name]["linear"], alone["linear"], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    own = p.apply(frozen, {"x": views["a"], "y": views["a"]._replace(reader="distance")})
    assert not np.allclose(own["x"]["linear"][0], own["y"]["linear"][0], atol=1e-3)
    batches = [images(seed) for seed in range(3)]
    for one, other in zip(apart(together(batches), 3), batches, strict=True):
        np.testing.assert_array_equal(one, other)


def test_projections_are_drawn_from_the_key():
    p = projections([linear_network()], resolution=4, width=4)
    one, two = (p.init_frozen(jax.random.key(k))["linear"] for k in (0, 1))
    np.testing.assert_array_equal(one["network"]["mix"], two["network"]["mix"])
    for a, b in zip(jax.tree.leaves(one["distance"]), jax.tree.leaves(two["distance"])):
        assert not np.array_equal(a, b)


def test_wrong_networks_are_named():
    with pytest.raises(ValueError, match="'linear' has none"):
        lpips_distance(linear_network())
