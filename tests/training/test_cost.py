"""FLOPs and memory of compiled and of traced calls, against closed forms."""

import time

import jax
import jax.numpy as jnp
import pytest

from cheapscale.training import cost
from cheapscale.training import mesh as sharding
from cheapscale.training.cost import traced_flops, tree_bytes


def test_a_matrix_product_costs_two_flops_per_multiplication():
    x, w = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    measured = cost.cost_of_call(lambda x, w: x @ w, x, w)
    assert measured.flops == pytest.approx(2 * 8 * 32 * 16, rel=0.01)
    assert measured.peak_bytes >= 4 * (8 * 32 + 32 * 16) + 4 * 8 * 16


def test_cost_grows_with_the_batch():
    def flops(batch):
        return cost.cost_of_call(lambda x: x @ x.T @ x, jnp.ones((batch, 4))).flops

    assert flops(64) == pytest.approx(4 * flops(32), rel=0.01)


def test_programs_with_loops_are_refused():
    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    with pytest.raises(ValueError, match="holds a scan"):
        cost.cost_of_call(jax.jit(lambda x: looped(x) + 1), jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="holds a while"):
        cost.cost_of_call(
            lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x), jnp.ones(2)
        )


def test_parameters_are_counted_from_shapes_too():
    tree = {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32), "b": [jnp.zeros(5)]}
    assert cost.param_count(tree) == 17


def test_latency_is_the_wait_for_the_result_without_the_compilation():
    compiled = []

    def slow(x):
        compiled.append(time.sleep(0.5))
        return jax.pure_callback(lambda x: (time.sleep(0.05), x)[1], x, x)

    assert 0.05 <= cost.latency(slow, jnp.ones(3), repeats=3) < 0.5
    assert len(compiled) == 1


def test_a_counter_adds_up_the_flops_of_its_calls():
    counter = cost.FlopCounter(lambda x: x @ x)
    for size in (4, 8, 8):
        counter(jnp.ones((size, size)))
    assert counter.flops == 2 * (4**3 + 8**3 + 8**3) and len(counter.programs) == 2


def test_flops_of_a_product_are_two_per_multiplication():
    a, b = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((32, 5), jnp.float32)
    assert traced_flops(jnp.matmul, a, b) == 2 * 8 * 32 * 5
    twice = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert traced_flops(jnp.matmul, twice, b) == 2 * traced_flops(jnp.matmul, a, b)


def test_bytes_of_a_tree_are_those_of_one_device(eight_devices):
    w = jax.ShapeDtypeStruct((16, 48), jnp.float32)
    mesh = sharding.make_mesh()
    placed = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding.batch_sharding(mesh))
    assert tree_bytes({"x": placed, "w": w}) == 64 * 16 * 4 / 8 + 16 * 48 * 4
