"""The 2-D experiment: closed forms of its parts, and the whole of it cut down to seconds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cheapscale.diffusion.process import inversion_grid
from cheapscale.diffusion.solvers import solve
from configs.manifold import get_config
from launch import manifold
from launch.manifold_experiment import (
    ARMS,
    Experiment,
    blurred,
    circles,
    dirac_recursion,
    energy_distance,
    off_manifold,
)

RADII = (0.5, 0.8)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_exact_denoiser_is_tweedie_of_the_blurred_data(sigma, key):
    """D = x + sigma^2 grad log p, with p written as a log-sum-exp and differentiated."""
    blur = 0.1
    points = circles(key, 50, RADII)
    x = points[:8] + sigma * jax.random.normal(key, (8, 2))

    def log_density(x):
        distance = jnp.square(x[None] - points).sum(-1)
        return jax.nn.logsumexp(-distance / (2 * (blur**2 + sigma**2)))

    expected = x + sigma**2 * jax.vmap(jax.grad(log_density))(x)
    np.testing.assert_allclose(blurred(points, blur)(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_inversion_of_one_blurred_point_is_the_gaussian_closed_form():
    """p_h = N(c, h^2): z - c = (x - c) sqrt((h^2 + smax^2) / (h^2 + smin^2)) (spec 2.3)."""
    centre, blur = jnp.array([[0.3, -0.2]]), 0.5
    x = centre + 0.2
    z = solve([(blurred(centre, blur), inversion_grid(80))], x)
    scale = np.sqrt((blur**2 + 80.0**2) / (blur**2 + 0.002**2))
    np.testing.assert_allclose((z - centre) / (x - centre), scale, rtol=3e-3)


def test_data_survive_inversion_and_generation_on_the_same_nodes(key):
    points = circles(key, 64, RADII)
    denoise = blurred(points, 0.1)
    errors = []
    for nodes in (20, 40):
        grid = inversion_grid(nodes)
        z = solve([(denoise, grid)], points)
        back = solve([(denoise, grid[::-1])], z)
        errors.append(float(jnp.sqrt(jnp.square(back - points).sum(-1).mean())))
    assert errors[1] < 0.005 and errors[1] < errors[0] / 3  # second order or better
    assert 0.7 < float(jnp.sqrt(jnp.square(z).mean())) / 80 < 1.0


def test_data_lie_on_the_manifold_and_the_centre_does_not(key):
    np.testing.assert_allclose(off_manifold(circles(key, 100, RADII), RADII), 0.0, atol=1e-6)
    probes = jnp.array([[0.0, 0.0], [0.65, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(off_manifold(probes, RADII), [0.5, 0.15, 0.2], atol=1e-6)


def test_energy_distance_of_a_sample_to_itself_is_zero_and_of_two_atoms_twice_their_gap(key):
    x = circles(key, 40, RADII)
    np.testing.assert_allclose(energy_distance(x, x), 0.0, atol=1e-6)
    atoms = jnp.zeros((3, 2)), jnp.tile(jnp.array([[3.0, 4.0]]), (5, 1))
    np.testing.assert_allclose(energy_distance(*atoms), 10.0, rtol=1e-6)


@pytest.mark.parametrize("eta, final", [(0.0, 1.122), (0.01, 0.755), (0.1, 0.017), (1.0, 0.0014)])
def test_generator_first_gives_the_specification_s_dirac_figures(eta, final):
    value = dirac_recursion(eta, 0.1, 400, (1.0, 0.5), discriminator_first=False)
    assert abs(value - final) <= 0.5 * 10.0 ** -len(str(final).split(".")[1])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifold")
    summary = manifold.run(get_config("smoke"), str(folder), str(folder / "m.json"))
    return summary, json.loads((folder / "m.json").read_text()), Image.open(folder / "m.png")


def test_the_record_holds_every_figure_and_where_it_comes_from(smoke):
    summary, record, picture = smoke
    config = get_config("smoke")
    assert record["config"] == json.loads(config.to_json())
    assert {"commit", "device", "jax"} <= set(record["provenance"])
    assert set(record["figures"]["teachers"]) == {"0.02", "0.2"}
    for teacher in record["figures"]["teachers"].values():
        assert set(teacher["arms"]) == set(ARMS)
        assert 0.3 < teacher["itself"]["rms_over_sigma_max"]["mean"] < 1.0
        for arm in teacher["arms"].values():
            assert [point["step"] for point in arm["curve"]] == [30, 60]
            for name in ("off_manifold", "energy", "reconstruction_rmse"):
                seeds = arm[name]["seeds"]
                assert len(seeds) == config.seeds and np.isfinite(seeds).all()
                np.testing.assert_allclose(arm[name]["mean"], np.mean(seeds), atol=1e-6)
                np.testing.assert_allclose(arm[name]["sd"], np.std(seeds, ddof=1), atol=1e-6)
            rmse = [point["reconstruction_rmse"] for point in arm["curve"]]
            assert rmse[1] < rmse[0]  # even this much training reconstructs better
    assert record["figures"]["fresh data"]["off_manifold"]["mean"] < 1e-6
    assert set(summary["off_manifold"]["0.02"]) == set(ARMS)
    assert np.asarray(picture).min() == 0 and picture.width > picture.height


def test_the_stability_example_through_the_step_equals_it_by_hand(smoke):
    figures = smoke[1]["figures"]["dirac"]
    for row in figures.values():
        np.testing.assert_allclose(
            row["discriminator_first"], row["discriminator_first_float64"], rtol=1e-3
        )
    final = [row["discriminator_first"] for row in figures.values()]
    assert final[0] > 1 > 0.8 > final[1] > final[2] > final[3]


def test_a_seed_does_not_depend_on_the_seeds_beside_it_and_rescaling_is_global(smoke):
    game = Experiment(get_config("smoke,seeds=1"))
    pairs = game.pairs(0.2)
    ratio = pairs["rescaled"]["z"] / pairs["data"]["z"]
    np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(jnp.square(pairs["rescaled"]["z"]).mean(), 80.0**2, rtol=1e-5)
    alone, _ = game.train(pairs, ARMS["rec+adv"])
    beside = smoke[1]["figures"]["teachers"]["0.2"]["arms"]["rec+adv"]
    for name in ("off_manifold", "energy", "reconstruction_rmse"):
        np.testing.assert_allclose(alone[name]["seeds"][0], beside[name]["seeds"][0], rtol=2e-3)


def test_a_curve_that_misses_the_last_step_is_refused():
    config = get_config("smoke")
    config.eval_every = 40
    with pytest.raises(ValueError, match="eval_every 40 must divide total_steps 60"):
        Experiment(config)
