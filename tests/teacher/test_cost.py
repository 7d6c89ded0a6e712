"""The cost of a sampler: network calls by the solver's definition, FLOPs of one call, parameters.

The network is one matrix, which takes 2 p^2 FLOPs for an image of p numbers.
"""

import dataclasses

import jax
import jax.extend
import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM
from cheapscale.models.plan import UNetConfig
from cheapscale.teacher import cost as module
from cheapscale.teacher.cost import sampler_cost
from cheapscale.teacher.teacher import Generator, Origin, Teacher

P = 4 * 4 * 3
CALL = 2 * P * P
AROUND = 14 * P  # at most, of one call: the label's row, the denoiser's scaling of in- and output
PARAMS = {"matrix": np.eye(P, dtype=np.float32), "label": np.ones((4, P), np.float32)}
SIZE = P * P + 4 * P
LEDGER = {"flops": 7e15, "device_seconds": 12.5}


@dataclasses.dataclass(frozen=True)
class MatrixNetwork:
    """A network that adds a row for each label to a matrix product."""

    config: UNetConfig = UNetConfig(resolution=4, channels=8, num_classes=3)

    def apply(self, variables, x, noise, label=None, extra=None):
        weights = variables["params"]
        y = x.reshape(len(x), P) @ weights["matrix"] + weights["label"][label]
        return y.reshape(x.shape)


def loaded(kind=Teacher):
    meta = {"ledger": LEDGER, "config": {"pretrain": {"label_dropout": 0.1}}}
    return kind(PARAMS, MatrixNetwork(), EDM(), Origin(meta, 3, "nowhere"))


def calls_in(jaxpr, repeated=1):
    """The batch sizes of a program's products with the matrix, in order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found += [equation.invars[0].aval.shape[0]] * repeated
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += calls_in(inner, repeated * times)
    return found


@pytest.fixture
def timed(monkeypatch):
    """A stand-in for the clock: every sampler takes 6 s, and the timed programs are recorded."""
    kept = {}

    def latency(run, *args, repeats):
        kept.update(calls=calls_in(jax.make_jaxpr(run)(*args).jaxpr), repeats=repeats)
        return 6.0

    monkeypatch.setattr(module, "latency", latency)
    return kept


# A step of Heun's method takes two calls, but the last, to sigma = 0, takes one: 40 steps, 80 - 1.
# test_samplers.py counts the calls that a sampler makes.
@pytest.mark.parametrize(
    "method, steps, cfg_scale, nfe",
    [
        ("heun", 40, 1.0, 79),
        ("heun", 3, 2.5, 10),
        ("heun", 3, 0.0, 5),
        ("euler", 40, 1.0, 40),
        ("euler", 3, 2.5, 6),
    ],
)
def test_every_call_of_a_teacher_counts(method, steps, cfg_scale, nfe, timed):
    options = {"method": method, "steps": steps, "cfg_scale": cfg_scale}
    cost = sampler_cost(loaded(), batch_size=2, repeats=5, **options)
    assert cost["nfe"] == nfe
    # the whole sampler was timed, with twice the batch under guidance
    assert timed["repeats"] == 5 and set(timed["calls"]) == {4 if cfg_scale == 2.5 else 2}
    assert cost["seconds_per_image"] == 6.0 / 2
    assert CALL < cost["flops_per_image"] / nfe < CALL + AROUND
    assert cost["parameters"] == SIZE and cost["batch_size"] == 2
    assert cost["peak_bytes"] >= 4 * (SIZE + 2 * 2 * P)  # weights, noise, images
    assert (cost["training_flops"], cost["training_device_seconds"]) == (7e15, 12.5)


def test_cost_is_of_one_image_and_memory_of_the_batch(timed):
    two, eight = (sampler_cost(loaded(), batch_size=n, steps=2, method="euler") for n in (2, 8))
    assert eight["flops_per_image"] == pytest.approx(two["flops_per_image"], rel=0.02)
    assert eight["seconds_per_image"] == 6.0 / 8 and eight["batch_size"] == 8
    assert eight["peak_bytes"] - two["peak_bytes"] >= 4 * 2 * 6 * P  # six more in and out


def test_memory_is_of_the_whole_sampler(timed):
    """Guidance needs memory for a doubled batch, unlike one unguided call."""
    plain, guided = (sampler_cost(loaded(), batch_size=8, cfg_scale=w) for w in (1.0, 2.0))
    assert guided["peak_bytes"] - plain["peak_bytes"] >= 4 * 8 * P


def test_a_generator_takes_one_call_however_a_teacher_would_be_sampled(timed):
    cost = sampler_cost(loaded(Generator), batch_size=2, steps=40, cfg_scale=2.0)
    assert cost["nfe"] == 1 and timed["calls"] == [2]
    assert CALL < cost["flops_per_image"] < CALL + AROUND
    assert cost["parameters"] == SIZE


def test_the_clock_is_a_real_one():
    assert 0 < sampler_cost(loaded(), batch_size=2, steps=2, repeats=1)["seconds_per_image"] < 60
