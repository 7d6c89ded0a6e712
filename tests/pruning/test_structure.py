"""The channel interpreter: tests T1 to T8 of spec 4.10, on every family, with real weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cheapscale.models.unet import UNet, unet
from cheapscale.pruning import structure
from cheapscale.training.sharding import make_mesh
from configs.models import preset

# every kind of block and condition; widths whose norms have several groups of several channels
BASE = dict(
    resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention=(8, 4), head_dim=8,
    groups=4, num_classes=3, extra_conditions=2, caption_dim=5,
)  # fmt: skip
FAMILIES = {
    "adm": BASE,
    "ddpmpp": BASE | {"family": "ddpmpp", "augment_dim": 9},
    "ncsnpp": BASE | {"family": "ncsnpp"},
}


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def shapes(config):
    net = UNet(config)
    x = jnp.zeros((1, config.resolution, config.resolution, 3))
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1))["params"]


@functools.cache
def network(family="adm", **changes):
    """(config, weights) with nothing at zero: at initialisation all of this would pass vacuously
    (T8)."""
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


def halved(found, kinds, seed=0):
    """keep: a random half (or three quarters) of every variable of these kinds that can lose."""
    rng, keep = np.random.default_rng(seed), {}
    for name, variable in found.variables.items():
        if variable.kind in kinds and len(variable.menu) > 1:
            width = variable.menu[len(variable.menu) // 2]
            keep[name] = structure.keep_best(variable, rng.normal(size=variable.width), width)
    return keep


@pytest.mark.parametrize("name", ["cifar10_ddpmpp", "cifar10_ncsnpp", "imagenet64_adm", "tiny16"])
def test_every_weight_of_every_preset_is_laid_out(name):
    config = unet(**preset(name)).config
    found = structure.layout(config)
    flat = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(config))
    }
    widths = {p: tuple(sum(s.width for s in axis) for axis in a) for p, a in found.leaves.items()}
    assert widths == flat


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_is_bit_identical(family):
    """T1."""
    config, params = network(family)
    found = structure.layout(config)
    everything = {name: np.arange(variable.width) for name, variable in found.variables.items()}
    assert structure.pruned_config(config, everything) == config
    pruned = structure.prune(params, config, everything)
    jax.tree.map(np.testing.assert_array_equal, pruned, params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", structure.PLANS)
def test_pruned_weights_are_those_of_the_pruned_network(family, plan):
    """T2: the tree and the shapes that the narrower network asks for, and it runs."""
    config, params = network(family)
    keep = halved(structure.layout(config), structure.PLANS[plan])
    assert len(keep) > 10
    narrower = structure.pruned_config(config, keep)
    pruned = structure.prune(params, config, keep)
    assert jax.tree.map(np.shape, pruned) == jax.tree.map(np.shape, shapes(narrower))
    before, after = (sum(map(np.size, jax.tree.leaves(tree))) for tree in (params, pruned))
    assert after < 0.85 * before
    assert np.isfinite(outputs(narrower, pruned)).all()


def permutation(variable, seed):
    """A permutation inside each cell."""
    rng = np.random.default_rng(seed)
    cells = np.arange(variable.width).reshape(variable.cells, -1)
    return np.concatenate([rng.permutation(cell) for cell in cells])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permutation_inside_the_groups_changes_nothing(family):
    """T3: of every variable that has room for one, all at once and with real group norms; beside a
    seam, where a group has members of both sides, it does unless there is but one group."""
    config, params = network(family)
    found = structure.layout(config)
    roomy = {n: v for n, v in found.variables.items() if v.cells < v.width}
    keep = {n: permutation(v, i) for i, (n, v) in enumerate(roomy.items()) if not v.seam}
    kinds = {found.variables[name].kind for name in keep}
    assert kinds == {"inner", "qk", "v", "stream", "map"}
    base = outputs(config, params)
    again = outputs(config, structure.prune(params, config, keep))
    np.testing.assert_allclose(again, base, atol=2e-4 * np.abs(base).max())
    seams = {n: permutation(v, 0) for n, v in roomy.items() if v.seam}
    assert seams
    moved = outputs(config, structure.prune(params, config, seams))
    assert np.abs(moved - base).max() > 2e-3 * np.abs(base).max()
    alone, params = network(family, groups=1)
    variables = structure.layout(alone).variables
    seams = {n: permutation(variables[n], 1) for n in seams}
    base = outputs(alone, params)
    again = outputs(alone, structure.prune(params, alone, seams))
    np.testing.assert_allclose(again, base, atol=2e-4 * np.abs(base).max())


def test_a_permutation_across_groups_is_refused_where_it_is_uneven_and_breaks_where_it_is_not():
    config, params = network()
    found = structure.layout(config)
    name, variable = next((n, v) for n, v in found.variables.items() if v.kind == "inner")
    moved = np.roll(np.arange(variable.width), variable.width // variable.cells // 2)
    base = outputs(config, params)
    broken = outputs(config, structure.prune(params, config, {name: moved}))
    assert np.abs(broken - base).max() > 0.02 * np.abs(base).max()
    with pytest.raises(ValueError, match=rf"keep\['{name}'\] leaves .* keep equally many"):
        structure.prune(params, config, {name: np.arange(variable.width // 2)})
    with pytest.raises(ValueError, match="must hold different numbers below"):
        structure.prune(params, config, {name: np.zeros(variable.width, int)})
    with pytest.raises(ValueError, match="keep names 'nothing'"):
        structure.prune(params, config, {"nothing": np.arange(3)})


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_pruned_with_real_group_norms(family):
    """The full-size network with masks computes what the narrower one does, for all of plan A."""
    config, params = network(family)
    keep = halved(structure.layout(config), structure.PLANS["inner"])
    pruned = outputs(structure.pruned_config(config, keep), structure.prune(params, config, keep))
    variables = structure.masked(params, config, keep)
    masked = outputs(config, variables["params"], keep=variables["keep"])
    np.testing.assert_allclose(masked, pruned, atol=5e-5 * np.abs(pruned).max())
    without = outputs(config, variables["params"])
    assert np.abs(without - pruned).max() > 0.02 * np.abs(pruned).max()  # the norms' part of it
    nothing = structure.masked(params, config, {})
    whole = outputs(config, nothing["params"], keep=nothing["keep"])
    np.testing.assert_allclose(whole, outputs(config, params), rtol=1e-4, atol=1e-4)


def zeroed_readers(params, config, gone):
    """The full-size weights with every kernel's slices that read the channels `gone` at zero."""
    found, params = structure.layout(config), jax.tree.map(np.copy, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = found.leaves["/".join(key.key for key in path)]
        if path[-1].key == "kernel":
            offset = 0
            for segment in axes[-2]:
                leaf[..., offset + gone.get(segment.variable, np.array([], int)), :] = 0
                offset += segment.width
    return params


def test_pruning_values_is_zeroing_what_reads_them():
    """T4 for what no norm reads: the values of attention."""
    config, params = network()
    found, rng = structure.layout(config), np.random.default_rng(0)
    keep = {
        name: structure.keep_best(variable, rng.normal(size=variable.width), variable.width // 2)
        for name, variable in found.variables.items()
        if variable.kind == "v"
    }
    gone = {n: np.setdiff1d(np.arange(found.variables[n].width), kept) for n, kept in keep.items()}
    pruned = outputs(structure.pruned_config(config, keep), structure.prune(params, config, keep))
    zeroed = outputs(config, zeroed_readers(params, config, gone))
    np.testing.assert_allclose(pruned, zeroed, atol=2e-5 * np.abs(zeroed).max())
    assert np.abs(pruned - outputs(config, params)).max() > 0.01


@pytest.mark.parametrize("plan", structure.PLANS)
def test_pruning_twice_is_pruning_once(plan):
    """T5, bit for bit (queries but for the order of two multiplications)."""
    config, params = network()
    first = halved(structure.layout(config), structure.PLANS[plan], seed=0)
    middle = structure.pruned_config(config, first)
    second = halved(structure.layout(middle), structure.PLANS[plan], seed=1)
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
    assert structure.pruned_config(middle, second) == structure.pruned_config(config, composed)


def test_the_optimisers_moments_are_cut_like_their_weights():
    """T6; a first moment of rescaled queries is their gradient's: it scales inversely."""
    config, params = network()
    keep = halved(structure.layout(config), structure.PLANS["inner"])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(np.ones_like, params), state, params)
    pruned = structure.prune(params, config, keep)
    cut = structure.prune_optimiser(state, params, config, keep)
    expected = jax.tree.map(jnp.shape, tx.init(pruned))
    assert jax.tree.map(jnp.shape, cut) == expected
    adam = cut[1][0]
    assert int(adam.count) == 1
    block = next(name for name in params if "qkv" in params[name])
    width = pruned[block]["qkv"]["kernel"].shape[1]
    heads_left, heads = len(keep[f"{block}.qk"]), params[block]["qkv"]["kernel"].shape[1] // 3
    factor = np.sqrt(heads_left / heads)
    mu, nu = (np.asarray(m[block]["qkv"]["bias"]) for m in (adam.mu, adam.nu))
    np.testing.assert_allclose(mu[:heads_left] * factor, mu[-1], rtol=1e-5)
    np.testing.assert_allclose(nu[:heads_left] * factor**2, nu[-1], rtol=1e-5)
    assert width == len(mu)


def test_the_attentions_temperature_stays():
    """Queries whose lost dimensions are zero give the same logits after the cut."""
    config, params = network()
    found = structure.layout(config)
    keep, silent = {}, jax.tree.map(np.copy, params)
    for name, variable in found.variables.items():
        if variable.kind != "qk":
            continue
        keep[name] = structure.keep_best(variable, np.arange(variable.width), variable.width // 2)
        gone = np.setdiff1d(np.arange(variable.width), keep[name])
        qkv = silent[name.removesuffix(".qk")]["qkv"]
        qkv["kernel"][:, gone] = qkv["bias"][gone] = 0
    base = outputs(config, silent)
    pruned = outputs(structure.pruned_config(config, keep), structure.prune(silent, config, keep))
    np.testing.assert_allclose(pruned, base, atol=2e-5 * np.abs(base).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_fall_as_counted(family):
    """T7: compiled, pruned over base within 3 % of the analytic ratio; both plans."""
    config, params = network(family, channels=48)  # at 16 channels what is elementwise counts too

    def compiled(config, params):
        x, noise = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2)
        run = jax.jit(lambda p: UNet(config).apply({"params": p}, x, noise))
        return run.lower(params).compile().cost_analysis()["flops"]

    base = compiled(config, params)
    for plan in structure.PLANS:
        keep = halved(structure.layout(config), structure.PLANS[plan])
        narrower = structure.pruned_config(config, keep)
        measured = compiled(narrower, structure.prune(params, config, keep)) / base
        counted = structure.flops(narrower) / structure.flops(config)
        assert measured == pytest.approx(counted, rel=0.03) and counted < 0.9


def test_variables_of_the_cifar_network_are_those_of_the_spec():
    """Spec 4.6: of a residual network with attention the couplings are known."""
    config = unet(**preset("cifar10_ddpmpp")).config
    found = structure.layout(config).variables
    kinds = [v.kind for v in found.values()]
    # 3 levels x 4 blocks, 2 downs; 2 middle; 3 x 5 blocks, 2 ups
    assert kinds.count("inner") == 33 and kinds.count("map") == 2
    assert all(v.cells == 32 for v in found.values() if v.kind == "inner" and v.width == 256)
    # a decoder block is narrower than what it reads: each output is a stream of its own
    assert {f"dec_{s}_block{i}.out" for s in (8, 16, 32) for i in range(5)} <= set(found)
    fields = {field for v in found.values() for field in v.fields}
    assert len(fields) == sum(len(v.fields) for v in found.values())  # each width once


def test_channels_are_kept_by_score_equally_in_every_group():
    variable = structure.Variable(12, "inner", 3, 3, ())
    assert variable.menu == (3, 6, 9, 12)
    scores = np.array([1, 9, 3, 2, 100, 90, 80, 70, 0, 1, 2, 3])
    assert structure.keep_best(variable, scores, 6).tolist() == [1, 2, 4, 5, 10, 11]
    with pytest.raises(ValueError, match="width of 5 does not divide over 3 groups"):
        structure.keep_best(variable, scores, 5)
