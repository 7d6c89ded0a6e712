"""PaGoDA's grown generator against its published code: 16 px base, 32 px output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM
from cheapscale.diffusion.noise import noise_feature
from cheapscale.interop.unet_weights import to_params
from cheapscale.models.unet import unet

MODEL = dict(
    resolution=16, channels=32, channel_mult=(1, 2), num_blocks=1, attention=(8,), head_dim=16,
    group_size=1, num_classes=10, growth=(32,),
)  # fmt: skip


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def relative(ours, theirs):
    theirs = theirs.transpose(0, 2, 3, 1)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def reference(shared):
    return dict(np.load(shared / "parity" / "pagoda_generator_16to32px.npz"))


@pytest.fixture(scope="module")
def state(reference):
    return {k.removeprefix("param/"): v for k, v in reference.items() if k.startswith("param/")}


@pytest.fixture(scope="module")
def apply():
    net = unet(**MODEL)
    return jax.jit(lambda params, x, noise, label: net.apply({"params": params}, x, noise, label))


def test_one_step_image_equals_pagoda(reference, state, apply):
    params = to_params(state, unet(**MODEL).config, "guided_diffusion", qkv_layout="three_head_dim")
    label = jnp.asarray(reference["labels"], jnp.int32)
    z = nhwc(reference["z"])

    def F(x, noise, label):
        return apply(params, x, noise, label)

    image = EDM().one_step(F, z, feature="openai", label=label)
    assert image.shape == (2, 32, 32, 3)
    assert relative(image, reference["image"]) < 1e-4

    # the input scaling stays that of sigma 80
    noise = noise_feature("openai", jnp.asarray(reference["sigma_other"]))
    other = apply(params, z / (80**2 + 0.25) ** 0.5, noise, label)
    assert relative(other, reference["image_sigma_other"]) < 1e-4


@pytest.mark.parametrize("layout", ["head_three_dim", "head_dim_three"])
def test_wrong_qkv_order_is_visible(reference, state, apply, layout):
    params = to_params(state, unet(**MODEL).config, "guided_diffusion", qkv_layout=layout)
    label = jnp.asarray(reference["labels"], jnp.int32)
    image = EDM().one_step(
        lambda x, noise, label: apply(params, x, noise, label),
        nhwc(reference["z"]), feature="openai", label=label,
    )  # fmt: skip
    assert relative(image, reference["image"]) > 0.1


def test_other_growth_is_refused(state):
    with pytest.raises(ValueError, match="unused.*output_blocks.4.0"):
        to_params(
            state,
            unet(**MODEL | {"growth": ()}).config,
            "guided_diffusion",
            qkv_layout="three_head_dim",
        )
    with pytest.raises(ValueError, match="--config.model.family=adm"):
        to_params(
            state,
            unet(**MODEL | {"family": "ddpmpp"}).config,
            "guided_diffusion",
            qkv_layout="three_head_dim",
        )
