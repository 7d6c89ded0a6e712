"""Compiled cost against what a matrix product is known to cost."""

import types

import jax
import jax.numpy as jnp
import pytest

from cheapscale.evaluation import cost


def test_a_matrix_product_costs_two_flops_per_multiplication():
    x, w = jax.ShapeDtypeStruct((8, 32), jnp.float32), jax.ShapeDtypeStruct((32, 16), jnp.float32)
    measured = cost.cost_of_call(lambda x, w: x @ w, x, w)
    assert measured.flops == pytest.approx(2 * 8 * 32 * 16, rel=0.01)
    assert measured.argument_bytes == 4 * (8 * 32 + 32 * 16)
    assert measured.output_bytes == 4 * 8 * 16
    assert measured.peak_bytes >= measured.argument_bytes + measured.output_bytes


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


def test_latency_is_the_median_wait_for_the_result_without_the_first(monkeypatch):
    """On a clock that moves only while a result is waited for."""
    now, waits, traced, seen = [0.0], iter([100.0, 9.0, 1.0, 2.0]), [], []

    def wait(result):
        now[0] += next(waits)
        seen.append(float(result))
        return result

    def work(x):
        traced.append(x)
        return jnp.sum(x) + 1

    monkeypatch.setattr(cost.jax, "block_until_ready", wait)
    monkeypatch.setattr(cost, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert cost.latency(work, jnp.ones(3), repeats=3) == 2
    assert seen == [4.0] * 4 and next(waits, None) is None
    assert len(traced) == 1  # compiled once, in the call that does not count
