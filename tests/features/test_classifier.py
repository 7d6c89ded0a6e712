"""The small classifier: shapes, independence of samples, variance at initialisation, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cheapscale.features import classifier
from cheapscale.features.classifier import Classifier


@pytest.fixture(scope="module", autouse=True)
def all_levels():
    """All four levels, of which tests/conftest.py leaves two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "WIDTHS", (1, 2, 3, 4))
        yield


@pytest.fixture(scope="module")
def small(all_levels):
    model = Classifier(num_classes=3, width=8, input_size=16)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return model, params, jax.jit(lambda p, x: model.apply({"params": p}, x))


def test_maps_are_finest_first_and_small_images_are_enlarged(small):
    model, params, _ = small
    for side, expected in ((8, 16), (16, 16), (24, 24)):
        logits, maps, penultimate = jax.eval_shape(
            lambda x: model.apply({"params": params}, x), jnp.zeros((2, side, side, 3))
        )
        assert logits.shape == (2, 3) and penultimate.shape == (2, 64)
        assert [m.shape for m in maps] == [
            (2, expected // s, expected // s, 8 * m) for s, m in zip((1, 2, 4, 8), (1, 2, 3, 4))
        ]


def test_initial_maps_have_unit_scale_and_samples_are_independent(small):
    _, params, apply = small
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3)) * 0.5
    _, maps, penultimate = apply(params, x)
    for m in maps:
        assert 0.3 < float(jnp.std(m)) < 2.0
    other = apply(params, x.at[1:].set(-1.0))
    for a, b in zip((*maps, penultimate), (*other[1], other[2])):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-5, atol=1e-5)


def test_kernel_scale_and_offset_do_not_matter(small):
    _, params, apply = small
    x = jax.random.normal(jax.random.key(2), (4, 16, 16, 3))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, v: 3.0 * v + 0.5 if path[-1].key == "kernel" and v.ndim == 4 else v, params
    )
    np.testing.assert_allclose(apply(params, x)[2], apply(moved, x)[2], rtol=1e-3, atol=1e-3)


def test_it_learns_three_colours(small):
    model, params, _ = small
    tx = optax.adam(3e-3)

    def loss(p, x, y):
        logits = model.apply({"params": p}, x)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(p, state, x, y):
        value, grads = jax.value_and_grad(loss)(p, x, y)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    rng = np.random.default_rng(0)
    state, history = tx.init(params), []
    for _ in range(15):
        y = rng.integers(0, 3, 4)
        x = rng.normal(size=(4, 16, 16, 3)).astype(np.float32) * 0.3
        x += np.eye(3, dtype=np.float32)[y][:, None, None, :]
        params, state, value = step(params, state, x, y)
        history.append(float(value))
    assert history[0] == pytest.approx(np.log(3.0), rel=1e-5)
    assert history[-1] < 0.3


def test_an_input_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="input_size=20"):
        Classifier(3, input_size=20).init(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
