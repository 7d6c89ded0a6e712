"""The projected discriminator: spectral norm, batch norm, mixing, shapes at any size, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.features.mixing import View, aligned_matrix, cross_scale, projections
from cheapscale.features.network import FeatureNetwork
from cheapscale.pagoda.discriminator import (
    BatchNorm,
    head_channels,
    projected_discriminator,
    spectral_norm,
)


def pooling_network(name="pool", strides=(2, 4, 8), channels=6):
    """A cheap feature network: block means, linearly mixed to more channels."""

    def apply(params, x):
        maps = []
        for s in strides:
            b, h, w, c = x.shape
            pooled = x.reshape(b, h // s, s, w // s, s, c).mean(axis=(2, 4))
            maps.append(pooled @ params["mix"])
        return tuple(maps)

    mix = np.random.default_rng(0).normal(size=(3, channels)).astype(np.float32)
    return FeatureNetwork(name, apply, {"mix": jnp.asarray(mix)})


def on_images(d, p):
    """The discriminator d on the projections p of images."""

    def apply(params, spectral, frozen, x, label, key):
        maps = p.apply(frozen, {"x": View("discriminator", x, key)})["x"]
        return d.apply(params, spectral, maps, {"label": label})

    return apply


@pytest.fixture(scope="module")
def built():
    d = projected_discriminator(
        [pooling_network()], resolution=8, num_classes=3, width=4, condition_dim=8
    )
    p = projections([pooling_network()], resolution=8, width=4, policy=())
    params, spectral = jax.jit(d.init)(jax.random.key(0))
    apply = on_images(d, p)
    return apply, params, spectral, p.init_frozen(jax.random.key(1)), jax.jit(apply)


def images(seed, batch=4, side=8):
    return jax.random.normal(jax.random.key(seed), (batch, side, side, 3))


def test_power_iteration_converges_to_the_largest_singular_value():
    kernel = jax.random.normal(jax.random.key(0), (4, 4, 3, 5))
    step = jax.jit(spectral_norm)
    u = jnp.ones(5) / jnp.sqrt(5.0)
    for _ in range(100):
        normalised, u = step(kernel, u)
    values = np.linalg.svd(np.asarray(normalised).reshape(-1, 5), compute_uv=False)
    assert values[0] == pytest.approx(1.0, rel=1e-5)
    # The gradient treats u and v as constants: d sigma / dW = v u', so <dW, W / sigma> vanishes.
    grad = jax.grad(lambda k: jnp.sum(spectral_norm(k, u)[0] * jnp.cos(kernel)))(kernel)
    assert float(jnp.abs(jnp.sum(grad * kernel))) < 1e-3
    assert not jnp.any(jax.grad(lambda v: jnp.sum(spectral_norm(kernel, v)[0]))(u))


def test_batch_norm_uses_its_own_batch_and_ghost_groups_are_separate_batches():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (8, 2, 2, 5))
    whole, ghost = BatchNorm(), BatchNorm(groups=4)
    variables = whole.init(jax.random.key(1), x)
    y = whole.apply(variables, x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1.0, rtol=1e-4)
    parts = [whole.apply(variables, x[i : i + 2]) for i in range(0, 8, 2)]
    np.testing.assert_allclose(
        ghost.apply(variables, x), jnp.concatenate(parts), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="batch of 8 .* bn_groups=3"):
        BatchNorm(groups=3).apply(variables, x)


def test_real_and_fake_passes_share_nothing_but_parameters(built):
    _, params, spectral, frozen, apply = built
    label, key = jnp.asarray([0, 1, 2, 0]), jax.random.key(2)
    alone, _ = apply(params, spectral, frozen, images(1), label, key)
    apply(params, spectral, frozen, images(2) * 50.0, label, key)
    again, _ = apply(params, spectral, frozen, images(1), label, key)
    np.testing.assert_array_equal(alone, again)
    # Statistics are of the batch: another companion changes a sample's logits.
    mixed = images(1).at[1:].set(images(2)[1:])
    other, _ = apply(params, spectral, frozen, mixed, label, key)
    assert float(jnp.abs(other[0] - alone[0]).max()) > 1e-3


def test_spectral_state_advances_and_labels_matter(built):
    _, params, spectral, frozen, apply = built
    label, key = jnp.asarray([0, 1, 2, 0]), jax.random.key(2)
    logits, advanced = apply(params, spectral, frozen, images(1), label, key)
    assert jax.tree.structure(advanced) == jax.tree.structure(spectral)
    for a, b in zip(jax.tree.leaves(spectral), jax.tree.leaves(advanced)):
        assert float(jnp.sum(b * b)) == pytest.approx(1.0, rel=1e-5)
        assert float(jnp.abs(a - b).max()) > 0
    other, _ = apply(params, spectral, frozen, images(1), jnp.asarray([1, 1, 2, 0]), key)
    assert float(jnp.abs(other[0] - logits[0]).max()) > 1e-4
    np.testing.assert_array_equal(other[1:], logits[1:])
    # An out-of-range label is the zero embedding: any two of them agree.
    null = apply(params, spectral, frozen, images(1), jnp.full(4, 3), key)[0]
    np.testing.assert_array_equal(
        null, apply(params, spectral, frozen, images(1), jnp.full(4, 99), key)[0]
    )


def test_gradient_reaches_the_image_and_every_head(built):
    d, params, spectral, frozen, _ = built
    label, key = jnp.asarray([0, 1, 2, 0]), jax.random.key(2)

    @jax.jit
    def grads(params, x):
        loss = lambda p, v: jnp.sum(jnp.sin(d(p, spectral, frozen, v, label, key)[0]))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(params, x)

    for_params, for_image = grads(params, images(1))
    assert float(jnp.abs(for_image).max()) > 0
    for head in for_params["pool"].values():
        assert float(jnp.abs(head["out"]["kernel"]).max()) > 0
        assert float(jnp.abs(head["embedding"]).max()) > 0


def test_aligned_interpolation_is_exact_on_linear_maps_and_keeps_corners():
    for size, target in ((4, 8), (7, 14), (4, 7), (1, 2), (3, 3)):
        matrix = aligned_matrix(size, target)
        np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(
            matrix @ np.linspace(-1, 1, size),
            np.linspace(-1, 1, target) if size > 1 else -1.0,
            atol=1e-6,
        )


def test_mixing_meets_the_next_map_where_sides_do_not_double():
    rng = np.random.default_rng(0)
    maps = [jnp.asarray(rng.normal(size=(1, s, s, 4)), jnp.float32) for s in (7, 4, 2)]
    csm = [{"kernel": jnp.eye(4), "bias": jnp.zeros(4)}] * 3
    assert [o.shape[1] for o in cross_scale(csm, maps)] == [14, 7, 4]
    constant = cross_scale(csm, [jnp.ones((1, s, s, 4)) for s in (7, 4, 2)])
    for out, level in zip(constant, (3.0, 2.0, 1.0)):
        np.testing.assert_allclose(out, level, rtol=1e-6)


def test_channel_table_and_logit_counts_of_the_paper():
    assert head_channels(128, 64) == (64, 128, 256, 512)
    assert [len(head_channels(side, 64)) for side in (112, 56, 28, 14, 8, 2)] == [4, 3, 2, 1, 0, 0]
    network = pooling_network(strides=(4, 8, 16, 32))
    d = projected_discriminator([network], resolution=224, num_classes=5, width=2)
    p = projections([network], resolution=224, width=2)
    params, spectral = jax.eval_shape(d.init, jax.random.key(0))
    frozen = jax.eval_shape(p.init_frozen, jax.random.key(0))
    x, label = jnp.zeros((2, 224, 224, 3)), jnp.zeros(2, jnp.int32)
    logits, _ = jax.eval_shape(
        on_images(d, p), params, spectral, frozen, x, label, jax.random.key(0)
    )
    assert logits.shape == (2, 64)


@pytest.mark.parametrize("strides, side", [((2,), 2), ((2, 4), 4), ((1, 2, 4, 8), 8)])
def test_small_maps_and_unconditional_heads(strides, side):
    d = projected_discriminator([pooling_network(strides=strides)], resolution=side, width=2)
    p = projections([pooling_network(strides=strides)], resolution=side, width=2)
    params, spectral = jax.eval_shape(d.init, jax.random.key(0))
    frozen = jax.eval_shape(p.init_frozen, jax.random.key(0))
    x = jnp.zeros((2, side, side, 3))
    logits, _ = jax.eval_shape(
        on_images(d, p), params, spectral, frozen, x, None, jax.random.key(0)
    )
    strides = [s for s in strides if s > 1]  # a map at full size is left out
    sides = [2 * side // strides[0]] + [side // s for s in strides[:-1]]
    halved = [s // 2 ** len(head_channels(s, 2)) for s in sides]
    assert logits.shape == (2, sum((s - min(4, s) + 1) ** 2 for s in halved))


def test_given_embedding_is_the_initial_table():
    table = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    d = projected_discriminator(
        [pooling_network(strides=(2,))], resolution=8, num_classes=3, width=2, embedding=table
    )
    params, _ = jax.jit(d.init)(jax.random.key(0))
    np.testing.assert_array_equal(params["pool"]["head0"]["embedding"], table)


def test_wrong_inputs_are_named(built):
    d, params, spectral, frozen, _ = built
    with pytest.raises(ValueError, match="resolution 8"):
        d(params, spectral, frozen, images(0, side=16), jnp.zeros(4, int), jax.random.key(0))
    for networks in ([pooling_network(), pooling_network()], []):
        with pytest.raises(ValueError, match="distinct names"):
            projections(networks, resolution=8, width=2)
    with pytest.raises(ValueError, match="'pool' is as large as its 8-px input"):
        projected_discriminator([pooling_network(strides=(1,))], resolution=8)
    with pytest.raises(ValueError, match=r"\(4, 2\).*num_classes=3"):
        projected_discriminator(
            [pooling_network()], resolution=8, num_classes=3, embedding=np.zeros((4, 2))
        )


def test_one_and_eight_devices_agree(built, eight_devices):
    """Batch norm sees the global batch, however it is laid out."""
    _, params, spectral, frozen, apply = built
    label, key = jnp.arange(8) % 3, jax.random.key(2)
    x = images(1, batch=8)
    mesh = jax.sharding.Mesh(np.asarray(eight_devices), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    one, state = apply(params, spectral, frozen, x, label, key)
    eight, sharded_state = apply(
        *jax.device_put((params, spectral, frozen), whole), *jax.device_put((x, label), rows), key
    )
    np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(sharded_state)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
