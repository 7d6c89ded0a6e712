"""The released code's choices as switches (spec 6.2), each against what it names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.stages import cascade, tuned
from cheapscale.stages.cascade_sampler import frozen_teacher
from cheapscale.stages.sampling import teacher_map
from cheapscale.training.sharding import make_mesh
from tests.stages.tuned_runs import EDM, UNET, settings, teacher, tuned_run, weights


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def test_the_pivot_decays_by_the_step_and_nothing_is_injected_at_the_end():
    """6.2.2: at the i-th step the pivot is decay^i of itself. 6.2.6: off below a level."""
    grid, label = np.array([2.0, 1.0, 0.5, 0.0]), jnp.array([0, 2])
    pivot, x = 0.4 * np.asarray(jax.random.normal(jax.random.key(5), (2, 2, 8, 8, 3)))
    x = np.repeat(np.repeat(x, 2, 1), 2, 2)
    plain = tuned_run("gain", seed=2, features="step")

    def D(run, params, sigma, pivot):
        make = tuned.stage_denoiser(run, teacher().meta, 0, (16, 16))
        ((denoise, _),) = make(params, pivot, label, grid)
        return denoise(x, sigma)

    @jax.jit
    def all_of(params):
        decays = tuned_run("gain", seed=2, features="step", pivot_decay=0.5)
        ends = tuned_run("gain", seed=2, features="step", off_below="sigma0.8")
        free = frozen_teacher(UNET, EDM, 1.0)(params["teacher"], pivot, label, grid)[0][0]
        return (
            [D(decays, params, grid[i], pivot) for i in (0, 2)],
            [D(plain, params, grid[i], pivot * 0.5**i) for i in (0, 2)],
            [D(ends, params, sigma, pivot) for sigma in (1.0, 0.5)],
            [D(plain, params, 1.0, pivot), free(x, 0.5)],
        )

    decays, by_hand, ends, expected = all_of({"teacher": weights(), "tuned": [plain.params]})
    np.testing.assert_allclose(decays, by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ends, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(decays[0] - decays[1]).max() > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "X"}, "cascade.mode is 'X'"),
        ({"pivot_decay": 0.5}, "pivot_decay is 0.5, but cascade.features 'clean'"),
    ],
)
def test_variants_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tuned.injection(settings("gain", **change), 0.5)


def test_a_sampled_pivot_is_the_teachers_own():
    chosen = settings("gain", pivot="sampled", pivot_steps=3)
    label, shape = jnp.array([0, 1]), (2, 8, 8, 3)
    draw_from = functools.partial(
        cascade.sampled_pivot, shape=shape, label=label, model=UNET, diffusion=EDM,
        settings=chosen,
    )  # fmt: skip
    draw = jax.jit(lambda key: draw_from(weights(), key=key))
    one, other = draw(jax.random.key(0)), draw(jax.random.key(1))
    assert one.shape == shape and np.abs(one - other).max() > 0.01
    by_hand = jax.jit(teacher_map(UNET, EDM, steps=3, method="euler"))
    z = 80.0 * jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(one, by_hand(weights(), z, label), rtol=1e-4, atol=1e-4)


def test_a_run_with_a_sampled_pivot_trains_on_it(monkeypatch):
    """6.2.3: not on the image reduced."""
    seen = []
    monkeypatch.setattr(cascade, "sampled_pivot", lambda *args: jnp.full(args[1], 0.25))
    monkeypatch.setattr(
        cascade, "injected", lambda theta, phi, p, *rest: seen.append(p) or (lambda x, s, label: x)
    )
    for pivot in ("sampled", "aligned"):
        batch = {"image": jnp.full((2, 16, 16, 3), 0.5), "label": jnp.array([0, 1])}
        cascade.tuning_loss(
            {}, {"teacher": {}}, batch, jax.random.key(0), settings=settings("gain", pivot=pivot),
            fields={}, model=UNET, diffusion=EDM, sizes=(16,),
        )  # fmt: skip
    np.testing.assert_array_equal(seen[0], jnp.full((2, 8, 8, 3), 0.25))
    np.testing.assert_allclose(seen[1], jnp.full((2, 8, 8, 3), 0.5), rtol=1e-6)
