"""Layers against their definitions: norm, attention, convolution, resampling, embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models import layers

NEAREST, FIR = (1, 1), (1, 3, 3, 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def group_norm(x, groups, eps):
    b, h, w, c = x.shape
    x = x.astype(np.float64).reshape(b, h, w, groups, c // groups)
    mean = x.mean(axis=(1, 2, 4), keepdims=True)
    var = x.var(axis=(1, 2, 4), keepdims=True)
    return ((x - mean) / np.sqrt(var + eps)).reshape(b, h, w, c)


@pytest.mark.parametrize("offset, tolerance", [(0.0, 1e-5), (1000.0, 1e-3)])
def test_group_norm_is_its_definition_also_far_from_zero(offset, tolerance):
    x = normal(0, 2, 4, 6, 12) * np.linspace(0.1, 3, 12, dtype=np.float32) + np.float32(offset)
    scale, bias = normal(1, 12), normal(2, 12)
    norm = layers.GroupNorm(groups=3, eps=1e-5)
    y = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(y, group_norm(x, 3, 1e-5) * scale + bias, atol=tolerance)


def test_group_norm_computes_statistics_in_float32():
    x = jnp.asarray(normal(0, 1, 16, 16, 4) + 30, jnp.bfloat16)
    norm = layers.GroupNorm(groups=1, eps=1e-5)
    y = norm.apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x)
    assert y.dtype == jnp.bfloat16
    expected = group_norm(np.asarray(x, np.float64), 1, 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2e-2)


def test_attention_per_head_with_narrower_values():
    q, k, v = normal(0, 2, 5, 6), normal(1, 2, 5, 6), normal(2, 2, 5, 4)
    out = np.asarray(layers.attention(q, k, v, heads=2))
    for head in range(2):
        qh, kh, vh = q[..., 3 * head :][..., :3], k[..., 3 * head :][..., :3], v[..., 2 * head :]
        logits = np.einsum("bqd,bkd->bqk", qh, kh) / np.sqrt(3)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(out[..., 2 * head :][..., :2], weights @ vh[..., :2], atol=1e-5)


@pytest.mark.parametrize("most, parts", [(150, 3), (149, 3), (1, 15)])
def test_attention_in_parts_is_attention_with_the_same_gradient(most, parts, monkeypatch):
    """Queries do not see each other. 15 of them divide into 3 equal parts, but not into 2 (150)."""
    q, k, v, bias = (
        normal(0, 2, 15, 6),
        normal(1, 2, 5, 6),
        normal(2, 2, 5, 4),
        normal(3, 2, 1, 1, 5),
    )

    def output_and_slope(q):
        def total(q):
            out = layers.attention(q, k, v, heads=2, bias=bias)
            return (out**2).sum(), out

        return jax.value_and_grad(total, has_aux=True)(q)

    (_, whole), slope = output_and_slope(q)
    monkeypatch.setattr(layers, "MOST_LOGITS", most)  # of 2 * 2 * 15 * 5
    (_, out), slope_in_parts = output_and_slope(q)
    np.testing.assert_allclose(out, whole, rtol=1e-6)
    np.testing.assert_allclose(slope_in_parts, slope, rtol=1e-5, atol=1e-6)
    program = str(jax.make_jaxpr(output_and_slope)(q))
    assert f"length={parts}" in program


def test_convolution_is_its_definition():
    x, kernel = normal(0, 2, 5, 4, 3), normal(1, 3, 3, 3, 6)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        padded[:, i : i + 5, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    conv = layers.Conv(6, use_bias=False)
    np.testing.assert_allclose(conv.apply({"params": {"kernel": kernel}}, x), expected, atol=1e-4)


def test_layers_compute_in_the_dtype_of_their_input_with_float32_weights():
    x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
    for layer in (layers.Conv(2), layers.Dense(2), layers.GroupNorm(1, 1e-5)):
        y, variables = layer.init_with_output(jax.random.key(0), x)
        assert y.dtype == jnp.bfloat16
        assert {w.dtype for w in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("taps", [NEAREST, FIR])
def test_resampling_filters_are_normalised_and_adjoint(taps):
    x, y = normal(0, 1, 8, 8, 2), normal(1, 1, 4, 4, 2)
    down, up = layers.downsample(x, taps), layers.upsample(y, taps)
    # <down(x), y> = <x, up(y)> / 4: up is the transpose of down, scaled to unit gain
    np.testing.assert_allclose((down * y).sum(), (x * up).sum() / 4, rtol=1e-4)
    ones = jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(layers.downsample(ones, taps)[0, 1:-1, 1:-1], 1, atol=1e-6)
    np.testing.assert_allclose(layers.upsample(ones, taps)[0, 2:-2, 2:-2], 1, atol=1e-6)


def test_nearest_enlargement_is_undone_by_averaging():
    x = normal(0, 2, 4, 6, 3)
    up = layers.upsample(x, NEAREST)
    np.testing.assert_array_equal(up, x.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_allclose(layers.downsample(up, NEAREST), x, atol=1e-6)


def test_fir_values_on_an_impulse():
    impulse = np.zeros((1, 4, 4, 1), np.float32)
    impulse[0, 1, 1] = 1
    row = np.asarray(layers.upsample(impulse, FIR))[0, 2, :, 0]
    np.testing.assert_allclose(row, np.array([0, 1, 3, 3, 1, 0, 0, 0]) / 4 * 3 / 4)
    down = np.asarray(layers.downsample(impulse, FIR))[0, :, 0, 0]
    np.testing.assert_allclose(down, np.array([3, 1]) / 8 * 3 / 8)


def test_unknown_filter_is_refused():
    with pytest.raises(ValueError, match="no upsampling with filter taps"):
        layers.upsample(jnp.zeros((1, 2, 2, 1)), (1, 2, 1))


def test_sinusoids_are_cosines_then_sines_of_a_geometric_ladder():
    value = np.array([0.0, 7.5], np.float32)
    ladder = 10000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([np.cos(np.outer(value, ladder)), np.sin(np.outer(value, ladder))], 1)
    np.testing.assert_allclose(layers.sinusoids(value, 8), expected, atol=1e-5)
    lowest = layers.sinusoids(np.array([1e4], np.float32), 8, endpoint=True)[0, 3]
    np.testing.assert_allclose(lowest, np.cos(1.0), atol=1e-4)


def test_fourier_frequencies_receive_no_gradient():
    net = layers.Fourier(width=8)
    params = {"freqs": normal(0, 4)}
    grad = jax.grad(lambda p: net.apply({"params": p}, jnp.ones(2)).sum())(params)
    np.testing.assert_array_equal(grad["freqs"], 0)


@pytest.mark.parametrize("mode, fan", [("fan_in", 9 * 16), ("fan_avg", 9 * 24)])
def test_initialiser_has_the_variance_of_its_fan(mode, fan):
    kernel = layers.uniform(0.5, mode)(jax.random.key(0), (3, 3, 16, 32))
    np.testing.assert_allclose(kernel.var() * fan, 0.5, rtol=0.05)
    assert not layers.uniform(0)(jax.random.key(0), (3, 4)).any()
