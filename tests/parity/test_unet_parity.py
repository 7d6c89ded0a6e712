"""ADM, DDPM++ and NCSN++ against EDM's PyTorch networks: raw output, denoiser, Heun samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM
from cheapscale.diffusion.samplers import solve
from cheapscale.interop.pytorch import QKV_LAYOUTS, Entry, convert
from cheapscale.interop.unet_weights import to_params
from cheapscale.models.unet import UNet, unet

SHARED = dict(resolution=16, channels=32, channel_mult=(1, 2), attention=(8,), head_dim=0)
MODELS = {
    "adm": dict(SHARED, family="adm", num_classes=10, noise_feature="edm"),
    "ddpmpp": dict(SHARED, family="ddpmpp", num_blocks=2, num_classes=10),
    "ncsnpp": dict(SHARED, family="ncsnpp", num_blocks=2),
}


@functools.cache
def jitted(net: UNet):
    return jax.jit(lambda p, x, noise, label: net.apply({"params": p}, x, noise, label=label))


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1).astype(np.float32))


def relative(ours, theirs):
    """The largest error divided by the largest reference value."""
    theirs = theirs.transpose(0, 2, 3, 1)
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def load(shared, name):
    reference = dict(np.load(shared / "parity" / f"{name}_edm_16px.npz"))
    state = {
        k.removeprefix("param/model."): v for k, v in reference.items() if k.startswith("param/")
    }
    label = reference.get("labels_onehot")
    label = None if label is None else jnp.asarray(label.argmax(1), jnp.int32)
    return unet(**MODELS[name]), state, label, reference


@pytest.mark.parametrize("name", MODELS)
def test_network_denoiser_and_sampler_equal_edm(shared, name):
    net, state, label, reference = load(shared, name)
    params = to_params(state, net.config, "edm")
    apply = jitted(net)

    F = apply(params, nhwc(reference["x"]), jnp.asarray(reference["c_noise"]), label)
    assert relative(F, reference["F"]) < 1e-4

    D = functools.partial(
        EDM().denoise, lambda x, c_noise: apply(params, x, c_noise, label),
        feature=net.config.noise_feature,
    )  # fmt: skip
    denoised = D(nhwc(reference["x"]), jnp.asarray(reference["sigma"]))
    assert relative(denoised, reference["D"]) < 1e-4

    start = nhwc(reference["heun_latents"]) * 80
    sample = jax.jit(lambda x: solve([(D, reference["heun_grid"])], x))(start)
    assert relative(sample, reference["heun_out"]) < 1e-4


def test_wrong_qkv_order_is_visible(shared):
    net, state, label, reference = load(shared, "adm")
    params = to_params(state, net.config, "edm", qkv_layout="three_head_dim")
    F = jitted(net)(params, nhwc(reference["x"]), jnp.asarray(reference["c_noise"]), label)
    assert relative(F, reference["F"]) > 0.3


def test_checkpoint_that_does_not_fit_is_refused_with_names(shared):
    net, state, _, _ = load(shared, "adm")
    lacking = {k: v for k, v in state.items() if k != "out_norm.bias"}
    with pytest.raises(ValueError, match="missing.*out_norm.bias.*unused nothing"):
        to_params(lacking, net.config, "edm")
    with pytest.raises(ValueError, match="unused.*stray"):
        to_params(state | {"stray": np.zeros(1)}, net.config, "edm")
    wider = unet(**MODELS["adm"] | {"channel_mult": (1, 4)})
    with pytest.raises(ValueError, match=r"dec_16_up/conv0/kernel has .* for .*; .* widths"):
        to_params(state, wider.config, "edm")
    for count in (0, 11):
        other = unet(**MODELS["adm"] | {"num_classes": count})
        with pytest.raises(ValueError, match=r"10 classes.*--config.model.num_classes=10 and"):
            to_params(state, other.config, "edm")


@pytest.mark.parametrize("layout", QKV_LAYOUTS)
def test_qkv_channels_arrive_as_three_head_dim(layout):
    """Every channel carries its own (three, head, dim) as a number, laid out as `layout` says."""
    numbers = np.arange(30.0).reshape(3, 2, 5)
    order = [("three", "head", "dim").index(axis) for axis in QKV_LAYOUTS[layout].split()]
    theirs = numbers.transpose(order).reshape(30)
    entries = [Entry("qkv/kernel", "w", "qkv", heads=2), Entry("qkv/bias", "b", "qkv", heads=2)]
    state = {"w": np.repeat(theirs[:, None], 4, axis=1)[..., None, None], "b": theirs}
    ours = convert(state, entries, qkv_layout=layout)["qkv"]
    np.testing.assert_array_equal(ours["bias"], np.arange(30))
    np.testing.assert_array_equal(ours["kernel"], np.tile(np.arange(30), (4, 1)))
