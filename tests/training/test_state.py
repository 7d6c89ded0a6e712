"""Splitting of states, EMA, random streams, and optimisers, against closed forms and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cheapscale.training.optim import make_optimiser
from cheapscale.training.state import (
    Optimiser,
    averaged,
    create_state,
    merge,
    split,
    stream_key,
    update_ema,
)

TREE = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, "b": {"kernel": jnp.ones(3)}}


def test_split_and_merge_are_inverse():
    kept, rest = split(TREE, lambda path: path.endswith("kernel"))
    assert set(kept) == {"a", "b"} and rest == {"a": {"bias": TREE["a"]["bias"]}}
    assert jax.tree.structure(merge(kept, rest)) == jax.tree.structure(TREE)


def test_merge_refuses_overlapping_trees():
    with pytest.raises(ValueError, match="the leaf 'b/kernel'"):
        merge(TREE, {"b": {"kernel": jnp.ones(3)}})


def test_frozen_leaves_have_no_optimiser_state_and_do_not_move():
    """The EMA has the leaves that train; with it, all are there."""
    optimiser = Optimiser(optax.adam(0.1), lambda path: path.startswith("b/"))
    moving, _ = optimiser.split(TREE)
    state = create_state({"net": TREE}, {}, {"net": optimiser}, ["net"])
    assert sum(x.size for x in jax.tree.leaves(state.opt_state["net"])) == 2 * 3 + 1
    params, _ = optimiser.apply(jax.tree.map(jnp.ones_like, moving), state.opt_state["net"], TREE)
    assert params["a"]["kernel"] is TREE["a"]["kernel"]
    np.testing.assert_allclose(params["b"]["kernel"], 0.9, rtol=1e-5)
    assert jax.tree.structure(state.ema_params["net"]) == jax.tree.structure(moving)
    moved = state.replace(params={"net": params})
    np.testing.assert_array_equal(averaged(moved, "net")["b"]["kernel"], TREE["b"]["kernel"])
    assert averaged(moved, "net")["a"]["kernel"] is TREE["a"]["kernel"]


def test_ema_decay_is_capped_by_the_age_of_the_run():
    for n, decay in ((0, 0.1), (10, 11 / 20), (10**6, 0.999)):
        ema = update_ema({"w": jnp.zeros(())}, {"w": jnp.ones(())}, jnp.asarray(n), 0.999)
        np.testing.assert_allclose(ema["w"], 1 - decay, rtol=1e-4)


def test_streams_and_steps_draw_independent_numbers():
    draws = {
        (stream, step): float(jax.random.normal(stream_key(0, stream, step)))
        for stream in ("init", "step") for step in (0, 1)
    }  # fmt: skip
    assert len(set(draws.values())) == 4
    assert float(jax.random.normal(stream_key(0, "step", 1))) == draws["step", 1]


def test_warmup_reaches_the_rate_and_stays():
    tx = make_optimiser("sgd", 1.0, warmup_steps=4)
    state, params, moved = tx.init(jnp.zeros(())), jnp.zeros(()), []
    for _ in range(6):
        update, state = tx.update(jnp.ones(()), state, params)
        moved.append(-float(update))
    np.testing.assert_allclose(moved, [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


def test_a_decay_that_ends_before_the_rise_is_refused():
    with pytest.raises(ValueError, match="the rate rises for optim.warmup_steps 10"):
        make_optimiser("sgd", 1.0, warmup_steps=10, decay_steps=10)


def test_radam_equals_pytorchs():
    torch = pytest.importorskip("torch", reason="the parity test needs the test extra's PyTorch")
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=5), rng.normal(size=(12, 5))
    weight = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.RAdam([weight], lr=0.01)
    tx = make_optimiser("radam", 0.01)
    params = jnp.asarray(start, jnp.float32)
    state = tx.init(params)
    for grad in grads:
        weight.grad = torch.tensor(grad)
        theirs.step()
        update, state = tx.update(jnp.asarray(grad, jnp.float32), state, params)
        params = optax.apply_updates(params, update)
    np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-4, atol=1e-6)
