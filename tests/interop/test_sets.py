"""What other people's checkpoints say and what has to be asked: averages, q/k/v, variances."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cheapscale.features.weights import Weights
from cheapscale.interop.sets import FORMATS, choose
from cheapscale.interop.teachers import read_network
from cheapscale.interop.unet_weights import entries_of
from cheapscale.models.unet import unet

ANCHOR = "time_embed.0.weight"
ONE = {"network": "net", "average": "net"}
# prefixes of the networks in a file, and what each set is taken for
FILES = {
    "the file": ([""], {"network": "the top level", "average": "the top level"}),
    "wrapped": (["module._orig_mod."], dict.fromkeys(ONE, "module._orig_mod")),
    "average": (["ema."], dict.fromkeys(ONE, "ema")),
    "both": (["model.", "ema."], {"network": "model", "average": "ema"}),
    "reversed": (["EMA.module.", "net."], {"network": "net", "average": "EMA.module"}),
    "timm": (["state_dict.", "state_dict_ema."],
             {"network": "state_dict", "average": "state_dict_ema"}),
    "params": (["params_ema.", "params."], {"network": "params", "average": "params_ema"}),
    "numbered": (["model.", "ema_0.9999."], {"network": "model", "average": "ema_0.9999"}),
    "nested": (["", "ema."], {"network": "the top level", "average": "ema"}),
    "schema": (["schema."], dict.fromkeys(ONE, "schema")),
}  # fmt: skip


def weights(arrays):
    return Weights({name: np.float32([[value]]) for name, value in arrays.items()}, "w.pt", "00")


def network(prefix, value):
    return {f"{prefix}{ANCHOR}": value, f"{prefix}out.2.bias": value}


@pytest.mark.parametrize("name", FILES)
def test_sets_are_taken_for_what_their_names_say(name):
    prefixes, names = FILES[name]
    values = {prefix: value for value, prefix in enumerate(prefixes)}
    arrays = {k: v for prefix in prefixes for k, v in network(prefix, values[prefix]).items()}
    chosen = choose(weights(arrays), "guided_diffusion")
    assert chosen.names == names and chosen.left_out == 0
    for key, found in (("network", chosen.raw), ("average", chosen.average)):
        (prefix,) = [p for p in prefixes if names[key] == (p.rstrip(".") or "the top level")]
        assert {n: a.item() for n, a in found.items()} == network("", values[prefix])


def test_latent_diffusions_averages_have_no_dots():
    raw = network("state_dict.model.diffusion_model.", 1)
    average = {
        f"state_dict.model_ema.diffusion_model{name.replace('.', '')}": value
        for name, value in network("", 2).items()
    }
    other = {"state_dict.first_stage_model.conv.weight": 3, "state_dict.model_ema.decay": 4}
    chosen = choose(weights(raw | average | other), "guided_diffusion")
    assert {n: a.item() for n, a in chosen.raw.items()} == network("", 1)
    assert {n: a.item() for n, a in chosen.average.items()} == network("", 2)
    assert chosen.names["average"] == "state_dict.model_ema.diffusion_model"
    assert chosen.left_out == 2


UNCLEAR = {
    "two": network("net.", 1) | network("target.", 2),
    "two averages": network("model.", 1) | network("ema_1.", 2) | network("ema_2.", 2),
    "averages alone": network("ema_1.", 1) | network("ema_2.", 2),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_is_asked(name):
    keys = dict.fromkeys(key.removesuffix(ANCHOR)[:-1] for key in UNCLEAR[name] if ANCHOR in key)
    with pytest.raises(ValueError, match=" or ".join(f"--weights=w.pt#{key}" for key in keys)):
        choose(weights(UNCLEAR[name]), "guided_diffusion")


def test_averages_without_names_are_no_raw_weights():
    """As in ema = {"shadow_params": [...], "decay": 0.999} beside a model."""
    arrays = weights(network("model.", 1)).arrays | {"ema.shadow_params.0": np.ones((2, 2))}
    with pytest.raises(ValueError, match="shadow_params.*take, --weights=w.pt#model"):
        choose(Weights(arrays, "w.pt", "00"), "guided_diffusion")
    with pytest.raises(ValueError, match="give --format=edm"):
        choose(weights({"model.map_layer0.weight": 1}), "guided_diffusion")
    with pytest.raises(ValueError, match="give a file of"):
        choose(weights({"conv.weight": 1}), "edm")


def test_averages_are_known_by_their_shapes_and_an_optimisers_are_of_gradients():
    arrays = weights(network("model.", 1)).arrays
    step = {"optimizer.state.0.exp_avg": np.ones((2, 2)), "opt.averages.1": np.ones((1, 1))}
    step |= {f"optimizer_states.0.state.{n}.exp_avg": np.ones((1, 1)) for n in range(2)}
    chosen = choose(Weights(arrays | step, "w.pt", "00"), "guided_diffusion")
    assert chosen.names == {"network": "model", "average": "model"} and chosen.left_out == 4
    other = {f"slow.{n}": np.ones((1, 1)) for n in range(2)}
    with pytest.raises(ValueError, match="slow.0 beside model, .*--weights=w.pt#model"):
        choose(Weights(arrays | step | other, "w.pt", "00"), "guided_diffusion")
    other.pop("slow.1")
    assert choose(Weights(arrays | other, "w.pt", "00"), "guided_diffusion").left_out == 1
    two = network("a.", 1) | network("b.", 2)
    with pytest.raises(ValueError, match="--weights=a.pt or --weights=b.pt"):
        choose(weights(two)._replace(path="a.pt + b.pt"), "guided_diffusion")


MODEL = dict(
    resolution=8, channels=32, channel_mult=(1, 2), attention=(4,), head_dim=16, num_classes=3
)


def theirs(form, **changes):
    """(our parameters, the same as a file of `form` in our own layout, the model's config)."""
    net = unet(**MODEL | changes)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
    draw, state = np.random.default_rng(0), {}
    ours = {
        path: draw.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in flatten_dict(shapes["params"], sep="/").items()
    }
    for entry in entries_of(form, net.config):
        array = ours[entry.path]
        if entry.kind == "conv":
            array = array.transpose(3, 2, 0, 1)
        elif entry.kind != "plain" and array.ndim == 2:
            array = array.T
        state[entry.name] = array
    return ours, state, net.config


@pytest.mark.parametrize("form", FORMATS)
def test_a_learned_variance_is_left_out_and_named(form):
    ours, state, config = theirs(form)
    heads = {e.name for e in entries_of(form, config) if e.path.startswith("head/conv")}
    wide = {n: np.concatenate([a, a + 1]) if n in heads else a for n, a in state.items()}
    for arrays, word in ((state, "none"), (wide, "left out")):
        file = Weights(arrays, "w.pt", "00")
        raw, average, origin = read_network(file, config, form, "three_head_dim")
        assert origin["learned_variance"] == word
        for found in (raw, average):
            for path, array in flatten_dict(found, sep="/").items():
                np.testing.assert_array_equal(array, ours[path], err_msg=path)


def test_the_order_of_q_k_v_is_asked_where_it_matters():
    _, state, config = theirs("guided_diffusion")
    file = Weights(state, "w.pt", "00")
    with pytest.raises(ValueError, match="--qkv_layout=head_three_dim .*--qkv_layout=three_head"):
        read_network(file, config, "guided_diffusion")
    _, state, config = theirs("guided_diffusion", head_dim=0)  # the same for a single head
    origin = read_network(Weights(state, "w.pt", "00"), config, "guided_diffusion")[2]
    assert origin["qkv_layout"] == "three_head_dim"
    _, state, config = theirs("edm")
    origin = read_network(Weights(state, "w.pt", "00"), config, "edm")[2]
    assert origin["qkv_layout"] == "head_dim_three"


@pytest.mark.parametrize("form", FORMATS)
def test_other_classes_and_wrong_numbers_are_refused(form):
    _, state, config = theirs(form)
    for count, have in ((0, 3), (4, 3)):
        _, _, other = theirs(form, num_classes=count)
        with pytest.raises(ValueError, match=f"{have} classes.*num_classes={have}"):
            read_network(Weights(state, "w.pt", "00"), other, form, "three_head_dim")
    _, without, _ = theirs(form, num_classes=0)
    with pytest.raises(ValueError, match="no classes.*num_classes=0"):
        read_network(Weights(without, "w.pt", "00"), config, form, "three_head_dim")
    name = next(name for name in state if name.endswith("norm.weight") or "layers.0.weight" in name)
    state[name] = state[name] * np.nan
    with pytest.raises(ValueError, match=f"weight {name!r} are not finite"):
        read_network(Weights(state, "w.pt", "00"), config, form, "three_head_dim")


@pytest.mark.parametrize("change", ["channels", "rank", "int8"])
def test_a_tensor_that_does_not_fit_is_named_with_its_shape(change):
    _, state, config = theirs("edm")
    name = next(name for name in state if name.endswith("qkv.weight"))
    if change == "channels":
        state[name] = np.ones((100, 32), np.float32)
    elif change == "rank":
        name = next(name for name in state if name.endswith("conv0.weight"))
        state[name] = state[name][0]
    else:
        state[name] = state[name].astype(np.int8)
    found = "is int8" if change == "int8" else f"has shape {state[name].shape} for ("
    with pytest.raises(ValueError, match=re.escape(f"weight {name!r} {found}")):
        read_network(Weights(state, "w.pt", "00"), config, "edm")
