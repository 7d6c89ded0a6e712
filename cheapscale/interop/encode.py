"""Stage encode: a data set of pictures becomes one of latents (Rombach et al. 2022, arXiv
2112.10752).

    for each picture x, and for its mirror image if data.flip, at data.resolution and at each of its
    halves that encode.levels asks for:
        l <- (encoder(x) - shift) scale                     the mean of q(z | x), without its noise

EDM's preconditioning takes data of deviation 0.5, and so does every default of this project. So
shift and scale are measured here for each channel, as EDM2 does (Karras et al. 2024, arXiv
2312.02696): on 1,024 pictures, mean 0 and deviation encode.deviation. With encode.deviation 0 they
stay those of the autoencoder, by which published models on its latents are trained.

The folder has the autoencoder too; the models that are trained on the latents name it, and decode
what they show (teacher/codec.py).
"""

import functools
import json
import pathlib

import numpy as np

from cheapscale.data.augment import flip
from cheapscale.data.files import atomic_write, local_folder, write_json
from cheapscale.data.latents import (
    CODEC,
    FORMAT,
    MANIFEST,
    num_shards,
    read_manifest,
    shard_path,
    write_about,
)
from cheapscale.data.pixels import check_finite, psnr
from cheapscale.data.source import Source
from cheapscale.data.sources import open_data
from cheapscale.interop.autoencoders import read_autoencoder
from cheapscale.models.autoencoder import Autoencoder
from cheapscale.teacher.codec import read_codec, write_codec
from cheapscale.teacher.teacher import fingerprint
from cheapscale.training.mesh import in_batches
from cheapscale.training.stage import Job

MEASURED, SHOWN = 1024, 64  # pictures that give shift and scale, and the error of the summary


def build(config) -> Job:
    """The job of one data set and autoencoder. Raises ValueError where they do not fit."""
    settings = config.encode
    if not settings.autoencoder:
        raise ValueError(
            "encode.autoencoder is empty: give --config.encode.autoencoder=DIR, a folder of "
            "diffusers, or a file"
        )
    if not settings.folder:
        raise ValueError("encode.folder is empty: give --config.encode.folder=DIR, for the latents")
    # The scale is measured, so that a file need not say it.
    scale = settings.scale or (1.0 if settings.deviation else None)
    autoencoder = read_autoencoder(settings.autoencoder, scale=scale)
    folder, f, top = local_folder(settings.folder), autoencoder.factor, config.data.resolution
    unit = f << (settings.levels - 1)
    if top % unit:
        raise ValueError(
            f"data.resolution is {top}, which {settings.levels} levels of an autoencoder by {f} "
            f"do not divide: give --config.data.resolution={max(top // unit, 1) * unit}"
        )
    sides = [(top >> level) // f for level in range(settings.levels)]
    sources = {side: open_data(config.data, resolution=side * f) for side in sides}
    source = sources[sides[0]]
    manifest = make_manifest(config, autoencoder, source, sides)
    check_same(folder, manifest)
    count = num_shards(manifest)

    def place(shard: int) -> pathlib.Path:
        return shard_path(folder, sides[shard // count], shard % count)

    def prepare() -> Autoencoder:
        if not (folder / MANIFEST).exists():
            begin(folder, autoencoder, source, manifest)
        return read_codec(folder / CODEC)

    def run_shard(codec: Autoencoder, shard: int, mesh) -> dict:
        del mesh
        numbers = range(len(source) * manifest["orientations"])
        first = (shard % count) * settings.per_shard
        pictures = sources[sides[shard // count]]
        rows = [oriented(pictures, manifest["orientations"], n)
                for n in numbers[first : first + settings.per_shard]]  # fmt: skip
        latents = encoded(codec, np.stack(rows), config.batch_size)
        with atomic_write(place(shard)) as temporary, temporary.open("wb") as file:
            np.save(file, latents)
        return {"std": float(latents.std())}

    return Job(
        num_shards=count * len(sides),
        items_per_shard=settings.per_shard,
        prepare=prepare,
        done=lambda shard: place(shard).exists(),
        run_shard=run_shard,
        finish=functools.partial(summary, source, folder),
        describe=lambda: {
            "disk": str(folder),
            "disk_bytes": sum(4 * manifest["channels"] * side**2 for side in sides)
            * len(source) * manifest["orientations"],
        },
    )  # fmt: skip


def make_manifest(config, autoencoder: Autoencoder, source: Source, sides: list[int]) -> dict:
    """What determines the latents but their measured scale, and where the pictures lie."""
    data = config.data.to_dict() | {"data_dir": there(config)}
    return {
        "format": FORMAT,
        "pictures": source.describe(),
        "data": json.loads(json.dumps(data)),
        "autoencoder": fingerprint(autoencoder.params),
        "deviation": config.encode.deviation,
        "scale": config.encode.scale,
        "channels": autoencoder.config.latent_channels,
        "sides": sides,
        "num_images": len(source),
        "orientations": 2 if config.data.flip else 1,
        "per_shard": config.encode.per_shard,
    }


def begin(folder: pathlib.Path, autoencoder: Autoencoder, source: Source, manifest: dict) -> None:
    """Write the autoencoder with its final scale, what is known of the pictures, the manifest."""
    codec = autoencoder
    if manifest["deviation"]:
        codec = normalised(autoencoder, source, manifest["deviation"])
    sha256 = write_codec(folder / CODEC, codec)
    write_about(folder, source)
    entry = {"sha256": sha256, "factor": codec.factor}
    write_json(folder / MANIFEST, manifest | {"codec": entry})


def there(config) -> str:
    """The absolute folder of the pictures, "" if they have none."""
    place = config.data.data_dir
    return str(pathlib.Path(place).expanduser().resolve()) if place else ""


def oriented(source: Source, orientations: int, n: int) -> np.ndarray:
    """Picture n // orientations, mirrored if n is odd and there are two."""
    index, mirrored = divmod(n, orientations)
    image = source[index]["image"]
    return flip(image) if mirrored else image


def encoded(codec: Autoencoder, images: np.ndarray, batch_size: int) -> np.ndarray:
    """The latents of pictures, finite."""
    latents = in_batches(Autoencoder.encode, codec, images, batch_size=batch_size)
    return check_finite(latents, "latents", fix="check the autoencoder's weights")


def spread(source: Source, most: int) -> np.ndarray:
    """Up to `most` pictures, spread evenly over the source."""
    ids = np.unique(np.linspace(0, len(source) - 1, most).astype(int))
    return source.read(ids)[0]


def normalised(codec: Autoencoder, source: Source, deviation: float) -> Autoencoder:
    """The autoencoder with a shift and scale by which each channel has mean 0 and `deviation`:

    (l - m) d / s = (z - (shift + m / scale)) (scale d / s)
    """
    latents = encoded(codec, spread(source, MEASURED), 16)
    m, s = (f(latents, axis=(0, 1, 2), dtype=np.float64) for f in (np.mean, np.std))
    if not (s > 1e-6).all():
        raise ValueError(
            f"channel {int(np.argmin(s))} of the latents is constant over the pictures: give "
            "--config.encode.deviation=0, or another autoencoder"
        )
    scale, shift = np.asarray(codec.scale), np.asarray(codec.shift)
    return codec.replace(
        scale=tuple((scale * deviation / s).tolist()), shift=tuple((shift + m / scale).tolist())
    )


def check_same(folder: pathlib.Path, manifest: dict) -> None:
    """Raises ValueError where the folder has latents of other pictures or another autoencoder."""
    if not (folder / MANIFEST).exists():
        return
    found = read_manifest(folder)
    place = ("data",)  # where the pictures lie; their fingerprint says whether they are the same
    for name, value in json.loads(json.dumps(manifest)).items():
        if name not in place and found.get(name) != value:
            raise ValueError(
                f"{folder} has latents of another {name} ({found.get(name)!r:.80}, not "
                f"{value!r:.80}): give another --config.encode.folder, or delete it"
            )


def summary(source: Source, folder: pathlib.Path, codec: Autoencoder) -> dict:
    """JSON values about the finished data set."""
    x = spread(source, SHOWN)
    latents = encoded(codec, x, 16)
    again = np.clip(in_batches(Autoencoder.decode, codec, latents, batch_size=16), -1, 1)
    made = read_manifest(folder)
    return {
        "folder": str(folder),
        "codec": made["codec"]["sha256"],
        "sides": made["sides"],
        "channels": made["channels"],
        "latents": made["num_images"] * made["orientations"],
        "std": float(latents.std()),
        "psnr": float(psnr(again, x).mean()),
    }
