"""PaGoDA's controllable generation: latent optimisation, interpolation, and E as it was used."""

import types

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.pagoda import edit
from cheapscale.teacher.teacher import Generator
from tests.teacher.toy_teacher import toy_teacher

SIGMA_MAX, SHAPE = 80.0, (2, 2, 1)


class Linear(flax.struct.PyTreeNode):
    """G(z, c) = W z / sigma_max + b_c, images [3, 3, 1] of noise [2, 2, 1]."""

    W: np.ndarray
    b: np.ndarray
    process = types.SimpleNamespace(sigma_max=SIGMA_MAX)
    shape, meta = SHAPE, {}

    def encode(self, label):
        return label

    def __call__(self, z, label, omega=None):
        x = z.reshape(len(z), -1) @ self.W.T / SIGMA_MAX + self.b[label]
        return x.reshape(-1, 3, 3, 1)


@pytest.fixture
def linear():
    rng = np.random.default_rng(0)
    return Linear(rng.normal(size=(9, 4)).astype("f"), rng.normal(size=(3, 9)).astype("f"))


def test_the_optimum_of_a_linear_generator_is_the_least_squares_solution(linear):
    rows, columns = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 2, 0, 1, 1, 2])
    y = np.random.default_rng(1).normal(size=(6, 1)).astype("f")

    def A(x):
        return x[:, rows, columns]

    known = 3 * rows + columns
    u, (residual,), *_ = np.linalg.lstsq(linear.W[known], y[:, 0] - linear.b[2, known])
    start = SIGMA_MAX * np.random.default_rng(2).normal(size=(3, *SHAPE))
    z = edit.optimise(linear, y[None], A, np.full(3, 2), start, steps=600, rate=0.1, penalty=0.0)
    np.testing.assert_allclose(z.reshape(3, 4) / SIGMA_MAX, np.tile(u, (3, 1)), atol=1e-3)
    fit = np.square(np.asarray(A(linear(z, jnp.full(3, 2)))) - y).mean(axis=(1, 2))
    np.testing.assert_allclose(fit, residual / 6, rtol=1e-3)


def test_the_penalty_keeps_the_noise_as_long_as_the_priors(linear):
    blind = linear.replace(W=0 * linear.W)
    start = SIGMA_MAX * np.array([0.2, 3.0]).reshape(2, 1, 1, 1) * np.ones(SHAPE)
    c, y = np.zeros(2, int), np.zeros((2, 3, 3, 1))
    z = edit.optimise(blind, y, lambda x: x, c, start, steps=300, rate=0.1)
    np.testing.assert_allclose(np.sqrt(np.square(z).mean(axis=(1, 2, 3))), SIGMA_MAX, rtol=0.02)


def test_slerp_meets_its_ends_and_keeps_norm_and_speed():
    z1, z2 = SIGMA_MAX * np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    z2 *= np.linalg.norm(z1) / np.linalg.norm(z2)
    z = edit.slerp(z1, z2, np.linspace(0, 1, 5))
    np.testing.assert_allclose(z[[0, -1]], [z1, z2], rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(z.reshape(5, -1), axis=1), np.linalg.norm(z1), rtol=1e-5
    )
    steps = [edit.angle(*pair) for pair in zip(z, z[1:])]
    np.testing.assert_allclose(steps, edit.angle(z1, z2) / 4, rtol=1e-4)
    np.testing.assert_allclose(edit.slerp(z1, z1, np.array([0.3]))[0], z1, rtol=1e-5)
    with pytest.raises(ValueError, match="opposite"):
        edit.slerp(z1, -z1, np.array([0.5]))


def test_the_inversion_adds_the_noise_of_the_latents_and_scales_as_they_are(monkeypatch):
    monkeypatch.setattr(edit, "inverter", lambda teacher, **options: lambda x, label: 40 * x)
    x, pixels = np.zeros((2, 16, 16, 3), np.float32), types.SimpleNamespace(meta={})
    z = edit.encode(pixels, x, None, edit.Inversion(noise=0.5, scale=2.0), seed=3)
    assert z.std() == pytest.approx(2 * 40 * 0.5, rel=0.05)
    assert np.abs(edit.encode(pixels, x + 1, None, edit.Inversion()) - 40).max() == 0


def generator(**meta):
    teacher = toy_teacher()
    origin = toy_teacher(**{"teacher": teacher.fingerprint, **meta}).origin
    return Generator(teacher.params, teacher.net, teacher.process, origin)


@pytest.mark.parametrize(
    "place, said", [("", "does not say where its teacher is"), ("near", "near is not the teacher")]
)
def test_a_teacher_that_is_unknown_or_another_one_is_refused(place, said, monkeypatch):
    monkeypatch.setattr(edit, "load", lambda place: toy_teacher(seed=1))
    G = generator(config={"teacher": "moved"})
    with pytest.raises(ValueError, match=f"{said}.*--teacher=DIR.*{G.meta['teacher']}"):
        edit.teacher_of(G, place)
    monkeypatch.setattr(edit, "load", lambda place: toy_teacher())
    assert edit.teacher_of(G, "near").fingerprint == G.meta["teacher"]


def test_a_generator_that_does_not_say_how_its_latents_were_made_is_refused():
    with pytest.raises(ValueError, match="how its latents were made.*--model"):
        edit.inversion_of(generator(config={"latents": "gone"}))
