"""The loss networks as the stages build them: random projections, class table, pooling."""

import functools

import jax
import numpy as np
import pytest

from cheapscale.data.sources import SceneSource
from cheapscale.features.mixing import View
from cheapscale.features.network import FeatureNetwork
from cheapscale.models.autoencoder import Autoencoder, TinyConfig, init_autoencoder
from cheapscale.pagoda import loss_networks
from configs import fields

TINY = TinyConfig(channels=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
WEIGHTS = {"feature": 1.0, "lpips": 0.0, "pixel": 10.0}


def network(settings, source):
    """In place of the classifier: block means at three strides, linearly mixed."""

    def apply(params, x):
        b, h, w, c = x.shape
        blocks = (x.reshape(b, h // s, s, w // s, s, c).mean((2, 4)) for s in (2, 4, 8))
        return tuple(block @ params["mix"] for block in blocks)

    mix = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    return [FeatureNetwork("blocks", apply, {"mix": mix}, sha256="b")], {}


@pytest.fixture
def networks(monkeypatch):
    monkeypatch.setattr(loss_networks, "load_features", network)
    source = SceneSource("train", 8, size=4)

    def make(**discriminator):
        settings = fields.defaults("distill").features.to_dict()
        given = {"width": 4} | discriminator
        return loss_networks.make_loss_networks(
            source, settings=settings, discriminator=given, weights=WEIGHTS
        )

    return make


def test_the_discriminator_and_the_distance_draw_separate_projections(networks):
    """Both use the same backbone with different random mixing, as PaGoDA's published code does."""
    frozen, used = networks().load(jax.random.key(0))
    assert used == {"blocks": "b"}
    one, other = (frozen["projections"]["blocks"][part] for part in ("discriminator", "distance"))
    kernels = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    assert not any(np.allclose(a, b) for a, b in kernels)


def test_the_frozen_networks_read_for_a_distance_only_if_a_term_needs_their_maps(monkeypatch):
    """With a pixel term alone they see the discriminator's images, and nothing else changes."""
    monkeypatch.setattr(loss_networks, "load_features", network)
    source, key = SceneSource("train", 8, size=4), jax.random.key(1)
    x, _ = source.read(range(2))
    views = {"fake": View("discriminator", x, key), "target": View("distance", x, key)}
    seen = {}
    for feature in (1.0, 0.0):
        made = loss_networks.make_loss_networks(
            source,
            settings=fields.defaults("distill").features.to_dict(),
            discriminator={"width": 4},
            weights=WEIGHTS | {"feature": feature},
        )
        frozen, _ = made.load(jax.random.key(0))
        seen[feature] = made.see(frozen, views)
        terms = made.distance(
            frozen, seen[feature].get("target"), seen[feature].get("target"), x, x
        )
        assert set(terms) == ({"feature", "pixel"} if feature else {"pixel"})
        assert made.see(frozen, {}) == {}
    assert set(seen[1.0]) == {"fake", "target"} and set(seen[0.0]) == {"fake"}
    for one, other in zip(jax.tree.leaves(seen[1.0]["fake"]), jax.tree.leaves(seen[0.0]["fake"])):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_of_latents_the_networks_see_what_they_decode_to_and_the_pixel_term_sees_latents(
    monkeypatch,
):
    monkeypatch.setattr(loss_networks, "load_features", network)
    codec = Autoencoder(init_autoencoder(TINY, jax.random.key(0)), TINY, (2.0,) * 4, (0.5,) * 4)
    source, key = SceneSource("train", 8, size=4), jax.random.key(1)
    made = {}
    for kind, given in (("latents", codec), ("pictures", None)):
        made[kind] = loss_networks.make_loss_networks(
            source,
            settings=fields.defaults("distill").features.to_dict(),
            discriminator={"width": 4},
            weights=WEIGHTS,
            codec=given,
        )
    frozen = {kind: one.load(jax.random.key(0))[0] for kind, one in made.items()}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2, 4, 4, 4)).astype(np.float32)
    given = {"latents": (x, y), "pictures": jax.jit(jax.vmap(codec.decode))(np.stack([x, y]))}

    def see(kind, frozen, images):
        return made[kind].see(frozen, {n: View("distance", v, key) for n, v in zip("xy", images)})

    seen = {n: jax.jit(functools.partial(see, n))(frozen[n], v) for n, v in given.items()}
    for one, other in zip(*map(jax.tree.leaves, seen.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

    def distance(z, frozen):
        f, g = see("latents", frozen, (z, y)).values()
        terms = made["latents"].distance(frozen, f, g, z, y)
        return terms["feature"].sum(), terms["pixel"]

    slope, pixel = jax.jit(jax.grad(distance, has_aux=True))(x, frozen["latents"])
    np.testing.assert_allclose(pixel, 10 * ((x - y) ** 2).mean((1, 2, 3)), rtol=1e-5)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0  # through the decoder


def test_token_heads_read_a_transformers_tokens_and_the_distance_its_maps(monkeypatch):
    """Every token has a logit; a network without tokens keeps its heads on mixed maps."""

    def with_tokens(settings, source):
        (plain,), _ = network(settings, source)

        def tokens(params, x):
            return tuple(m.reshape(len(m), -1, m.shape[-1]) for m in plain.apply(params, x)[:2])

        named = plain._replace(name="transformer", tokens=tokens)
        return [plain, named][2 - len(settings["names"]) :], {}

    monkeypatch.setattr(loss_networks, "load_features", with_tokens)
    source, key = SceneSource("train", 8, size=4), jax.random.key(1)

    def make(*names, tokens=True):
        return loss_networks.make_loss_networks(
            source,
            settings=fields.defaults("distill").features.to_dict() | {"names": names},
            discriminator={"width": 4, "tokens": tokens},
            weights=WEIGHTS,
        )

    made = make("blocks", "transformer")
    frozen, _ = made.load(jax.random.key(0))
    x, labels = source.read(range(2))
    views = {"fake": View("discriminator", x, key), "target": View("distance", x, key)}
    seen = made.see(frozen, views)
    assert [t.shape for t in seen["fake"]["transformer"]] == [(2, 16, 6), (2, 4, 6)]
    params, spectral = jax.jit(made.init)(key)
    logits, _ = made.discriminate(params, spectral, seen["fake"], {"label": labels})
    on_maps = make("transformer", tokens=False)
    plain = on_maps.see(on_maps.load(jax.random.key(0))[0], views)
    by_position = jax.eval_shape(
        on_maps.discriminate, *on_maps.init(key), plain["fake"], {"label": labels}
    )[0]
    assert logits.shape == (2, by_position.shape[1] + 16 + 4)
    assert all(m.ndim == 4 for m in seen["target"]["transformer"])
    monkeypatch.setattr(loss_networks, "load_features", network)
    with pytest.raises(ValueError, match="discriminator.tokens is True.*dino_vits16"):
        make("blocks")


def test_the_class_table_starts_as_the_file_and_stays_trainable(networks, tmp_path):
    """A given table is the initial class embedding of the discriminator."""
    table = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    np.savez(tmp_path / "table.npz", embed=table)
    for name in ("table.npy", "table.npz"):
        params, _ = jax.jit(networks(class_table=str(tmp_path / name)).init)(jax.random.key(0))
        for head in params["blocks"].values():
            np.testing.assert_array_equal(head["embedding"], table)
    np.save(tmp_path / "short.npy", table[:3])
    with pytest.raises(ValueError, match="give one row per class"):
        networks(class_table=str(tmp_path / "short.npy"))
    with pytest.raises(ValueError, match="there is no file"):
        networks(class_table=str(tmp_path / "none.npy"))
    np.savez(tmp_path / "two.npz", a=table, b=table)
    with pytest.raises(ValueError, match="an .npz of one array"):
        networks(class_table=str(tmp_path / "two.npz"))
    np.save(tmp_path / "nan.npy", table * np.nan)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "table.npy").read_bytes()[:-9])
    for name, what in (("nan", "40 of the 40 numbers .* not finite"), ("cut", "not a whole file")):
        with pytest.raises(ValueError, match=what):
            networks(class_table=str(tmp_path / f"{name}.npy"))


def test_the_weights_of_a_loss_may_lie_in_several_files(tmp_path):
    """VGG16 and LPIPS' heads, as config.features.paths names them: joined by "+"."""
    layers = zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), [3] + 12 * [4], strict=True)
    weights = {}
    for number, inputs in layers:
        weights[f"features.{number}.weight"] = np.ones((4, inputs, 3, 3), np.float32)
        weights[f"features.{number}.bias"] = np.ones(4, np.float32)
    for name in ("vgg.npz", "vgg+16.npz"):
        np.savez(tmp_path / name, **weights)
    heads = {f"lin{k}.model.1.weight": np.ones((1, 4, 1, 1), np.float32) for k in range(5)}
    np.savez(tmp_path / "heads.npz", **heads)
    settings = fields.defaults("distill").features.to_dict() | {"names": ("vgg16_lpips",)}

    def load(path):
        (found,), unfitted = loss_networks.load_features(
            settings | {"paths": {"vgg16_lpips": str(path)}}, None
        )
        assert not unfitted
        return found.params

    assert len(load(f"{tmp_path / 'vgg.npz'}+{tmp_path / 'heads.npz'}")["lin"]) == 5
    assert "lin" not in load(tmp_path / "vgg+16.npz")  # a "+" in a file's own name
