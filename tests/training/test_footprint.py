"""Figures of a plan against what can be counted by hand, and against the compiler's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.training import sharding
from cheapscale.training.footprint import traced_bytes, traced_flops, tree_bytes

KB = 1024
X = jax.ShapeDtypeStruct((16, 16), jnp.float32)  # 1 KB


def test_flops_of_a_product_are_two_per_multiplication():
    a, b = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((32, 5), jnp.float32)
    assert traced_flops(jnp.matmul, a, b) == 2 * 8 * 32 * 5
    twice = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert traced_flops(jnp.matmul, twice, b) == 2 * traced_flops(jnp.matmul, a, b)


def test_a_chain_holds_two_values_and_a_sum_of_branches_all_of_them():
    def chain(x):
        for _ in range(5):
            x = jnp.sin(x)
        return x

    def branches(x):
        made = [jnp.sin(x), jnp.cos(x), jnp.tan(x)]
        return made[0] + made[1] + made[2]

    assert traced_bytes(jnp.sin, X) == KB
    assert traced_bytes(chain, X) == 2 * KB  # what is read and what is made
    assert traced_bytes(branches, X) == 4 * KB  # all three, and the first sum


def test_what_the_backward_pass_needs_is_kept_unless_it_is_recomputed():
    def layers(n, body):
        def loss(x):
            for _ in range(n):
                x = body(x)
            return x.sum()

        return jax.grad(loss)

    def block(x):
        for _ in range(4):
            x = jnp.sin(x)
        return x

    per_layer = [
        (traced_bytes(layers(20, body), X) - traced_bytes(layers(10, body), X)) / 10
        for body in (block, jax.checkpoint(block))
    ]
    assert per_layer == [4 * KB, KB]  # one for each sine; only the block's input


def test_a_loop_counts_once_and_a_result_in_an_arguments_place_not_at_all():
    def looped(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(jnp.cos(c)), None), x, None, length=50)[0]

    assert traced_bytes(looped, X) == 2 * KB

    def step(x, y):
        return x + y, x * y

    assert traced_bytes(step, X, X) == 2 * KB
    assert traced_bytes(step, X, X, donated=1) == KB


def test_values_of_the_batch_are_split_over_the_devices_and_gradients_are_not():
    w = jax.ShapeDtypeStruct((16, 48), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32)

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)

    whole = traced_bytes(gradient, w, x)
    split = traced_bytes(gradient, w, x, batch_size=64, ways=8)
    weights = 16 * 48 * 4
    assert split - weights == pytest.approx((whole - weights) / 8, rel=0.3)
    mesh = sharding.make_mesh()
    placed = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding.batch_sharding(mesh))
    assert tree_bytes({"x": placed, "w": w}) == 64 * 16 * 4 / 8 + weights


def test_memory_of_a_network_is_near_what_the_compiler_allocates():
    def loss(params, x):
        for kernel in params:
            x = jax.nn.silu(jax.lax.conv(x, kernel, (1, 1), "SAME"))
        return (x**2).mean()

    params = [jax.ShapeDtypeStruct((16, 16, 3, 3), jnp.float32)] * 6
    x = jax.ShapeDtypeStruct((8, 16, 32, 32), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    memory = compiled.memory_analysis()
    allocated = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert 0.6 < traced_bytes(jax.grad(loss), params, x) / allocated < 1.7
    counted = traced_flops(jax.grad(loss), params, x)
    np.testing.assert_allclose(counted, compiled.cost_analysis()["flops"], rtol=0.05)
