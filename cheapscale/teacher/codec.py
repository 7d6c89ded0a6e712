"""The codec of a model on latents: the autoencoder that its data set names.

Such a model's meta has data.codec, {"path", "sha256"} of a file that stage `encode` wrote. Inside,
everything is latents; `leave` makes pictures of them where they are shown or measured, and `enter`
makes latents of pictures. Of a model on pixels, both leave pictures as they are.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.data.files import atomic_write
from cheapscale.models.autoencoder import (
    Autoencoder,
    Config,
    KLConfig,
    TinyConfig,
    decode_tiled,
)
from cheapscale.training.checkpoint import load_network
from cheapscale.training.exported import sha256_of
from cheapscale.training.mesh import in_batches

VARIABLE = "CHEAPSCALE_WEIGHTS_AUTOENCODER"
CONFIGS = {"kl": KLConfig, "tiny": TinyConfig}
BATCH = 16  # pictures that are encoded or decoded at once
TILE = 64  # latents a side; larger canvases are decoded in tiles


def described(config: Config) -> dict[str, Any]:
    """JSON values of the sizes of an autoencoder: {"kind", "config"}."""
    (kind,) = [name for name, known in CONFIGS.items() if isinstance(config, known)]
    return {"kind": kind, "config": dataclasses.asdict(config)}


def from_fields(fields: dict[str, Any]) -> Config:
    """The sizes that `described` wrote."""
    lists = fields["config"].items()
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in lists}
    return CONFIGS[fields["kind"]](**config)


def write_codec(path: str | os.PathLike, codec: Autoencoder) -> str:
    """Write an autoencoder with its scale to one .safetensors file; returns its SHA-256."""
    fields = described(codec.config) | {"scale": codec.scale, "shift": codec.shift}
    flat = flatten_dict(jax.device_get(codec.params), sep="/")
    arrays = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in flat.items()}
    with atomic_write(path) as temporary:
        header = {"autoencoder": json.dumps(fields, sort_keys=True)}
        temporary.write_bytes(safetensors.numpy.save(arrays, header))
    return sha256_of(path)


def is_codec(path: str | os.PathLike) -> bool:
    """Whether a file is one of `write_codec`."""
    if pathlib.Path(path).suffix != ".safetensors" or not os.path.isfile(path):
        return False
    try:
        with safetensors.safe_open(path, "np") as file:
            return "autoencoder" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def read_codec(path: str | os.PathLike) -> Autoencoder:
    """The autoencoder in a file of `write_codec`; ValueError for another file."""
    if not is_codec(path):
        raise ValueError(f"{path} is no file of stage encode: give its autoencoder.safetensors")
    with safetensors.safe_open(path, "np") as file:
        fields = json.loads(file.metadata()["autoencoder"])
    params = unflatten_dict(safetensors.numpy.load_file(path), sep="/")
    scale, shift = tuple(fields["scale"]), tuple(fields["shift"])
    return Autoencoder(jax.tree.map(jnp.asarray, params), from_fields(fields), scale, shift)


def trained(workdir: str | os.PathLike, scale: float) -> Autoencoder:
    """The averaged weights of a run of stage autoencode, with one scale for all channels.

    Raises ValueError for a run of another stage, FileNotFoundError for one without a checkpoint.
    """
    loaded = load_network(workdir)
    if loaded.meta["stage"] != "autoencode":
        raise ValueError(
            f"{workdir} is the work directory of stage {loaded.meta['stage']}: give one of stage "
            "autoencode, or the files of an autoencoder"
        )
    config = from_fields(loaded.meta["networks"]["generator"])
    channels, params = config.latent_channels, jax.tree.map(jnp.asarray, loaded.params)
    return Autoencoder(params, config, (scale,) * channels, (0.0,) * channels)


def codec_of(meta: dict[str, Any]) -> Autoencoder | None:
    """The autoencoder of the model or data that a meta describes; None for pixels.

    Raises ValueError where its file is not at its place any more, nor where $VARIABLE says.
    """
    named = meta.get("data", {}).get("codec")
    return _known(os.environ.get(VARIABLE) or named["path"], named["sha256"]) if named else None


@functools.lru_cache(4)
def _known(path: str, sha256: str) -> Autoencoder:
    if not os.path.isfile(path) or sha256_of(path) != sha256:
        raise ValueError(
            f"the model's autoencoder, with the SHA-256 {sha256[:16]}..., is not at "
            f"{path or 'any known place'}: set {VARIABLE}=FILE, the autoencoder.safetensors of its "
            "data set"
        )
    return read_codec(path)


def factor_of(meta: dict[str, Any]) -> int:
    """Pixels along one side of what the model calls a pixel; 1 without a codec."""
    return meta.get("data", {}).get("codec", {}).get("factor", 1)


def leave(meta: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Pictures float32 [n, f h, f w, 3] in [-1, 1] of a model's images [n, h, w, c]."""
    codec = codec_of(meta)
    if codec and max(x.shape[1:3]) > TILE:
        x = np.concatenate([decode_tiled(codec, row[None], tile=TILE) for row in jnp.asarray(x)])
    elif codec:
        x = in_batches(Autoencoder.decode, codec, x, batch_size=BATCH)
    return np.clip(x, -1.0, 1.0)


def enter(meta: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """What the model sees of pictures [n, h, w, 3] in [-1, 1]: float32 [n, h / f, w / f, c]."""
    codec = codec_of(meta)
    if not codec:
        return images
    codec.check(images.shape)
    return in_batches(Autoencoder.encode, codec, images, batch_size=BATCH)
