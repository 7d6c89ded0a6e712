"""Low-rank adapters: what is added, and that nothing is at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models.layers import Conv, convolve, uniform
from cheapscale.models.lora import adapted, init_lora


def weights(key):
    conv = Conv(6, uniform(1.0)).init(key, jnp.zeros((1, 4, 4, 5)))["params"]
    norm = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
    return {"conv": conv, "norm": norm, "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}


def test_adapters_start_as_the_network_itself_and_are_of_every_kernel(key):
    params = weights(key)
    lora = init_lora(params, 2, key)
    assert jax.tree.map(jnp.shape, lora) == {
        "conv": {"kernel": {"a": (45, 2), "b": (2, 6)}},
        "dense": {"kernel": {"a": (5, 2), "b": (2, 3)}},
    }
    jax.tree.map(np.testing.assert_array_equal, adapted(params, lora), params)
    assert np.abs(lora["conv"]["kernel"]["a"]).min() < np.abs(lora["conv"]["kernel"]["a"]).max()
    # no larger than the kernel's own rank
    assert init_lora(params, 64, key)["dense"]["kernel"]["a"].shape == (5, 3)
    with pytest.raises(ValueError, match="lora_rank is 0"):
        init_lora(params, 0, key)


def test_an_adapted_convolution_is_one_to_the_rank_and_one_from_it(key):
    params = weights(key)
    lora = jax.tree.map(lambda p: jax.random.normal(key, p.shape), init_lora(params, 2, key))
    x = jax.random.normal(jax.random.key(3), (2, 5, 5, 5))
    full = convolve(x, adapted(params, lora, scale=0.5)["conv"]["kernel"], 1)
    a, b = lora["conv"]["kernel"]["a"], lora["conv"]["kernel"]["b"]
    low = convolve(x, a.reshape(3, 3, 5, 2), 1) @ b
    plain = convolve(x, params["conv"]["kernel"], 1)
    np.testing.assert_allclose(full, plain + 0.5 * low, rtol=1e-4, atol=1e-4)
    # norms and biases stay
    np.testing.assert_array_equal(adapted(params, lora)["conv"]["bias"], params["conv"]["bias"])
    assert adapted(params, lora)["norm"] is params["norm"]
