"""The noise levels of a teacher's sampler, and the noise of ancestral sampling.

The network is exact for Gaussian data of deviation 0.2, so every sampler has a closed form.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM, VP
from cheapscale.diffusion.guidance import drop_labels
from cheapscale.models.plan import UNetConfig
from cheapscale.teacher import pretrain
from cheapscale.teacher.sampling import (
    inverter,
    levels,
    network_calls,
    ode_map,
    round_trip,
    sampler,
)
from cheapscale.teacher.teacher import Origin, Teacher

TABLE = VP().schedule.sigmas


@dataclasses.dataclass(frozen=True)
class ExactNetwork:
    """Predicts the noise in x_vp for data N(0, 0.2^2) exactly."""

    config: UNetConfig = UNetConfig(resolution=4, channels=8, num_classes=3)

    def apply(self, variables, x_vp, time, label=None, **options):
        sigma = jnp.asarray(TABLE, x_vp.dtype)[jnp.round(time).astype(int)][:, None, None, None]
        x = x_vp * jnp.sqrt(1 + sigma**2)
        return x * sigma / (sigma**2 + 0.04)


@pytest.fixture
def teacher():
    return Teacher({"none": np.zeros(1, "f")}, ExactNetwork(), VP(), Origin({}))


def test_levels_follow_the_direction():
    down, up = levels(EDM(), 40, "round_trip"), levels(EDM(), 40, "invert")
    np.testing.assert_array_equal(down, up[::-1])
    assert up[0] == 0.002 and up[-1] == 80.0
    assert network_calls(VP(), 50, method="ancestral", spacing="leading") == 50
    assert network_calls(EDM(), 40, "invert", cfg_scale=2.0) == 2 * 78
    with pytest.raises(ValueError, match="is for sampling, not to invert"):
        levels(VP(), 50, "invert", "leading")


def test_noisy_images_are_inverted_from_their_own_level_and_return_denoised(teacher):
    """The exact ODE keeps the quantile of Gaussian data: x / sqrt(0.2^2 + sigma^2) is constant."""
    level, top = 0.1, VP().sigma_max
    x = np.linspace(-0.5, 0.5, 12, dtype=np.float32).reshape(4, 1, 1, 3)
    z, back = round_trip(teacher, nodes=96, level=level)(x, np.zeros(4, int))
    exact = np.sqrt((0.04 + top**2) / (0.04 + level**2)) * x
    np.testing.assert_allclose(z, exact, rtol=0.01)
    np.testing.assert_allclose(back, x * 0.04 / (0.04 + level**2), rtol=0.03)
    with pytest.raises(ValueError, match="starts at noise level"):
        inverter(teacher, level=99.0 * top)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_noise_begins_at_the_grid_s_own_level(teacher, spacing):
    """For Gaussian data, the ODE multiplies the start by a constant that depends on its level."""
    draw = sampler(teacher, steps=250, method="euler", spacing=spacing)
    images, _ = draw(np.arange(64), np.zeros(64, int))
    grid = VP().grid(250, spacing)
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
    grid = VP().grid(100, "leading")
    variance = grid[0] ** 2
    for s, t in zip(grid, grid[1:]):
        kept = t**2 / s**2
        factor = kept + (1 - kept) * 0.04 / (0.04 + s**2)
        variance = factor**2 * variance + kept * (s**2 - t**2)
    assert np.std(together) == pytest.approx(np.sqrt(variance), rel=0.04)


def test_weights_are_an_argument_of_the_program():
    """A Teacher is a pytree: other weights run the program that was compiled for the first."""
    compiled = []

    @dataclasses.dataclass(frozen=True)
    class Scale:
        config: UNetConfig = UNetConfig(resolution=4, channels=8)

        def apply(self, variables, x, noise, label=None):
            compiled.append(1)
            return variables["params"]["scale"] * x

    teacher = Teacher({"scale": np.float32(1)}, Scale(), EDM(), Origin({}))
    run = jax.jit(functools.partial(ode_map, steps=3, method="euler"))
    z, label = 80 * jnp.ones((2, 4, 4, 3)), jnp.zeros(2, jnp.int32)
    one = run(teacher, z, label)
    count = len(compiled)
    other = run(teacher.replace(params={"scale": np.float32(0.5)}), z, label)
    assert len(compiled) == count and np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("process", [EDM(), VP()])
def test_the_pretraining_loss_pairs_levels_where_asked(process):
    """Experts may train on mirrored pairs; a fair base must be able to do so too."""
    teacher = Teacher({}, ExactNetwork(), process, Origin({}))
    batch = {"image": jnp.zeros((8, 4, 4, 3)), "label": jnp.zeros(8, jnp.int32)}
    loss, sigma = pretrain.loss(
        {}, {}, batch, jax.random.key(0), teacher=teacher, label_dropout=0.0, antithetic=True
    )
    assert loss.shape == sigma.shape == (8,) and np.all(np.isfinite(loss))
    mirrored = np.log(sigma[:4]) + np.log(sigma[4:])
    if isinstance(process, VP):
        mirrored = np.searchsorted(TABLE, np.asarray(sigma) * (1 - 1e-5))
        mirrored = mirrored[:4] + mirrored[4:]
    np.testing.assert_allclose(mirrored, mirrored[0], rtol=1e-3)


def test_labels_are_dropped_as_often_as_asked():
    label = jnp.arange(2000) % 3
    kept = np.asarray(drop_labels(jax.random.key(0), label, 0.25, 3))
    assert np.mean(kept == 3) == pytest.approx(0.25, abs=0.04)
    assert np.all((kept == 3) | (kept == np.asarray(label)))
    assert drop_labels(None, label, 0.0, 3) is label
