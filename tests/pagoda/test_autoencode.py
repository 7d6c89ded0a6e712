"""The stage that trains an autoencoder on one's own pictures."""

import jax
import numpy as np
import optax
import pytest

from cheapscale.data.sources import open_data
from cheapscale.interop.autoencoders import read_autoencoder
from cheapscale.models.autoencoder import (
    Autoencoder,
    KLConfig,
    TinyConfig,
    init_autoencoder,
    network,
)
from cheapscale.pagoda import autoencode
from cheapscale.pagoda.gan import adaptive_weight
from cheapscale.teacher import codec as codecs
from cheapscale.teacher.load import load
from cheapscale.training import loop
from cheapscale.training.state import Optimiser, create_state
from configs import scenes
from launch import train

KL = KLConfig(channels=(4, 8), blocks=1, groups=2, latent_channels=2, attention=False)


def config_of(**changes):
    config = scenes.get_config("smoke,stage=autoencode,resolution=16,features.names=classifier")
    config.autoencode.update(feature_weight=0.0, **changes)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, work directory, summary) of 60 updates of the pixel term."""
    config, workdir = config_of(), str(tmp_path_factory.mktemp("autoencode"))
    config.update(total_steps=60, eval_every=60, save_every=60, log_every=1)
    config.optim.update(lr=5e-3, warmup_steps=0)
    config.ema.decay = 0.8
    return config, workdir, train.run(config, workdir)


def test_it_learns_to_reconstruct_and_stage_encode_reads_its_run(run, tmp_path):
    config, workdir, _ = run
    x = open_data(config.data).read(range(8))[0]
    trained = read_autoencoder(workdir)
    assert (trained.factor, trained.scale, trained.shift) == (2, (1.0,) * 4, (0.0,) * 4)
    fresh = trained.replace(params=init_autoencoder(trained.config, jax.random.key(0)))
    error = {
        name: float(np.mean((autoencode.reconstruct(codec, x) - x) ** 2))
        for name, codec in (("trained", trained), ("fresh", fresh))
    }
    assert error["trained"] < 0.3 * min(error["fresh"], x.var())

    words = f"smoke,stage=encode,encode.autoencoder={workdir},encode.folder={tmp_path / 'latents'}"
    encode = scenes.get_config(words)
    encode.data = config.data
    summary = train.run(encode, tmp_path / "encode")
    assert summary["sides"] == [8] and summary["std"] == pytest.approx(0.5, abs=0.02)
    kept = codecs.read_codec(tmp_path / "latents" / "autoencoder.safetensors")
    np.testing.assert_allclose(
        autoencode.reconstruct(kept, x), autoencode.reconstruct(trained, x), atol=1e-5
    )


def test_one_step_is_the_gradient_of_the_distance_and_the_weighted_adversarial_term(key):
    """Against a step written out: d(x^, x) = 10 mean (x^ - x)^2, D(x) = w mean x / 4."""
    sizes = TinyConfig(channels=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    codec = Autoencoder(init_autoencoder(sizes, key), sizes, (1.0,), (0.0,))
    layer = autoencode.last_kernel(sizes)
    assert layer == "decoder/layers.6/kernel"
    optimisers = {name: Optimiser(optax.sgd(1.0)) for name in ("generator", "discriminator")}
    game = autoencode.Reconstructions(
        generate=lambda params, x, c: autoencode.reconstruct(codec.replace(params=params), x),
        see=lambda frozen, views: {name: view.images for name, view in views.items()},
        discriminate=lambda psi, spectral, x, c: (psi["w"] * x.mean(axis=(1, 2)) / 4, spectral),
        distance=lambda frozen, f, g, x, y: {"pixel": 10 * ((x - y) ** 2).mean(axis=(1, 2, 3))},
        optimisers=optimisers, sigma_max=0.0, ema_decay=0.0, adversarial_weight=0.5,
        adaptive_layer=layer,
    )  # fmt: skip
    psi = np.ones((1, 1), np.float32)
    params = {"generator": codec.params, "discriminator": {"w": psi}}
    state = create_state(params, {"discriminator": {}}, optimisers, ["generator"])
    x = np.asarray(0.5 * jax.random.normal(key, (2, 8, 8, 3)))
    batch = {"image": x, "label": np.zeros(2, np.int32)}
    new, metrics = jax.jit(lambda s: autoencode.step(s, {}, batch, key, game=game))(state)

    def x_hat(theta):
        return autoencode.reconstruct(codec.replace(params=theta), x)

    # logits are inside (-1, 1), where the slope of the hinge is that of D(x^) - D(x)
    psi_new = psi + (x.mean() - np.mean(x_hat(codec.params))) / 4
    np.testing.assert_allclose(new.params["discriminator"]["w"], psi_new, rtol=1e-4)
    of_rec = jax.jit(jax.grad(lambda t: 10 * ((x_hat(t) - x) ** 2).mean()))(codec.params)
    of_adv = jax.jit(jax.grad(lambda t: -(psi_new * x_hat(t).mean(axis=(1, 2)) / 4).mean()))(
        codec.params
    )
    last = [tree["decoder"]["layers.6"]["kernel"] for tree in (of_rec, of_adv)]
    lam = 0.5 * adaptive_weight(*last)
    np.testing.assert_allclose(metrics["lambda"], lam, rtol=1e-3)
    expected = jax.tree.map(lambda p, r, a: p - (r + lam * a), codec.params, of_rec, of_adv)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        new.params["generator"], expected,
    )  # fmt: skip


def test_a_published_autoencoder_trains_further_and_a_kept_encoder_gives_the_same_latents(
    tmp_path,
):
    codec = Autoencoder(init_autoencoder(KL, jax.random.key(3)), KL, (2.0, 2.0), (0.1, 0.1))
    file = tmp_path / "vae.safetensors"
    codecs.write_codec(file, codec)
    stage = train.build(config_of(start=str(file), decoder_only=True))
    assert autoencode.last_kernel(KL) == "decoder/conv_out/kernel"
    start = stage.warm_start({})["generator"]
    jax.tree.map(np.testing.assert_array_equal, start, codec.params)
    moving, fixed = stage.optimisers["generator"].split(start)
    assert set(moving) == {"decoder", "post_quant_conv"} and set(fixed) == {"encoder", "quant_conv"}
    assert codecs.from_fields(stage.meta["networks"]["generator"]) == KL
    x = next(stage.batches(0))["image"]
    mean = network(KL).apply({"params": start}, x, method="moments")[0]
    np.testing.assert_allclose(codec.encode(x), 2 * (mean - 0.1), rtol=1e-5, atol=1e-6)


def test_with_features_and_a_discriminator_the_step_has_the_terms_of_both():
    config = config_of(adversarial_weight=0.5)
    config.autoencode.feature_weight = 1.0
    stage = train.build(config)
    state = loop.abstract_state(stage, loop.sharding.make_mesh(), 0)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), next(stage.batches(0)))
    _, metrics = jax.eval_shape(stage.step, state, stage.frozen_shapes(), batch, jax.random.key(0))
    assert {"loss_rec_feature", "loss_rec_pixel", "loss_disc", "lambda"} <= set(metrics)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"levels": 5}, "16 px with 3 channels do not fit an autoencoder by 32 .*resolution=32"),
        ({"decoder_only": True}, "there is no encoder yet: give --config.autoencode.start=DIR"),
        ({"pixel_weight": 0.0}, "distance are 0: give --config.autoencode.pixel_weight=10"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, said):
    with pytest.raises(ValueError, match=said):
        train.build(config_of(**changes))


def test_runs_of_other_stages_are_no_autoencoder_and_the_autoencoder_is_no_model(run, pipeline):
    with pytest.raises(ValueError, match="stage pretrain: give one of stage autoencode"):
        read_autoencoder(pipeline[0] / "pretrain")
    with pytest.raises(ValueError, match="holds an autoencoder, which draws nothing: .*stage enc"):
        load(run[1])
