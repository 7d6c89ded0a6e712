"""DiffAugment: parameters from the key, identity at neutral values, exact operations, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.features.diffaugment import POLICY, augment, parameters, transform


def images(key, side=16, batch=4):
    return jax.random.uniform(key, (batch, side, side, 3), minval=-1.0, maxval=1.0)


def test_same_key_gives_same_parameters_and_samples_differ(key):
    a, b = parameters(key, 64), parameters(key, 64)
    assert set(a) == set(POLICY)
    for name, (low, high) in {
        "brightness": (-0.5, 0.5),
        "saturation": (0, 2),
        "contrast": (0.5, 1.5),
        "translation": (0, 1),
        "cutout": (0, 1),
    }.items():
        np.testing.assert_array_equal(a[name], b[name])
        assert len(np.unique(a[name])) > 60
        assert low <= a[name].min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < a[name].max() < high
    only = parameters(key, 64, ("contrast",))
    np.testing.assert_array_equal(only["contrast"], a["contrast"])


def test_neutral_parameters_are_the_identity(key):
    x = images(key)
    neutral = {
        "brightness": jnp.zeros(4),
        "saturation": jnp.ones(4),
        "contrast": jnp.ones(4),
        "translation": jnp.full((4, 2), 0.5),
    }
    np.testing.assert_allclose(transform(x, neutral), x, atol=1e-6)
    np.testing.assert_array_equal(augment(x, key, ()), x)


@pytest.mark.parametrize("side, shift", [(8, 1), (16, 2), (20, 3)])
def test_translation_moves_whole_pixels_and_draws_zeros_in(key, side, shift):
    x = images(key, side, batch=2)
    corner = transform(x, {"translation": jnp.asarray([[0.0, 0.999], [0.999, 0.5]])})
    expected = np.zeros_like(x)
    expected[0, :-shift, shift:] = x[0, shift:, :-shift]
    expected[1, shift:] = x[1, :-shift]
    np.testing.assert_array_equal(corner, expected)


def test_cutout_is_a_square_of_a_fifth_cut_short_at_the_border(key):
    x = jnp.ones((3, 20, 20, 1))
    out = transform(x, {"cutout": jnp.asarray([[0.5, 0.5], [0.0, 0.0], [0.999, 0.5]])})
    assert [int(v) for v in jnp.sum(1 - out, axis=(1, 2, 3))] == [16, 4, 8]
    assert jnp.all(out[0, 8:12, 8:12] == 0)


def test_colour_operations_keep_what_they_should(key):
    x = images(key)
    grey = transform(x, {"saturation": jnp.zeros(4)})
    np.testing.assert_allclose(grey, jnp.mean(x, 3, keepdims=True) * jnp.ones(3)[None, None, None])
    contrast = transform(x, {"contrast": jnp.full(4, 1.5)})
    np.testing.assert_allclose(contrast.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(contrast.std((1, 2, 3)), 1.5 * x.std((1, 2, 3)), rtol=1e-5)


def test_it_is_differentiable_and_linear_in_the_image(key):
    x, y = images(key), images(jax.random.key(1))
    f = jax.jit(lambda v: augment(v, key))
    tangent = jax.jit(lambda v, d: jax.jvp(f, (v,), (d,))[1])(x, y)
    np.testing.assert_allclose(tangent, f(x + y) - f(x), atol=1e-5)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(f(v) * y)))(x)
    np.testing.assert_allclose(jnp.sum(grads * y), jnp.sum(tangent * y), rtol=1e-4)


def test_unknown_operation_is_named(key):
    with pytest.raises(ValueError, match="'rotate'"):
        augment(images(key), key, ("rotate",))
