"""What a sampler costs: network calls by the solver's definition, FLOPs of one call, parameters.

The network is one matrix, whose cost is known: 2 p^2 FLOPs for an image of p numbers.
"""

from types import SimpleNamespace

import jax
import jax.extend
import numpy as np
import pytest

from cheapscale.stages import networks
from cheapscale.stages import sampler_cost as module
from cheapscale.stages.networks import complete
from cheapscale.stages.sampler_cost import sampler_cost
from cheapscale.training.checkpoint import Loaded

MODEL = complete({"resolution": 4, "channels": 8, "num_classes": 3})
P = 4 * 4 * 3
CALL = 2 * P * P
AROUND = 14 * P  # at most, of one call: the label's row, the denoiser's scaling of in- and output
PARAMS = {"matrix": np.eye(P, dtype=np.float32), "label": np.ones((4, P), np.float32)}
SIZE = P * P + 4 * P
DIFFUSION = {
    "process": "edm", "prediction": "x0", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0,
    "rho": 7.0,
}  # fmt: skip


def apply(variables, x, noise, label):
    weights = variables["params"]
    y = x.reshape(len(x), P) @ weights["matrix"] + weights["label"][label]
    return y.reshape(x.shape)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    net = SimpleNamespace(apply=apply, config=SimpleNamespace(noise_feature="edm"))
    monkeypatch.setattr(networks, "unet", lambda **model: net)


def loaded(name="net"):
    ledger = {"flops": 7e15, "device_seconds": 12.5}
    meta = {"networks": {name: MODEL}, "diffusion": DIFFUSION, "ledger": ledger}
    return Loaded(PARAMS, meta, 3, "nowhere")


def calls_in(jaxpr, repeated=1):
    """The batch of every product with the matrix that a program makes, in order."""
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
    """In place of the clock: every sampler takes 6 s; what was timed is kept."""
    kept = {}

    def latency(run, *args, repeats):
        kept.update(calls=calls_in(jax.make_jaxpr(run)(*args).jaxpr), repeats=repeats)
        return 6.0

    monkeypatch.setattr(module, "latency", latency)
    return kept


# A step of Heun's method takes two calls, but the last, to sigma = 0, takes one: 40 steps, 80 - 1.
@pytest.mark.parametrize(
    "method, steps, cfg_scale, calls, nfe",
    [
        ("heun", 40, 1.0, [2] * 79, 79),
        ("heun", 3, 2.5, [4] * 5, 10),
        ("heun", 3, 0.0, [2] * 5, 5),
        ("euler", 40, 1.0, [2] * 40, 40),
        ("euler", 3, 2.5, [4] * 3, 6),
    ],
)
def test_a_teacher_pays_for_every_call(method, steps, cfg_scale, calls, nfe, timed):
    options = {"method": method, "steps": steps, "cfg_scale": cfg_scale}
    cost = sampler_cost(loaded(), batch_size=2, repeats=5, **options)
    assert cost["nfe"] == nfe
    # what the clock ran is the whole sampler, of twice the batch under guidance
    assert timed == {"calls": calls, "repeats": 5}
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
    """Guidance holds both halves of its doubled batch; one unguided call would not."""
    plain, guided = (sampler_cost(loaded(), batch_size=8, cfg_scale=w) for w in (1.0, 2.0))
    assert guided["peak_bytes"] - plain["peak_bytes"] >= 4 * 8 * P


def test_a_generator_takes_one_call_however_a_teacher_would_be_sampled(timed):
    cost = sampler_cost(loaded("generator"), batch_size=2, steps=40, cfg_scale=2.0)
    assert cost["nfe"] == 1 and timed["calls"] == [2]
    assert CALL < cost["flops_per_image"] < CALL + AROUND
    assert cost["parameters"] == SIZE


def test_the_clock_is_a_real_one():
    assert 0 < sampler_cost(loaded(), batch_size=2, steps=2, repeats=1)["seconds_per_image"] < 60
