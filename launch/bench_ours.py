"""What launch/bench.py times of ours: a training step and one-step sampling of any U-Net."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.unet import unet
from cheapscale.stages.networks import make_denoiser, make_generator
from cheapscale.stages.pretrain import denoising_loss
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import denoise_step, noise_bins
from cheapscale.training.state import Optimiser, create_state

PyTree = Any

DIFFUSION = dict(process="edm", P_mean=-1.2, P_std=1.2, sigma_data=0.5, sigma_max=80.0)
RATE, DECAY = 1e-4, 0.999


def random_weights(model: dict, seed: int = 0) -> PyTree:
    """Weights of order one for every tensor: a fresh network has zeros where it ends a block."""
    rng, shape = np.random.default_rng(seed), (1, model["resolution"], model["resolution"], 3)
    shapes = jax.eval_shape(unet(**model).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def our_step(model: dict) -> tuple[Callable, Optimiser]:
    """Pretraining's step, (state, frozen, batch, key) -> (state, metrics), and its optimiser."""
    optimiser = Optimiser(make_optimiser("adam", RATE))
    loss = partial(
        denoising_loss, bind=make_denoiser(model, DIFFUSION), diffusion=DIFFUSION, null_label=0,
        label_dropout=0.0,
    )  # fmt: skip
    return partial(denoise_step, loss_fn=loss, optimiser=optimiser, ema_decay=DECAY), optimiser


def our_calls(model: dict, params: PyTree, images: np.ndarray) -> tuple[dict, dict, Any]:
    """({use: call to time}, {use: FLOPs}, the compiled training step)."""
    step, optimiser = our_step(model)
    params = {"net": jax.tree.map(jnp.copy, params)}  # the step takes its state for good
    state = create_state(params, {"net": noise_bins()}, {"net": optimiser}, ["net"])
    batch = {"image": jnp.asarray(images), "label": jnp.zeros(len(images), jnp.int32)}
    key = jax.random.key(0)
    train = jax.jit(step, donate_argnums=0).lower(state, {}, batch, key).compile()
    z = DIFFUSION["sigma_max"] * batch["image"]
    weights = jax.tree.map(jnp.copy, params["net"])
    generate = jax.jit(make_generator(model, DIFFUSION)).lower(weights, z, batch["label"]).compile()

    def train_once():
        nonlocal state
        state, metrics = train(state, {}, batch, key)
        jax.block_until_ready((state, metrics))

    calls = {
        "training": train_once,
        "sampling": lambda: jax.block_until_ready(generate(weights, z, batch["label"])),
    }
    flops = {"training": train, "sampling": generate}
    return calls, {use: c.cost_analysis()["flops"] for use, c in flops.items()}, train
