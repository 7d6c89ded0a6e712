"""Stage autoencode: an autoencoder for one's own pictures, as latent diffusion needs it (Rombach et
al. 2022, arXiv 2112.10752; Esser et al. 2021, arXiv 2012.09841).

    for pictures x, flipped:
        x^ = decoder(encoder(x))
        minimise  d(x^, x) + lambda L_adv(x^)            by the step of PaGoDA's generator (gan.py)
        D is trained on x against x^

It is the game of gan.py with three changes: the latent z of a pair is the picture itself, G is
decoder(encoder(.)), and the fakes of L_adv are reconstructions instead of images of fresh noise. d
has the terms of L_rec, by default features and pixels; the papers have LPIPS and |x^ - x|.

A fresh network is an AutoencoderTiny. Its decoder reads 3 tanh(z / 3), which bounds the latents as
the papers' KL term does, and it has no noise. With autoencode.start the run continues a published
one; of an AutoencoderKL it trains the mean, without noise.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cheapscale.data.augment import random_flip
from cheapscale.data.loader import stream
from cheapscale.data.pixels import psnr
from cheapscale.data.sources import open_data
from cheapscale.models.autoencoder import Autoencoder, Config, TinyConfig, init_autoencoder
from cheapscale.pagoda.gan import Game, gan_step
from cheapscale.pagoda.guided import Conditions
from cheapscale.pagoda.loss_networks import make_loss_networks
from cheapscale.teacher.codec import described
from cheapscale.training.compiler import for_depthwise
from cheapscale.training.log import image_grid
from cheapscale.training.mesh import in_batches
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import Stage
from cheapscale.training.state import Optimiser, TrainState, averaged, stream_key

PyTree = Any

TERMS = ("feature", "lpips", "pixel")
SHOWN = 16  # pictures of the preview


class Reconstructions(Game):
    """The game whose fakes are G's reconstructions."""

    def fresh(self, key: jax.Array, rows: PyTree, z: jax.Array) -> tuple[jax.Array, Conditions]:
        """The pictures z themselves, with the conditions of `rows`."""
        del key
        return z, self.conditions(rows)


def build(config, read: Callable[[str], Autoencoder]) -> Stage:
    """The stage from its config. Raises ValueError where pictures and autoencoder do not fit.

    read: the autoencoder in the folder or file that autoencode.start names.
    """
    settings, source = config.autoencode, open_data(config.data)
    start = read(settings.start) if settings.start else None
    sizes = start.config if start else fresh_config(settings)
    f, side = sizes.factor, config.data.resolution
    if side % f or source.channels != sizes.image_channels:
        raise ValueError(
            f"pictures of {side} px with {source.channels} channels do not fit an autoencoder by "
            f"{f} of {sizes.image_channels} channels: give pictures of RGB and "
            f"--config.data.resolution={max(side // f, 1) * f}"
        )
    if settings.decoder_only and not start:
        raise ValueError(
            "autoencode.decoder_only is True, but there is no encoder yet: give "
            "--config.autoencode.start=DIR, or leave it out"
        )
    weights = {term: settings[f"{term}_weight"] for term in TERMS}
    if not any(weights.values()):
        raise ValueError(
            "all weights of autoencode's distance are 0: give --config.autoencode.pixel_weight=10"
        )
    networks = make_loss_networks(
        source,
        settings=config.features.to_dict(),
        discriminator=config.discriminator.to_dict(),
        weights=weights,
        conditional=False,
    )
    codec = Autoencoder(None, sizes, (1.0,), (0.0,))
    trainable = (lambda path: not encodes(path)) if settings.decoder_only else None
    optimisers = {
        "generator": Optimiser(make_optimiser(**config.optim), trainable),
        "discriminator": Optimiser(make_optimiser(**config.optim_discriminator)),
    }
    game = Reconstructions(
        generate=lambda params, x, c: reconstruct(codec.replace(params=params), x),
        see=networks.see,
        discriminate=networks.discriminate,
        distance=networks.distance,
        optimisers=optimisers,
        sigma_max=0.0,
        ema_decay=config.ema.decay,
        adversarial_weight=settings.adversarial_weight,
        gan_loss=settings.gan_loss,
        adaptive_layer=last_kernel(sizes) if settings.adaptive else None,
        squared_norms=settings.squared_norms,
    )

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        k_generator, k_discriminator = jax.random.split(key)
        psi, spectral = networks.init(k_discriminator)
        theta = init_autoencoder(sizes, k_generator)
        return {"generator": theta, "discriminator": psi}, {"discriminator": spectral}

    x = source.read(np.unique(np.linspace(0, len(source) - 1, SHOWN).astype(int)))[0]
    place = jax.process_index(), jax.process_count()
    flipped = random_flip if config.data.flip else None
    return Stage(
        init_params=init,
        optimisers=optimisers,
        step=functools.partial(step, game=game),
        batches=stream(config, source, flipped, process=place),
        load_frozen=lambda: networks.load(stream_key(config.seed, "projections", 0)),
        frozen_shapes=networks.shapes,
        warm_start=lambda params: params | ({"generator": start.params} if start else {}),
        evals={"pictures": (config.eval_every, functools.partial(preview, codec=codec, x=x))},
        meta={
            "stage": "autoencode",
            "networks": {"generator": described(sizes)},
            "data": source.describe(),
        },
        batch_size=config.batch_size,
        fits=networks.fits,
        compiler_options=for_depthwise(),
    )


def fresh_config(settings: Any) -> TinyConfig:
    """The sizes of a fresh network: TAESD's layout, with one block at the pictures' own size."""
    blocks = (settings.blocks,) * settings.levels
    return TinyConfig(
        channels=settings.channels,
        encoder_blocks=(1, *blocks),
        decoder_blocks=(*blocks, 1),
        latent_channels=settings.latent_channels,
    )


def encodes(path: str) -> bool:
    """Whether a weight is one that latents depend on."""
    return path.startswith(("encoder/", "quant_conv/"))


def last_kernel(sizes: Config) -> str:
    """The path of the decoder's last kernel, at which lambda compares gradients."""
    shapes = jax.eval_shape(functools.partial(init_autoencoder, sizes), jax.random.key(0))
    layers = shapes["decoder"]
    if "conv_out" in layers:
        return "decoder/conv_out/kernel"
    return f"decoder/{max(layers, key=lambda name: int(name.removeprefix('layers.')))}/kernel"


def reconstruct(codec: Autoencoder, x: jax.Array) -> jax.Array:
    """x^ = decoder(encoder(x)), not clipped."""
    return codec.decode(codec.encode(x))


def step(
    state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array, *, game: Game
) -> tuple[TrainState, dict]:
    """`gan_step` on a batch {image, label} of pictures, each of which is its own latent."""
    rows = {"image": batch["image"], "z": batch["image"], "label": batch["label"]}
    return gan_step(state, frozen, {"pair": rows, "real": rows}, key, game=game)


def preview(state: TrainState, frozen: PyTree, *, codec: Autoencoder, x: np.ndarray) -> dict:
    """{"grid": pictures above their reconstructions, "psnr": in decibels}, of the EMA weights."""
    del frozen
    smooth = codec.replace(params=averaged(state, "generator"))
    again = np.clip(in_batches(reconstruct, smooth, x, batch_size=len(x)), -1, 1)
    rows = [half for n in range(0, len(x), 8) for half in (x[n : n + 8], again[n : n + 8])]
    return {
        "grid": image_grid(np.concatenate(rows), columns=min(8, len(x))),
        "psnr": float(psnr(again, x).mean()),
    }
