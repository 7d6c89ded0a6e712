"""A trained diffusion model as one immutable value (`Teacher`), and its one-step `Generator`.

A Teacher is a pytree whose leaves are its weights. Jitted functions take it as an argument, so that
weights are never constants of a program:

    images = jax.jit(ode_map)(teacher, z, label)
    x0 = teacher.replace(params=params).denoise(x, sigma, label)    # other weights, same program
"""

import dataclasses
import functools
import hashlib
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import guidance
from cheapscale.diffusion.denoiser import Denoiser, Process, process_from
from cheapscale.diffusion.samplers import Segment
from cheapscale.models.text import NO_TOKEN
from cheapscale.models.unet import UNet, unet

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a model comes from. Origins are equal only if they are one object (eq=False), so that
    JAX can hash them, dictionaries included, and caches programs by model.

    meta: the checkpoint's description of itself: stage, networks, diffusion, data, config, ledger.
    step: number of the checkpoint's training step. workdir: the directory that it was read from.
    """

    meta: dict
    step: int = 0
    workdir: str = ""


class _Model(flax.struct.PyTreeNode):
    """What teachers and generators share: a network, its noise process and its origin."""

    params: PyTree
    net: UNet = flax.struct.field(pytree_node=False)
    process: Process = flax.struct.field(pytree_node=False)
    origin: Origin = flax.struct.field(pytree_node=False)
    negative: jax.Array | None = None  # tokens [n] of a caption that guidance leads away from

    @property
    def meta(self) -> dict:
        return self.origin.meta

    @property
    def step(self) -> int:
        return self.origin.step

    @property
    def workdir(self) -> str:
        return self.origin.workdir

    @property
    def fields(self) -> dict:
        """Every field of the U-Net as plain JSON values."""
        return dataclasses.asdict(self.net.config)

    @property
    def resolution(self) -> int:
        """Side in pixels of the noise z; a teacher's images have the same side."""
        return self.net.config.resolution

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the noise that sampling starts from."""
        return (self.resolution, self.resolution, self.net.config.in_channels)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for an unconditional model and for one of captions."""
        return self.net.config.num_classes

    @property
    def null(self) -> int:
        """The label that means "no class", or every token of the empty caption; the tokens of the
        negative caption, if there is one."""
        if self.negative is not None:
            return self.negative
        return NO_TOKEN if self.net.config.text else self.num_classes

    def encode(self, label: Any) -> Any:
        """What the network makes of captions, so that it is computed once for many calls; classes
        as they are."""
        return self.net.encode(self.params, label) if self.net.config.text else label

    def label_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of the labels of `rows` images: one class, or the tokens of a caption, each."""
        text = self.net.config.text
        return (rows, text.length) if text else (rows,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short SHA-256 of the weights."""
        return fingerprint(self.params)

    def in_precision(self, dtype: str) -> Self:
        """The same model with a network that computes in `dtype`; "" changes nothing."""
        if not dtype:
            return self
        fields = self.fields | {"dtype": dtype}
        meta = self.meta | {"networks": dict.fromkeys(self.meta["networks"], fields)}
        origin = Origin(meta, self.step, self.workdir)
        return self.replace(net=unet(**fields), origin=origin)

    def network(self, x: jax.Array, c_noise: jax.Array, *, variables=None, **options) -> jax.Array:
        """F(x, c_noise, label=...), see `UNet.__call__`. variables: further Flax collections."""
        return self.net.apply({"params": self.params} | (variables or {}), x, c_noise, **options)


class Teacher(_Model):
    """A diffusion model D(x; sigma, label), the value that every method starts from."""

    @property
    def members(self) -> tuple["Teacher", ...]:
        """The networks of this model; a set of `Experts` has several."""
        return (self,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short SHA-256 of the weights; of an exported file, that of the weights it rounds, so
        that both have the same latents and experts."""
        return unrounded(self.meta, fingerprint(self.params))

    def denoise(
        self,
        x: jax.Array,
        sigma: Any,
        label: jax.Array | None = None,
        *,
        noise_shift: float = 1.0,
        **options: Any,
    ) -> jax.Array:
        """D(x; sigma, label): the estimate of x0 for x = x0 + sigma eps.

        Args:
            x: [b, h, w, c]; h and w may be larger than the trained size. sigma: scalar or [b].
            label: [b] class indices, or of a model of captions token numbers [b, n] or what
                `UNet.encode` made of them; None or `null` means no class or caption.
            noise_shift: see `EDM.denoise`.
            options: of `UNet.__call__` (augment, inject, train, rngs, variables ...).
        """
        F = functools.partial(self.network, label=label, **options)
        feature = self.net.config.noise_feature
        return self.process.denoise(F, x, sigma, feature=feature, noise_shift=noise_shift)

    def denoiser(
        self, label: jax.Array, *, cfg_scale: float = 1.0, noise_shift: float = 1.0
    ) -> Denoiser:
        """D(x, sigma) with its label bound, guided where cfg_scale is not 1."""
        # Captions are encoded here, once for all levels.
        null = jnp.full_like(label, self.null)
        label, null = self.encode(label), self.encode(null)

        def D(x, sigma, label):
            return self.denoise(x, sigma, label, noise_shift=noise_shift)

        D_w = guidance.guided(D, cfg_scale, null={"label": null})
        return lambda x, sigma: D_w(x, sigma, label=label)

    def parts(self, grid: np.ndarray, shift: float = 1.0) -> list[tuple["Teacher", np.ndarray]]:
        """[(network, the part of the grid whose steps it takes)]: here, all of it."""
        del shift
        return [(self, grid)]

    def segments(
        self,
        label: jax.Array,
        grid: np.ndarray,
        *,
        cfg_scale: float = 1.0,
        noise_shift: float = 1.0,
        expert_shift: float = 1.0,
    ) -> list[Segment]:
        """[(D(x, sigma), levels)] for `samplers.solve`.

        expert_shift: a set of experts looks up the expert of a step at sigma / expert_shift. On a
            larger canvas, block means have a higher SNR than single pixels.
        """
        return [
            (member.denoiser(label, cfg_scale=cfg_scale, noise_shift=noise_shift), part)
            for member, part in self.parts(grid, noise_shift * expert_shift)
        ]

    def read(
        self,
        names: tuple[str, ...],
        x: jax.Array,
        sigma: Any,
        label: jax.Array | None = None,
        *,
        noise_cond: Any = None,
    ) -> dict[str, jax.Array]:
        """{block: its output} inside the network at (x, sigma); "emb" is the embedding, [b, e].

        x is scaled as `denoise` scales it at sigma. noise_cond: the level on which the network is
        conditioned instead of sigma. XLA drops the blocks after the last one named.
        """
        feature = self.net.config.noise_feature
        x_in, c_noise = self.process.inputs(x, sigma, feature)
        if noise_cond is not None:
            _, c_noise = self.process.inputs(x, noise_cond, feature)
        return self.network(x_in, c_noise, label=label, taps=names)[1]


class Generator(_Model):
    """A one-step generator G(z, label[, omega]) (PaGoDA, Kim et al. 2024, arXiv 2405.14822)."""

    @property
    def guided(self) -> bool:
        """Whether the guidance scale omega is an input."""
        return bool(self.net.config.extra_conditions)

    def __call__(
        self, z: jax.Array, label: jax.Array | None = None, omega: jax.Array | None = None
    ) -> jax.Array:
        """Images [b, H, W, c] of noise z [b, h, w, c] at scale sigma_max; H = h * 2^doublings.

        omega: guidance scales [b]; None is 1. Section 4.2 embeds 100 omega as a time is embedded.
        Here it is 100 (omega - 1), the same up to a rotation of each pair of sinusoids, which the
        next layer can undo: then omega = 1 is the network without the embedding, in training too.
        """
        scalars = None if omega is None else guidance.omega_feature(omega[:, None])
        F = functools.partial(self.network, label=label, extra=scalars)
        return self.process.one_step(F, z, feature=self.net.config.noise_feature)


def make_teacher(params: PyTree, meta: dict, step: int = 0, workdir: str = "") -> Teacher:
    """The teacher that a checkpoint's meta describes; params may be None before they exist."""
    return Teacher(params, *_rebuilt(meta, "net"), Origin(meta, step, workdir))


def make_generator(params: PyTree, meta: dict, step: int = 0, workdir: str = "") -> Generator:
    """The generator that a checkpoint's meta describes; params may be None before they exist."""
    return Generator(params, *_rebuilt(meta, "generator"), Origin(meta, step, workdir))


def resolve_model(fields: dict) -> dict:
    """Every field of the U-Net with its value, as plain JSON: what travels with the weights."""
    return dataclasses.asdict(unet(**fields).config)


def fingerprint(params: PyTree) -> str:
    """A short SHA-256 of weights: names, shapes and bytes, in path order."""
    digest = hashlib.sha256()
    # Paths and shapes are hashed too: equal bytes under other names are another network.
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def unrounded(meta: dict, found: str) -> str:
    """The fingerprint `found`, or that of the weights which an exported file rounds to it."""
    exported = meta.get("exported", {})
    return exported["from"] if exported.get("weights") == found else found


def _rebuilt(meta: dict, name: str) -> tuple[UNet, Process]:
    return unet(**meta["networks"][name]), process_from(meta["diffusion"])
