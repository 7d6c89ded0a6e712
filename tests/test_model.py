"""`cheapscale.load`: one interface to teachers, experts and generators."""

import numpy as np
import pytest

import cheapscale
from cheapscale.model import Model
from cheapscale.teacher import experts
from cheapscale.teacher.teacher import Generator
from cheapscale.training import checkpoint, loop
from tests.teacher.toy_teacher import base_meta, toy_teacher


@pytest.fixture(scope="module")
def teacher():
    return toy_teacher()


def test_a_saved_teacher_samples_inverts_and_cascades(teacher, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        state = loop.create_state({"net": teacher.params}, {}, {}, ["net"])
        checkpoints.save(0, state, base_meta())
        checkpoints.wait()
    model = cheapscale.load(tmp_path)
    assert "Teacher" in repr(model) and model.resolution == 8
    names = model.class_names
    images, labels = model.sample(3, labels=[names[1], 0], seed=2, steps=4)
    np.testing.assert_array_equal(labels, [1, 0, 1])
    later, _ = model.sample(2, start=1, labels=[0, 1], seed=2, steps=4)
    np.testing.assert_allclose(later, images[1:], atol=1e-5)
    z = model.invert(images, labels, nodes=6)
    assert z.shape == images.shape and z.std() > 10
    again = model.reconstruct(z, labels, nodes=6)
    assert np.abs(again - images).mean() < np.abs(images - images.mean()).mean()
    scales, _ = model.cascade("2x", num=2, labels=0, steps=4)
    assert [scale.shape for scale in scales] == [(2, 8, 8, 3), (2, 16, 16, 3)]
    with pytest.raises(ValueError, match="'unicorn' is no class: .* the classes are 0 "):
        model.sample(1, labels="unicorn")


def test_experts_have_the_same_interface(teacher):
    both = Model(experts.join(base_meta(), "base", [1.0], [teacher, teacher]))
    alone = Model(teacher)
    images, labels = both.sample(2, steps=4)
    np.testing.assert_allclose(images, alone.sample(2, steps=4).images, atol=2e-5)
    assert both.invert(images, labels, nodes=4).shape == images.shape


def test_a_generator_samples_and_reconstructs_in_one_call_and_has_no_ode(teacher):
    generator = Generator(teacher.params, teacher.net, teacher.process, teacher.origin)
    model = Model(generator)
    images, labels = model.sample(2)
    assert images.shape == (2, 8, 8, 3)
    z = 80 * np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(model.reconstruct(z, labels), generator(z, labels), atol=1e-4)
    for ask in (lambda: model.invert(images), lambda: model.cascade("2x")):
        with pytest.raises(ValueError, match="one-step generator, which has no ODE"):
            ask()
