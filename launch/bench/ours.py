"""Our side of the comparisons: a training step and one-step sampling of any U-Net."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.denoiser import EDM
from cheapscale.models.unet import unet
from cheapscale.teacher import pretrain
from cheapscale.teacher.sampling import one_step
from cheapscale.teacher.teacher import Generator, Origin, Teacher
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import denoise_step, noise_bins
from cheapscale.training.state import Optimiser, create_state

PyTree = Any

PROCESS = EDM()
RATE, DECAY = 1e-4, 0.999


def random_weights(model: dict, seed: int = 0) -> PyTree:
    """Random weights for every tensor.

    An initialised U-Net has zeros at the end of each block, which would hide differences between
    two implementations.
    """
    rng, shape = np.random.default_rng(seed), (1, model["resolution"], model["resolution"], 3)
    shapes = jax.eval_shape(unet(**model).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def our_calls(model: dict, params: PyTree, images: np.ndarray) -> tuple[dict, dict]:
    """({use: call to time}, {use: FLOPs of the compiled call}) of "training" and "sampling"."""
    net, key, x = unet(**model), jax.random.key(0), jnp.asarray(images)
    teacher = Teacher(None, net, PROCESS, Origin({}))
    optimiser = Optimiser(make_optimiser("adam", RATE))
    step = partial(
        denoise_step,
        loss_fn=partial(pretrain.loss, teacher=teacher, label_dropout=0.0),
        optimiser=optimiser,
        ema_decay=DECAY,
    )
    trained = {"net": jax.tree.map(jnp.copy, params)}  # the step donates its state
    state = create_state(trained, {"net": noise_bins()}, {"net": optimiser}, ["net"])
    batch = {"image": x, "label": jnp.zeros(len(x), jnp.int32)}
    train = jax.jit(step, donate_argnums=0).lower(state, {}, batch, key).compile()
    rows = (Generator(params, net, PROCESS, Origin({})), PROCESS.sigma_max * x, batch["label"])
    generate = jax.jit(one_step).lower(*rows).compile()

    def train_once():
        nonlocal state
        state, metrics = train(state, {}, batch, key)
        jax.block_until_ready((state, metrics))

    calls = {"sampling": lambda: jax.block_until_ready(generate(*rows)), "training": train_once}
    programs = {"sampling": generate, "training": train}
    return calls, {use: program.cost_analysis()["flops"] for use, program in programs.items()}
