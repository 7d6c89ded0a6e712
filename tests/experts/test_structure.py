"""The layout of prunable channels, and the effect of their removal, on every U-Net family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cheapscale.experts import structure
from cheapscale.models.unet import UNet, unet
from configs.models import preset

# every kind of block and condition, and norms with several groups of several channels
BASE = dict(
    resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention=(8, 4), head_dim=8,
    groups=4, num_classes=3, extra_conditions=2, caption_dim=5,
)  # fmt: skip
FAMILIES = {
    "adm": BASE,
    "ddpmpp": BASE | {"family": "ddpmpp", "augment_dim": 9},
    "ncsnpp": BASE | {"family": "ncsnpp"},
}


def shapes(config):
    net = UNet(config)
    x = jnp.zeros((1, config.resolution, config.resolution, 3))
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1))["params"]


@functools.cache
def network(family="adm", **changes):
    """(config, random weights): the zeros of an initialisation would hide errors."""
    config = unet(**FAMILIES[family] | changes).config
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + rng.normal(size=leaf.shape) / np.sqrt(fan)).astype(np.float32)

    return config, jax.tree_util.tree_map_with_path(fill, shapes(config))


def outputs(config, params, **collections):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    condition = {
        "label": np.array([0, 2]), "extra": rng.normal(size=(2, 2)).astype(np.float32),
        "caption": rng.normal(size=(2, 5)).astype(np.float32),
    }  # fmt: skip
    noise = np.array([0.3, -1.0], np.float32)
    apply = _compiled(config)
    return np.asarray(apply({"params": params} | collections, x, noise, **condition))


@functools.cache
def _compiled(config):
    return jax.jit(lambda variables, *args, **kw: UNet(config).apply(variables, *args, **kw))


def halved(config, seed=0):
    """A random half (or three quarters) of the channels of every variable."""
    rng, keep = np.random.default_rng(seed), {}
    for name, variable in structure.variables(config).items():
        if len(variable.menu) > 1:
            width = variable.menu[len(variable.menu) // 2]
            keep[name] = structure.keep_best(variable, rng.normal(size=variable.width), width)
    return keep


def pruned_config(config, keep):
    return structure.pruned_config(config, {name: len(kept) for name, kept in keep.items()})


@pytest.mark.parametrize("name", ["cifar10_ddpmpp", "cifar10_ncsnpp", "imagenet64_adm", "tiny16"])
def test_every_preset_has_weights_where_the_layout_says(name):
    """The axes of `holds` are exactly those in which a narrower network's weights differ."""
    config = unet(**preset(name)).config
    known, found = structure.variables(config), structure.layout(config)
    whole = flatten_dict(jax.tree.map(np.shape, shapes(config)), sep="/")
    for path, (axis, names) in found.holds.items():
        assert whole[path][axis] == sum(known[name].width for name in names)
    keep = halved(config)
    narrow = flatten_dict(jax.tree.map(np.shape, shapes(pruned_config(config, keep))), sep="/")
    differs = {
        path: [i for i, (a, b) in enumerate(zip(shape, narrow[path])) if a != b]
        for path, shape in whole.items()
    }
    lost = {n for n in keep if len(keep[n]) < known[n].width}
    assert {path: axes for path, axes in differs.items() if axes} == {
        path: [axis] for path, (axis, names) in found.holds.items() if lost & set(names)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_is_bit_identical(family):
    config, params = network(family)
    everything = {n: np.arange(v.width) for n, v in structure.variables(config).items()}
    assert pruned_config(config, everything) == config
    pruned = structure.prune(params, config, everything)
    jax.tree.map(np.testing.assert_array_equal, pruned, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_network_equals_the_pruned_one_with_group_norms(family):
    """The full-size network with masks and the narrower network have equal outputs, and the weights
    have the shapes of the narrower plan."""
    config, params = network(family)
    keep = halved(config)
    assert {name.split(".")[1] for name in keep} == {"inner", "qk", "v"}
    narrow, cut = pruned_config(config, keep), structure.prune(params, config, keep)
    assert jax.tree.map(np.shape, cut) == jax.tree.map(np.shape, shapes(narrow))
    before, after = (sum(map(np.size, jax.tree.leaves(tree))) for tree in (params, cut))
    assert after < 0.85 * before
    pruned = outputs(narrow, cut)
    weights, masks = structure.masked(params, config, keep)
    masked = outputs(config, weights, keep=masks)
    np.testing.assert_allclose(masked, pruned, atol=5e-5 * np.abs(pruned).max())
    without = outputs(config, weights)
    assert (
        np.abs(without - pruned).max() > 0.02 * np.abs(pruned).max()
    )  # the difference that the masks of the norms make
    nothing, masks = structure.masked(params, config, {})
    whole = outputs(config, nothing, keep=masks)
    np.testing.assert_allclose(whole, outputs(config, params), rtol=1e-4, atol=1e-4)


def permutation(variable, seed):
    """A random permutation of the channels within each cell."""
    rng = np.random.default_rng(seed)
    cells = np.arange(variable.width).reshape(variable.cells, -1)
    return np.concatenate([rng.permutation(cell) for cell in cells])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permutation_inside_the_cells_changes_nothing(family):
    """This permutes every variable with more than one channel per cell, all at once."""
    config, params = network(family)
    known = structure.variables(config).items()
    keep = {n: permutation(v, i) for i, (n, v) in enumerate(known) if v.cells < v.width}
    assert {name.split(".")[1] for name in keep} == {"inner", "qk", "v"}
    base = outputs(config, params)
    again = outputs(config, structure.prune(params, config, keep))
    np.testing.assert_allclose(again, base, atol=2e-4 * np.abs(base).max())


def test_a_permutation_across_cells_breaks_and_an_uneven_cut_is_refused():
    config, params = network()
    name, variable = next(iter(structure.variables(config).items()))
    moved = np.roll(np.arange(variable.width), variable.width // variable.cells // 2)
    base = outputs(config, params)
    broken = outputs(config, structure.prune(params, config, {name: moved}))
    assert np.abs(broken - base).max() > 0.02 * np.abs(base).max()
    with pytest.raises(ValueError, match=rf"keep\['{name}'\] leaves .* keep equally many"):
        structure.prune(params, config, {name: np.arange(variable.width // 2)})
    with pytest.raises(ValueError, match="keep equally many in each, once"):
        structure.prune(params, config, {name: np.zeros(variable.width, int)})
    with pytest.raises(ValueError, match="keep names 'nothing'"):
        structure.prune(params, config, {"nothing": np.arange(3)})


def test_pruning_values_equals_zeroing_the_weights_that_read_them():
    """Values of attention are not normalised, so plain zeros suffice."""
    config, params = network()
    rng, keep, zeroed = np.random.default_rng(0), {}, jax.tree.map(np.copy, params)
    for name, v in structure.variables(config).items():
        if v.field == "v":
            keep[name] = structure.keep_best(v, rng.normal(size=v.width), v.width // 2)
            zeroed[v.block]["proj"]["kernel"][np.setdiff1d(np.arange(v.width), keep[name])] = 0
    pruned = outputs(pruned_config(config, keep), structure.prune(params, config, keep))
    expected = outputs(config, zeroed)
    np.testing.assert_allclose(pruned, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(pruned - outputs(config, params)).max() > 0.01


def test_pruning_in_two_steps_equals_pruning_once():
    """They agree bit for bit, except queries, where two multiplications change their order."""
    config, params = network()
    first = halved(config, seed=0)
    middle = pruned_config(config, first)
    second = halved(middle, seed=1)
    twice = structure.prune(structure.prune(params, config, first), middle, second)
    composed = {
        name: keep[second[name]] if name in second else keep for name, keep in first.items()
    }
    assert set(second) <= set(first)
    once = structure.prune(params, config, composed)

    def same(path, a, b):
        if any("qkv" in key.key for key in path):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree_util.tree_map_with_path(same, twice, once)
    assert pruned_config(middle, second) == pruned_config(config, composed)


def test_the_temperature_of_attention_does_not_change():
    """If the removed dimensions of the queries are zero, the cut does not change the logits."""
    config, params = network()
    keep, silent = {}, jax.tree.map(np.copy, params)
    for name, v in structure.variables(config).items():
        if v.field == "qk":
            keep[name] = structure.keep_best(v, np.arange(v.width), v.width // 2)
            gone = np.setdiff1d(np.arange(v.width), keep[name])
            qkv = silent[v.block]["qkv"]
            qkv["kernel"][:, gone] = qkv["bias"][gone] = 0
    base = outputs(config, silent)
    pruned = outputs(pruned_config(config, keep), structure.prune(silent, config, keep))
    np.testing.assert_allclose(pruned, base, atol=2e-5 * np.abs(base).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_analytic_flops_agree_with_the_compilers(family):
    """The ratio of pruned to base FLOPs agrees with the compiler's count within 3 %."""
    config, params = network(
        family, channels=48
    )  # with 16 channels elementwise operations would matter too

    def compiled(config, params):
        x, noise = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2)
        run = jax.jit(lambda p: UNet(config).apply({"params": p}, x, noise))
        return run.lower(params).compile().cost_analysis()["flops"]

    keep = halved(config)
    narrow = pruned_config(config, keep)
    measured = compiled(narrow, structure.prune(params, config, keep)) / compiled(config, params)
    counted = structure.flops(narrow) / structure.flops(config)
    assert measured == pytest.approx(counted, rel=0.03) and counted < 0.9


def test_variables_of_the_cifar_network():
    """Every residual block has an inner width, and every attention block two more."""
    found = structure.variables(unet(**preset("cifar10_ddpmpp")).config)
    # 3 levels x 4 blocks, 2 downs; 2 middle; 3 x 5 blocks, 2 ups
    assert [v.field for v in found.values()].count("inner") == 33
    assert all(v.cells == 32 for v in found.values() if v.field == "inner" and v.width == 256)
    assert {v.field for v in found.values()} == {"inner", "qk", "v"}


def test_channels_are_kept_by_score_equally_in_every_cell():
    variable = structure.Variable("block", "inner", 12, 3)
    assert variable.menu == (3, 6, 9, 12)
    scores = np.array([1, 9, 3, 2, 100, 90, 80, 70, 0, 1, 2, 3])
    assert structure.keep_best(variable, scores, 6).tolist() == [1, 2, 4, 5, 10, 11]
