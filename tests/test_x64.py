"""What a seed gives does not depend on JAX_ENABLE_X64 and other JAX_* variables, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.cascade.lora import init_lora
from cheapscale.data.loader import training_batches
from cheapscale.data.sources import open_source
from cheapscale.diffusion.denoiser import EDM, VP
from cheapscale.diffusion.guidance import drop_labels
from cheapscale.features import diffaugment
from cheapscale.features.mixing import init_mixing
from cheapscale.model import Model
from cheapscale.pagoda.discriminator import _uniform
from cheapscale.teacher import pretrain
from cheapscale.teacher.sampling import _image_noise, labels_for, prior
from cheapscale.training.mesh import pinned
from launch.command import execute
from tests.teacher.toy_teacher import toy_teacher
from tests.training.test_loop import assert_equal, denoise_stage, state_of, train

IDS = np.asarray([0, 7, 2**31, 2**32 - 1])


def draws():
    """Everything that is drawn: {name: array}."""
    key, found = jax.random.key(1), {}
    for seed in (0, 2**32 - 1):
        found[f"noise {seed}"] = prior(seed, IDS, (2, 2, 3), np.float64(80))
        found[f"labels {seed}"] = labels_for(seed, IDS, 5)
    found["ancestral"] = _image_noise(
        3, jnp.asarray(IDS, jnp.uint32), jnp.zeros((4, 2, 2, 3), "f"), 1
    )
    for process in (EDM(), VP()):
        draw = functools.partial(process.draw_sigma, key, 9)
        found |= {f"{process} levels": draw(), f"{process} part": draw(low=0.1, high=3.0)}
        found[f"{process} pairs"] = draw(antithetic=True)
    found["dropped"] = drop_labels(key, jnp.zeros(64, jnp.int32), 0.3, 5)
    found |= diffaugment.parameters(key, 4)
    mixing = init_mixing(key, [(4, 8), (2, 16)], 4)
    adapters = init_lora({"a": {"kernel": np.zeros((3, 4), "f")}}, 2, key)
    trees = {"mixing": mixing, "lora a": adapters["a"]["kernel"]["a"]}
    found |= {f"{n} {i}": x for n, t in trees.items() for i, x in enumerate(jax.tree.leaves(t))}
    found["discriminator"] = _uniform(0.5)(key, (3, 3))
    return found


def training_images():
    """Batches of augmented scenes."""
    source = open_source("scenes", "train", resolution=8, size=12)
    augment = functools.partial(pretrain.augmented, flips=True, probability=0.5)
    return next(training_batches(source, 1, batch_size=8, seed=5, transform=augment))


def pictures():
    """Samples, latents and a cascade of a model, with inputs of 64 bits."""
    model = Model(toy_teacher())
    images, labels = model.sample(3, seed=4, steps=3, batch_size=2)
    given = images.astype(np.float64), labels.astype(np.int64)
    z = model.invert(*given, nodes=3)
    found = {"images": images, "labels": labels, "z": z}
    found["again"] = model.reconstruct(z.astype(np.float64), labels, nodes=3)
    scales = model.cascade("2x", pivots=given[0], labels=given[1], num=3, steps=3).scales
    return found | {"cascade": scales[-1]}


X64 = {"jax_enable_x64": True}
OTHERS = X64 | {"jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False}


@pytest.mark.parametrize(
    "make, values", [(draws, X64), (training_images, OTHERS), (pictures, OTHERS)]
)
def test_what_is_drawn_is_the_same(make, values, change):
    expected = make()
    change(values)
    found = make()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_training_is_the_same_also_in_the_thread_that_compiles(tmp_path, change):
    def weights(folder):
        body = functools.partial(train, denoise_stage(), folder, 2)
        execute("train", str(folder), body, keep=False)
        with pinned():
            return state_of(denoise_stage(), folder)[0]

    expected = weights(tmp_path / "a")
    change(OTHERS | {"jax_transfer_guard": "disallow"})
    assert_equal(weights(tmp_path / "b"), expected)


def test_an_offset_of_all_seeds_is_refused(change):
    change({"jax_random_seed_offset": 7})
    with pytest.raises(ValueError, match="JAX_RANDOM_SEED_OFFSET=7 .*unset it"):
        Model(toy_teacher()).sample(1, labels=0)


@pytest.fixture
def change():
    """A function that does what JAX_* variables do, for all threads."""
    before = {}

    def update(values):
        for name, value in values.items():
            before[name] = getattr(jax.config, name)
            jax.config.update(name, value)

    yield update
    for name, value in before.items():
        jax.config.update(name, value)
