"""Low-rank adapters start at zero and add two convolutions in sequence, to and from the rank."""

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.cascade.lora import adapted, init_lora
from cheapscale.models.layers import Conv


def weights(key):
    conv = Conv(6).init(key, jnp.zeros((1, 4, 4, 5)))["params"]
    norm = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
    return {"conv": conv, "norm": norm, "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}


def convolve(x, kernel):
    conv = Conv(kernel.shape[-1], use_bias=False)
    return conv.apply({"params": {"kernel": kernel}}, x)


def test_every_kernel_has_adapters_that_start_at_zero(key):
    params = weights(key)
    lora = init_lora(params, 2, key)
    assert jax.tree.map(jnp.shape, lora) == {
        "conv": {"kernel": {"a": (45, 2), "b": (2, 6)}},
        "dense": {"kernel": {"a": (5, 2), "b": (2, 3)}},
    }
    jax.tree.map(np.testing.assert_array_equal, adapted(params, lora), params)
    assert np.abs(lora["conv"]["kernel"]["a"]).min() < np.abs(lora["conv"]["kernel"]["a"]).max()
    # the adapters' rank is at most the kernel's
    assert init_lora(params, 64, key)["dense"]["kernel"]["a"].shape == (5, 3)


def test_an_adapted_convolution_is_one_to_the_rank_and_one_from_it(key):
    params = weights(key)
    lora = jax.tree.map(lambda p: jax.random.normal(key, p.shape), init_lora(params, 2, key))
    x = jax.random.normal(jax.random.key(3), (2, 5, 5, 5))
    full = convolve(x, adapted(params, lora)["conv"]["kernel"])
    a, b = lora["conv"]["kernel"]["a"], lora["conv"]["kernel"]["b"]
    low = convolve(x, a.reshape(3, 3, 5, 2)) @ b
    plain = convolve(x, params["conv"]["kernel"])
    np.testing.assert_allclose(full, plain + low, rtol=1e-4, atol=1e-4)
    # norms and biases do not change
    np.testing.assert_array_equal(adapted(params, lora)["conv"]["bias"], params["conv"]["bias"])
    np.testing.assert_array_equal(adapted(params, lora)["norm"]["scale"], params["norm"]["scale"])
