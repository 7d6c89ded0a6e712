"""Time-aware feature upsamplers (self-cascade, Guo et al. 2024, arXiv 2402.10491, section 3.3).

A frozen U-Net reads a clean pivot. Four of its feature maps f_n are enlarged to the size of the
same maps on the larger canvas, to which u_n = phi_n(f_n, t) is added. There are four designs:

    full   u = g * B2(B1(f, t), t), B1 enlarging: two residual blocks of the full width, as in the
           released code, of 18 c^2 + (E + 7) c parameters each
    neck   as full, at a small width b between two 1x1 convolutions c -> b -> c
    gain   u_c = sum_k W[k, c] basis_k(t) * up(f)_c: five numbers for each channel
    2k     as gain, with one gain for eight neighbouring channels: 2,200 numbers at Stable
           Diffusion's widths, the 0.002 M that the paper states

    residual block:  h = conv1(silu(norm1(conv0(up(silu(norm0(x)))) + dense(emb(t))))),  up(x) + h

`lift` computes the part that does not depend on t, once for all steps; a call of the module
computes the rest at every step. emb(t) is the frozen network's embedding of the step; basis_k(t) =
cos(k tau) with tau = 2 arctan(sigma), the cosine schedule's time in [0, pi).

init="zero": u = 0 at the start, so that tuning begins at the tuning-free cascade. Exactly one
factor of the output is zero, because two zero factors would leave both without a gradient.
init="identity": u = up(f), as in the released code, where the last convolutions start at zero.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cheapscale.cascade.pivot import resize
from cheapscale.cascade.plan import Size
from cheapscale.models import layers
from cheapscale.models.plan import FAMILIES, UNetConfig, plan

PyTree = Any
DESIGNS = ("full", "neck", "gain", "2k")
BASES = 5  # number of basis functions of time in a gain
SHARED = 8  # channels that share a gain in the design "2k"
PLACES = 4


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    """Plain values that determine the modules and their parameters.

    design, init: see the module's docstring. channels: (place, c) pairs in the network's order.
    emb: width E of the network's embedding. width: b of a neck. groups, group_size: of the norms,
    as in UNetConfig.
    """

    design: str
    channels: tuple[tuple[str, int], ...]
    emb: int
    init: str = "zero"
    width: int = 8
    groups: int = 32
    group_size: int = 4

    def __post_init__(self):
        if self.design == "neck" and self.init == "identity":
            raise ValueError(
                "cascade.init 'identity' cannot pass through a neck narrower than its features: "
                "give --config.cascade.init=zero, or --arg=tune=full"
            )
        if self.design == "neck" and self.width % self.norm_groups(self.width):
            raise ValueError(
                f"cascade.width {self.width} does not divide into {self.norm_groups(self.width)} "
                f"norm groups: give --config.cascade.width={8 * self.group_size}"
            )
        for name, channels in self.channels:
            if self.design == "2k" and channels % SHARED:
                raise ValueError(
                    f"tune=2k shares a gain among {SHARED} channels, but {name} has {channels}: "
                    "give --arg=tune=gain"
                )

    def norm_groups(self, width: int) -> int:
        """Number of groups of a norm of `width` channels, by the U-Net's own rule."""
        return max(1, min(self.groups, width // self.group_size))

    @property
    def places(self) -> tuple[str, ...]:
        """The blocks from which features are read, and to which u_n is added."""
        return tuple(name for name, _ in self.channels)


def places(config: UNetConfig) -> tuple[str, ...]:
    """The blocks whose features are lifted: the last of each of the first three encoder levels, and
    the bottleneck's output (the paper's figure 2). A network of fewer levels gives the remaining
    places to its other encoder blocks, the latest first."""
    blocks = plan(config)
    pushed = [block for block in blocks if block.push]  # the decoder takes their output
    plain = [block for block in pushed if block.kind == "res" and not block.resample]
    last_of = {block.resolution: block.name for block in plain}  # the later replaces the earlier
    chosen = list(last_of.values())[: PLACES - 1]
    others = dict.fromkeys(block.name for block in (*reversed(plain), *reversed(pushed)))
    chosen += [name for name in others if name not in chosen][: PLACES - 1 - len(chosen)]
    bottleneck = next(block.name for block in reversed(blocks) if "_in1" in block.name)
    return (*(block.name for block in blocks if block.name in chosen), bottleneck)


def upsampler_config(model: UNetConfig, design: str, **fields: Any) -> UpsamplerConfig:
    """The modules that fit a network; ValueError where it has no four places for them."""
    chosen, width = places(model), {block.name: block.out_channels for block in plan(model)}
    if len(chosen) != PLACES:
        raise ValueError(
            f"the network offers {len(chosen)} places for upsamplers instead of {PLACES}: it needs "
            "at least three encoder blocks whose output the decoder takes"
        )
    fields |= {"groups": model.groups, "group_size": model.group_size}
    channels = tuple((name, width[name]) for name in chosen)
    return UpsamplerConfig(design, channels, emb=width["map_layer1"], **fields)


def from_fields(fields: dict) -> UpsamplerConfig:
    """The config from its fields, also after JSON."""
    channels = tuple((name, width) for name, width in fields["channels"])
    return UpsamplerConfig(**fields | {"channels": channels})


def init_upsamplers(config: UpsamplerConfig, key: jax.Array) -> PyTree:
    """Fresh parameters {place: ...}."""
    module, emb = Upsamplers(config), jnp.zeros((1, config.emb))
    features = {name: jnp.zeros((1, 2, 2, channels)) for name, channels in config.channels}

    def touch(module):  # every parameter
        return module(module.lift(features, (2.0, 2.0)), emb, jnp.ones(1))

    return nn.init(touch, module)(key)["params"]


class Upsamplers(nn.Module):
    """phi_1 ... phi_4 side by side; see `lift` and `__call__`."""

    config: UpsamplerConfig

    def setup(self) -> None:
        kind = Residual if self.config.design in ("full", "neck") else Gain
        for name, channels in self.config.channels:  # names of blocks are identifiers
            setattr(self, name, kind(self.config, channels))

    def lift(self, features: dict[str, jax.Array], ratio: tuple[float, float]) -> PyTree:
        """{place: the part of phi that depends on the pivot's features [b, h, w, c] but not on t}.

        ratio: (height, width) of the larger canvas over those of the pivot.
        """
        return {
            name: getattr(self, name).lift(
                f, (round(f.shape[1] * ratio[0]), round(f.shape[2] * ratio[1]))
            )
            for name, f in features.items()
        }

    def __call__(self, lifted: PyTree, emb: jax.Array, sigma: jax.Array) -> dict[str, jax.Array]:
        """{place: u_n [b, H, W, c]} at a step with embedding emb [b, E] and level sigma [b]."""
        return {name: getattr(self, name)(once, emb, sigma) for name, once in lifted.items()}


class Gain(nn.Module):
    """u = (W^T basis(t)) * up(f), a gain for each channel or for each group of SHARED."""

    config: UpsamplerConfig
    channels: int

    def setup(self) -> None:
        self.shared = SHARED if self.config.design == "2k" else 1
        shape = (BASES, self.channels // self.shared)
        start = float(self.config.init == "identity")  # basis_0 = 1
        self.gain = self.param("gain", lambda key: jnp.zeros(shape).at[0].set(start))

    def lift(self, f: jax.Array, size: Size) -> jax.Array:
        return resize(f, size)

    def __call__(self, lifted: jax.Array, emb: jax.Array, sigma: jax.Array) -> jax.Array:
        gain = jnp.repeat(time_basis(sigma) @ self.gain, self.shared, axis=1)
        return gain[:, None, None, :].astype(lifted.dtype) * lifted


def time_basis(sigma: jax.Array) -> jax.Array:
    """sigma [b] -> [b, BASES]: cos(k tau), tau = 2 arctan(sigma)."""
    tau = 2 * jnp.arctan(sigma.astype(jnp.float32))
    return jnp.cos(tau[:, None] * jnp.arange(BASES, dtype=jnp.float32)[None, :])


class Residual(nn.Module):
    """Two residual blocks, the first of which enlarges; at full width or inside a neck."""

    config: UpsamplerConfig
    channels: int

    def setup(self) -> None:
        config = self.config
        full = config.design == "full"
        width = self.channels if full else config.width
        init = layers.uniform(*FAMILIES["adm"].init)
        zero_conv = config.init == "identity"  # the zero factor is in the blocks or after them
        self.block0 = TimeBlock(config, width, zero_conv)
        self.block1 = TimeBlock(config, width, zero_conv)
        if full and config.init == "zero":
            self.gate = self.param("gate", nn.initializers.zeros, (self.channels,))
        if not full:
            self.reduce = layers.Dense(width, kernel_init=init)
            self.expand = layers.Dense(self.channels, kernel_init=nn.initializers.zeros)

    def lift(self, f: jax.Array, size: Size) -> tuple[jax.Array, jax.Array]:
        f = self.reduce(f) if self.config.design == "neck" else f
        return self.block0.before_time(f, size)

    def __call__(self, lifted: PyTree, emb: jax.Array, sigma: jax.Array) -> jax.Array:
        h = self.block0.after_time(*lifted, emb)
        h = self.block1.after_time(*self.block1.before_time(h, h.shape[1:3]), emb)
        if self.config.design == "neck":
            return self.expand(h)
        gated = self.config.init == "zero"
        return h * self.gate.astype(h.dtype)[None, None, None, :] if gated else h


class TimeBlock(nn.Module):
    """One residual block, divided into the parts before and after the time enters."""

    config: UpsamplerConfig
    width: int
    zero_conv: bool

    def setup(self) -> None:
        groups = self.config.norm_groups(self.width)
        init = layers.uniform(*FAMILIES["adm"].init)
        self.norm0 = layers.GroupNorm(groups, 1e-5)
        self.conv0 = layers.Conv(self.width, kernel_init=init)
        self.affine = layers.Dense(self.width, kernel_init=init)
        self.norm1 = layers.GroupNorm(groups, 1e-5)
        last = nn.initializers.zeros if self.zero_conv else init
        self.conv1 = layers.Conv(self.width, kernel_init=last)

    def before_time(self, x: jax.Array, size: Size) -> tuple[jax.Array, jax.Array]:
        h = self.conv0(resize(nn.silu(self.norm0(x)), size))
        return h, resize(x, size)

    def after_time(self, h: jax.Array, x: jax.Array, emb: jax.Array) -> jax.Array:
        shift = self.affine(emb.astype(h.dtype))[:, None, None, :]
        return x + self.conv1(nn.silu(self.norm1(h + shift)))
