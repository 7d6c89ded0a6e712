"""`cheapscale.load`: one interface to teachers, experts and generators."""

import jax
import numpy as np
import pytest

import cheapscale
from cheapscale.data.pixels import from_uint8
from cheapscale.model import Model
from cheapscale.teacher import experts
from cheapscale.teacher.teacher import Generator
from cheapscale.training import checkpoint, loop
from cheapscale.training.log import image_grid
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


def test_a_text_names_a_class_before_it_is_a_number(teacher):
    names = ["0", "1", "10", "2", "cat", *"abc"]
    data = teacher.meta["data"] | {"class_names": names}
    model = Model(toy_teacher(data=data))
    np.testing.assert_array_equal(model.labels(["2", "10", "cat", 2, "4"], 5), [3, 2, 4, 2, 4])
    for label, said in (("\u00b2", "is no class"), (str(2**32), "label is 4294967296: give")):
        with pytest.raises(ValueError, match=said):
            model.labels(label, 1)


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


def broken(model):
    """The same model with NaN in every weight."""
    nan = jax.tree.map(lambda p: np.full_like(p, np.nan), model.network.params)
    return Model(model.network.replace(params=nan))


def test_what_is_not_finite_is_refused_by_its_number_and_never_becomes_a_picture(teacher):
    model = broken(Model(teacher))
    generator = Model(Generator(model.network.params, teacher.net, teacher.process, teacher.origin))
    zeros = np.zeros((1, 8, 8, 3), np.float32)
    for ask, said in (
        (lambda: model.sample(3, start=40, steps=3), "image 40 of 3 samples .* 3 in all"),
        (lambda: generator.sample(2, start=40), "image 40 of 2 samples"),
        (lambda: model.cascade("2x", num=1, start=7, steps=3), "image 7 of 1 samples of 8x8 px"),
        (lambda: model.invert(zeros - 0.5, nodes=3), "image 0 of 1 solutions of the ODE"),
        (lambda: generator.reconstruct(zeros), "image 0 of 1 images"),
        (
            lambda: generator.reconstruct(zeros * np.nan),
            "image 0 of 1 inputs .*: give finite numbers",
        ),
        (lambda: image_grid(zeros * np.nan), "image 0 of 1 images"),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


def test_values_out_of_range_are_refused_before_anything_compiles(teacher, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    model = Model(teacher)
    images = np.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)

    def refuses(said, ask, *words, **options):
        with pytest.raises(ValueError, match=said):
            ask(*words, **options)

    for seed in (-1, 2**32, 4294967301, 2**63, 1.5, True, np.nan, "5"):
        refuses("^seed is ", model.sample, 1, seed=seed, labels=0)
        refuses("^seed is ", model.cascade, "2x", num=1, seed=seed)
    for num in (0, -1, 2.5, True, 10**12, None):
        refuses("num.* is ", model.sample, num, labels=0)
        refuses("num.* is ", model.cascade, "2x", num=num)
    refuses("start.* is 4294967296", model.sample, 1, start=2**32)
    for batch_size in (0, -1, 1.5):
        refuses("^batch_size is ", model.sample, 1, batch_size=batch_size)
        refuses("^batch_size is ", model.invert, images, batch_size=batch_size)
    for steps in (0, -1, 2.5, 10**9, None):
        refuses("steps is", model.sample, 1, steps=steps)
        refuses("steps is", model.invert, images, nodes=steps)
        refuses("steps is", model.cascade, "2x", num=1, steps=steps)
    for scale in (np.nan, np.inf, -1, "2"):
        refuses("^cfg_scale is ", model.sample, 1, cfg_scale=scale)
        refuses("^cfg_scale is ", model.cascade, "2x", num=1, cfg_scale=scale)
    refuses("labels are empty", model.sample, 1, labels=[])
    refuses("label 99 is out of range", model.sample, 1, labels=99)
    for text in (2**40, -1, 1.5):
        refuses("(is no class|label is .*): give a", model.sample, 1, labels=text)
    refuses("K '0.7' is unreadable", model.cascade, "2x", k=0.7)
    refuses("None is no folder", cheapscale.load, None)
    refuses("label 99 is out of range", model.invert, images, 99)
    refuses("3 labels for 2 images", model.invert, images, [0, 1, 2])
    refuses(r"give \[n, \*\(8, 8, 3\)\]", model.invert, images[:, :4])
    refuses(r"2 \* x - 1", model.invert, (images + 1) / 2)
    refuses("x / 127.5 - 1", model.cascade, "2x", num=2, pivots=127 * (images + 1), labels=0)


def test_a_picture_inverts_alike_as_bytes_and_as_floats(teacher):
    model = Model(teacher)
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    z = model.invert(images, nodes=3)
    for same in (images.astype(int), from_uint8(images), from_uint8(images).astype(float)):
        np.testing.assert_array_equal(model.invert(same, nodes=3), z)
