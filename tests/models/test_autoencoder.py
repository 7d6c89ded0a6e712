"""Autoencoders: their sizes, the scale of their latents, and decoding in tiles."""

import jax
import numpy as np
import pytest

from cheapscale.models.autoencoder import (
    Autoencoder,
    KLConfig,
    TinyConfig,
    decode_tiled,
    init_autoencoder,
)
from cheapscale.training.cost import param_count

TINY = TinyConfig(channels=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
REACH = 4 + 3  # latents around a pixel that TINY's decoder sees: 1 + 3 of them, and 5 pixels
decode = jax.jit(Autoencoder.decode)


@pytest.fixture(scope="module")
def tiny():
    params = init_autoencoder(TINY, jax.random.key(0))
    return Autoencoder(params, TINY, (1.0,) * 4, (0.0,) * 4)


@pytest.mark.parametrize(
    "config, count", [(KLConfig(), 83_653_863), (TinyConfig(), 2_445_063)], ids=["kl", "tiny"]
)
def test_the_published_sizes(config, count):
    shapes = jax.eval_shape(lambda key: init_autoencoder(config, key), jax.random.key(0))
    assert param_count(shapes) == count  # AutoencoderKL of Stable Diffusion, TAESD


def test_scale_and_shift_of_each_channel(tiny):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    scale, shift = (2.0, 0.5, 1.0, 4.0), (0.0, 1.0, -1.0, 0.5)
    moved = tiny.replace(scale=scale, shift=shift)
    z, latents = jax.jit(Autoencoder.encode)(tiny, x), jax.jit(Autoencoder.encode)(moved, x)
    expected = (z - np.float32(shift)[None, None, None]) * np.float32(scale)[None, None, None]
    np.testing.assert_allclose(latents, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decode(moved, latents), decode(tiny, z), atol=1e-5)


def test_sides_that_do_not_divide_are_refused(tiny):
    with pytest.raises(ValueError, match="of 8 x 7 px does not divide by the autoencoder's 2: res"):
        tiny.encode(np.zeros((1, 8, 7, 3), np.float32))
    with pytest.raises(ValueError, match="overlap is 8: give 0 to 7"):
        decode_tiled(tiny, np.zeros((1, 8, 8, 4), np.float32), tile=8, overlap=8)


def test_tiles_are_the_whole_picture_where_they_see_enough(tiny):
    z = np.random.default_rng(0).normal(size=(2, 24, 41, 4)).astype(np.float32)
    whole = np.asarray(decode(tiny, z))
    # A tile of the whole height: only borders of tiles along the width can differ.
    tiled = np.asarray(decode_tiled(tiny, z, tile=24, overlap=4))
    assert tiled.shape == whole.shape == (2, 48, 82, 3)
    error = np.abs(tiled - whole).max(axis=(0, 1, 3)).reshape(41, 2).max(axis=1)
    borders = [17, 24]  # tiles begin at 0 and 17 (moved back from 20)
    near = np.min([np.abs(np.arange(41) - border) for border in borders], axis=0) <= REACH
    assert error[~near].max() < 1e-5 < error[near].max()


def test_a_canvas_of_one_tile_is_decoded_whole(tiny):
    z = np.random.default_rng(0).normal(size=(1, 6, 9, 4)).astype(np.float32)
    np.testing.assert_allclose(decode_tiled(tiny, z, tile=9, overlap=4), decode(tiny, z), atol=1e-6)
