"""Which levels a teacher is sampled on, and whose noise ancestral sampling draws.

The network knows a Gaussian of deviation 0.2 exactly, so every sampler has a closed form.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import process
from cheapscale.diffusion.guidance import dropped
from cheapscale.stages import networks, pretrain
from cheapscale.stages.networks import complete
from cheapscale.stages.sampling import levels, network_calls, sampler
from cheapscale.training.checkpoint import Loaded

MODEL = complete({"resolution": 4, "channels": 8, "num_classes": 3})
VP = {
    "process": "linear", "prediction": "eps", "sigma_data": 0.5, "sigma_min": 0.02,
    "sigma_max": 80.0, "rho": 7.0,
}  # fmt: skip
TABLE = process.vp_schedule("linear").sigmas


def exact_eps(variables, x_vp, time, label):
    sigma = jnp.asarray(TABLE, x_vp.dtype)[jnp.round(time).astype(int)][:, None, None, None]
    x = x_vp * jnp.sqrt(1 + sigma**2)
    return x * sigma / (sigma**2 + 0.04)


@pytest.fixture
def teacher(monkeypatch):
    net = SimpleNamespace(apply=exact_eps, config=SimpleNamespace(noise_feature="edm"))
    monkeypatch.setattr(networks, "unet", lambda **model: net)
    return Loaded({"none": np.zeros(1, "f")}, {"networks": {"net": MODEL}, "diffusion": VP}, 0, "")


def test_each_spacing_is_its_own_grid():
    uniform = levels(VP, 50, "sample", "leading")
    assert len(uniform) == 51 and uniform[0] == TABLE[981] and uniform[-2] == TABLE[1]
    assert levels(VP, 50, "sample", "trailing")[0] == TABLE[999]
    quadratic = levels(VP, 100, "sample", "quadratic")
    assert quadratic[0] == TABLE[800] and np.all(np.diff(quadratic) < 0)
    assert levels(VP, 50, "sample")[0] == 80.0
    assert network_calls(VP, 50, "sample", method="ancestral", spacing="leading") == 50
    with pytest.raises(ValueError, match="this teacher's process is edm"):
        levels(VP | {"process": "edm"}, 50, "sample", "leading")
    with pytest.raises(ValueError, match="is for sampling, not to invert"):
        levels(VP, 50, "invert", "leading")
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        levels(VP, 50, "sample", "even")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_noise_begins_at_the_grid_s_own_level(teacher, spacing):
    """x0 of a Gaussian's ODE is its start times a constant, whatever the level it starts from."""
    draw = sampler(teacher, steps=250, method="euler", spacing=spacing)
    images, _ = draw(np.arange(64), np.zeros(64, int))
    grid = levels(VP, 250, "sample", spacing)
    factor = np.prod([(0.04 + s * t) / (0.04 + s**2) for s, t in zip(grid, grid[1:])])
    assert np.std(images) == pytest.approx(factor * grid[0], rel=0.04)
    assert factor * grid[0] == pytest.approx(0.2, rel=0.1)


def test_ancestral_noise_is_a_function_of_seed_and_image(teacher):
    def images(ids, seed=0, batch_size=8):
        draw = sampler(
            teacher, seed=seed, steps=100, method="ancestral", spacing="leading",
            batch_size=batch_size,
        )  # fmt: skip
        return draw(np.asarray(ids), np.zeros(len(ids), int))[0]

    together = images(range(16))
    np.testing.assert_allclose(images([9, 3], batch_size=1), together[[9, 3]], atol=1e-6)
    assert np.abs(images(range(16), seed=1) - together).mean() > 0.1
    grid = levels(VP, 100, "sample", "leading")
    variance = grid[0] ** 2
    for s, t in zip(grid, grid[1:]):
        kept = t**2 / s**2
        factor = kept + (1 - kept) * 0.04 / (0.04 + s**2)
        variance = factor**2 * variance + kept * (s**2 - t**2)
    assert np.std(together) == pytest.approx(np.sqrt(variance), rel=0.04)


def test_antithetic_levels_are_mirrored_in_the_whole_range():
    """A base trained in pairs, the fair control of specialists that are."""

    def bind(params, **options):
        return lambda x, sigma, label: x

    batch = {"image": jnp.zeros((8, 2, 2, 3)), "label": jnp.zeros(8, jnp.int32)}

    def draw(diffusion, antithetic):
        return pretrain.denoising_loss(
            {}, {}, batch, jax.random.key(0), bind=bind, diffusion=diffusion, null_label=3,
            label_dropout=0.0, antithetic=antithetic,
        )  # fmt: skip

    loss, sigma = draw(VP, True)
    times = np.searchsorted(TABLE, np.asarray(sigma) * (1 - 1e-5))
    np.testing.assert_array_equal(times[:4] + times[4:], 999)
    # D returns the noisy image, so the error of eps is the noise's own mean square
    assert np.all(np.asarray(loss) > 0) and np.mean(loss) == pytest.approx(1.0, abs=0.4)
    alone = np.searchsorted(TABLE, np.asarray(draw(VP, False)[1]) * (1 - 1e-5))
    assert np.any(alone[:4] + alone[4:] != 999)
    _, sigma = draw(VP | {"process": "edm", "P_mean": -1.2, "P_std": 1.2}, True)
    np.testing.assert_allclose(np.log(sigma[:4]) + np.log(sigma[4:]), -2.4, rtol=1e-3)


def test_labels_are_dropped_as_often_as_asked():
    label = jnp.arange(2000) % 3
    kept = np.asarray(dropped(jax.random.key(0), label, 0.25, 3))
    assert np.mean(kept == 3) == pytest.approx(0.25, abs=0.04)
    assert np.all((kept == 3) | (kept == np.asarray(label)))
    assert dropped(None, label, 0.0, 3) is label
