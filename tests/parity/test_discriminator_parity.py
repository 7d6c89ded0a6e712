"""The projected discriminator's parts against PyTorch outputs (shared/parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.features.mixing import cross_scale
from cheapscale.pagoda.discriminator import Head, unit

BLOCKS = {"main.0.main.0": "block0_conv", "main.1.main.0": "block1_conv", "cls": "out"}


@pytest.fixture(scope="module")
def reference(shared):
    return dict(np.load(shared / "parity" / "projected_discriminator.npz"))


@pytest.fixture(scope="module")
def head(reference):
    """The reference's mini-discriminator as (head, params, spectral)."""
    params, spectral = {}, {}
    for torch_name, name in BLOCKS.items():
        before = f"disc/before/{torch_name}."
        kernel = reference[before + "weight_orig"].transpose(2, 3, 1, 0)
        params[name] = {"kernel": kernel}
        spectral[name] = {"u": reference[before + "weight_u"]}
        if before + "bias" in reference:
            params[name]["bias"] = reference[before + "bias"]
    for i in range(2):
        norm = f"disc/before/main.{i}.main.1."
        params[f"block{i}_norm"] = {
            "scale": reference[norm + "weight"],
            "bias": reference[norm + "bias"],
        }
    params["embedding"] = reference["disc/before/embed.weight"]
    params["condition_kernel"] = reference["disc/before/embed_proj.weight"].T
    params["condition_bias"] = reference["disc/before/embed_proj.bias"]
    model = Head(channels=(24, 32), condition_dim=20, num_classes=10, embedding_dim=24)
    return model, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, spectral)


@pytest.fixture(scope="module")
def forward(head):
    model = head[0]

    @jax.jit
    def forward(params, spectral, x, label):
        variables = {"params": params, "spectral": spectral}
        logits, state = model.apply(variables, x, {"label": label}, mutable=["spectral"])
        return logits, state["spectral"]

    return forward


def inputs(reference):
    return jnp.asarray(reference["disc/x"].transpose(0, 2, 3, 1)), reference["disc/labels"]


def close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale)


def test_logits_of_two_calls_and_power_iteration_between_them(reference, head, forward):
    _, params, spectral = head
    x, label = inputs(reference)
    first, advanced = forward(params, spectral, x, label)
    close(first, reference["disc/logits_first"].reshape(4, 25))
    for torch_name, name in BLOCKS.items():
        after = f"disc/after_first/{torch_name}."
        close(advanced[name]["u"], reference[after + "weight_u"])
        # v is a function of the previous u; our rows are ordered (h, w, in), torch's (in, h, w).
        kernel = params[name]["kernel"].transpose(2, 0, 1, 3)
        v = unit(kernel.reshape(-1, kernel.shape[-1]) @ spectral[name]["u"])
        close(v, reference[after + "weight_v"])
    second, _ = forward(params, advanced, x, label)
    close(second, reference["disc/logits_second"].reshape(4, 25))


def test_gradients_of_the_second_call(reference, head, forward):
    _, params, spectral = head
    x, label = inputs(reference)
    _, spectral = forward(params, spectral, x, label)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(forward(p, spectral, x, label)[0])))(params)
    expected = {
        k.removeprefix("disc/grad_of_sum_second/"): v
        for k, v in reference.items()
        if k.startswith("disc/grad_of_sum_second/")
    }
    for torch_name, name in BLOCKS.items():
        kernel = expected.pop(torch_name + ".weight_orig").transpose(2, 3, 1, 0)
        close(grads[name]["kernel"], kernel)
        # A bias ahead of batch norm has no effect: both gradients are rounding error.
        if torch_name + ".bias" in expected:
            assert np.abs(expected.pop(torch_name + ".bias")).max() < 1e-4
            assert np.abs(grads[name]["bias"]).max() < 1e-4
    for i in range(2):
        close(grads[f"block{i}_norm"]["scale"], expected.pop(f"main.{i}.main.1.weight"))
        close(grads[f"block{i}_norm"]["bias"], expected.pop(f"main.{i}.main.1.bias"))
    close(grads["embedding"], expected.pop("embed.weight"))
    close(grads["condition_kernel"].T, expected.pop("embed_proj.weight"))
    close(grads["condition_bias"], expected.pop("embed_proj.bias"))
    assert not expected


def test_cross_scale_mixing(reference):
    csm = [
        {
            "kernel": reference[f"csm/{i}/out_conv.weight"][:, :, 0, 0].T,
            "bias": reference[f"csm/{i}/out_conv.bias"],
        }
        for i in range(4)
    ]
    maps = [jnp.asarray(reference[f"csm/in{i}"].transpose(0, 2, 3, 1)) for i in range(4)]
    out = jax.jit(cross_scale)(csm, maps)
    for i in range(4):
        close(out[i], reference[f"csm/out{i}"].transpose(0, 2, 3, 1))
