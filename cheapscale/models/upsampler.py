"""Time-aware feature upsamplers (self-cascade, Guo et al. 2024, section 3.3).

A frozen U-Net reads a clean pivot; four of its feature maps f_n are enlarged to the size they have
on the larger canvas, and u_n = phi_n(f_n, t) is added there. Four designs of phi_n:

    full   u = g * B2(B1(f, t), t), B1 enlarging: two residual blocks of the full width, as in the
           released code, of 18 c^2 + (E + 7) c parameters each
    neck   the same at a small width b between two 1x1 convolutions c -> b -> c
    gain   u_c = sum_k W[k, c] basis_k(t) * up(f)_c: five numbers a channel
    2k     the same with one gain for eight neighbouring channels: 2,200 numbers at Stable
           Diffusion's widths, which is the paper's 0.002 M

    residual block:  h = conv1(silu(norm1(conv0(up(silu(norm0(x)))) + dense(emb(t))))),  up(x) + h

Whatever does not depend on t is done by `lift`, once for all steps; the module itself is called at
every step. emb(t) is the frozen network's own embedding of the step, basis_k(t) = cos(k tau) with
tau = 2 arctan(sigma), the cosine schedule's time in [0, pi).

init="zero": u = 0 at the start, so that tuning begins at the tuning-free cascade; exactly one zero
factor stands before the output, for two would leave both without a gradient. init="identity":
u = up(f), as the released code's zero last convolutions have it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cheapscale.models import layers
from cheapscale.models.plan import FAMILIES, UNetConfig, plan

PyTree = Any
DESIGNS = ("full", "neck", "gain", "2k")
INITS = ("zero", "identity")
RESIZES = ("bilinear", "nearest")
BASES = 5  # functions of time of a gain
SHARED = 8  # channels that share a gain in the design "2k"
PLACES = 4


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
    """Plain values that determine the modules and their parameters.

    design, init: see the module's docstring. width: b of a neck. resize: "bilinear" is the paper's,
    "nearest" the released code's. channels: {place: c} as pairs, in the network's order. emb: width
    of the network's embedding. groups, group_size: of the norms, as in UNetConfig.
    """

    design: str
    channels: tuple[tuple[str, int], ...]
    emb: int
    init: str = "zero"
    width: int = 8
    resize: str = "bilinear"
    groups: int = 32
    group_size: int = 4

    def __post_init__(self):
        for field, value, known in (
            ("tune", self.design, DESIGNS),
            ("init", self.init, INITS),
            ("resize", self.resize, RESIZES),
        ):
            if value not in known:
                raise ValueError(
                    f"cascade.{field} {value!r} is unknown: choose one of {', '.join(known)}"
                )
        if self.design == "neck" and self.init == "identity":
            raise ValueError(
                "cascade.init 'identity' cannot pass through a neck narrower than its features: "
                "use init 'zero', or tune=full"
            )
        if self.design == "neck" and self.width % norm_groups(self, self.width):
            raise ValueError(
                f"cascade.width {self.width} does not divide into {norm_groups(self, self.width)} "
                f"norm groups: make it a multiple of {self.group_size}"
            )
        shared = SHARED if self.design == "2k" else 1
        uneven = [name for name, channels in self.channels if channels % shared]
        if uneven:
            raise ValueError(
                f"tune=2k shares a gain among {SHARED} channels, but {uneven[0]} has "
                f"{dict(self.channels)[uneven[0]]}: use tune=gain"
            )


def norm_groups(config: UpsamplerConfig, width: int) -> int:
    """Groups of a norm of `width` channels, by the network's own rule."""
    return max(1, min(config.groups, width // config.group_size))


def places(config: UNetConfig) -> tuple[str, ...]:
    """The blocks whose features are lifted: the last of each of the first three encoder levels, and
    the bottleneck's output (paper, figure 2). A network of fewer levels gives the remaining places
    to its other encoder blocks, the latest first."""
    encoder = [b for b in plan(config) if b.kind == "res" and b.push and not b.resample]
    last_of = {block.resolution: block.name for block in encoder}  # the later replaces the earlier
    chosen = list(last_of.values())[: PLACES - 1]
    others = [block.name for block in reversed(encoder) if block.name not in chosen]
    others += [
        b.name for b in reversed(plan(config)) if b.push and b.name not in (*chosen, *others)
    ]
    chosen += others[: PLACES - 1 - len(chosen)]
    order = [block.name for block in plan(config)]
    middle = next(b.name for b in reversed(plan(config)) if "_in1" in b.name)
    return (*sorted(chosen, key=order.index), middle)


def upsampler_config(model: UNetConfig, design: str, **fields: Any) -> UpsamplerConfig:
    """The modules that fit a network; ValueError where it has no four places for them."""
    blocks, chosen = {block.name: block for block in plan(model)}, places(model)
    if len(chosen) != PLACES:
        raise ValueError(
            f"the network offers {len(chosen)} places for upsamplers instead of {PLACES}: it needs "
            "at least three encoder blocks whose output the decoder takes"
        )
    return UpsamplerConfig(
        design,
        tuple((name, blocks[name].out_channels) for name in chosen),
        blocks["map_layer1"].out_channels,
        groups=model.groups,
        group_size=model.group_size,
        **fields,
    )


def from_fields(fields: dict) -> UpsamplerConfig:
    """The config of its fields after JSON."""
    channels = tuple((name, width) for name, width in fields["channels"])
    return UpsamplerConfig(**fields | {"channels": channels})


def time_basis(sigma: jax.Array) -> jax.Array:
    """sigma [b] -> [b, BASES]: cos(k tau), tau = 2 arctan(sigma)."""
    tau = 2 * jnp.arctan(sigma.astype(jnp.float32))
    return jnp.cos(tau[:, None] * jnp.arange(BASES, dtype=jnp.float32)[None, :])


class Upsamplers(nn.Module):
    """phi_1 ... phi_4 side by side; see `lift` and `__call__`."""

    config: UpsamplerConfig

    def setup(self):
        kinds = {"full": Residual, "neck": Residual, "gain": Gain, "2k": Gain}
        for name, channels in self.config.channels:  # names of blocks are identifiers
            setattr(self, name, kinds[self.config.design](self.config, channels))

    def lift(self, features: dict[str, jax.Array], ratio: tuple[float, float]) -> PyTree:
        """What phi makes of the pivot's features [b, h, w, c] before t enters; once for a stage.

        ratio: of the larger canvas to the pivot, (height, width).
        """
        sizes = {
            name: (round(f.shape[1] * ratio[0]), round(f.shape[2] * ratio[1]))
            for name, f in features.items()
        }
        return {
            name: getattr(self, name).lift(features[name], size) for name, size in sizes.items()
        }

    def __call__(self, lifted: PyTree, emb: jax.Array, sigma: jax.Array) -> dict[str, jax.Array]:
        """{place: u_n [b, H, W, c]} at a step of silu(embedding) emb [b, E] and level sigma [b]."""
        return {name: getattr(self, name)(once, emb, sigma) for name, once in lifted.items()}

    def init_with(self, features: dict, emb: jax.Array) -> PyTree:
        """Touches every parameter, for `init`."""
        return self(self.lift(features, (2.0, 2.0)), emb, jnp.ones(len(emb)))


class Gain(nn.Module):
    """u = (W^T basis(t)) * up(f), a gain for each channel or for each group of SHARED."""

    config: UpsamplerConfig
    channels: int

    def setup(self):
        self.shared = SHARED if self.config.design == "2k" else 1
        shape = (BASES, self.channels // self.shared)
        start = float(self.config.init == "identity")
        self.gain = self.param("gain", lambda key: jnp.zeros(shape).at[0].set(start))

    def lift(self, f: jax.Array, size: tuple[int, int]) -> jax.Array:
        return enlarge(f, size, self.config.resize)

    def __call__(self, lifted: jax.Array, emb: jax.Array, sigma: jax.Array) -> jax.Array:
        gain = jnp.repeat(time_basis(sigma) @ self.gain, self.shared, axis=1)
        return gain[:, None, None, :].astype(lifted.dtype) * lifted


class Residual(nn.Module):
    """Two residual blocks, the first of which enlarges; at full width or inside a neck."""

    config: UpsamplerConfig
    channels: int

    def setup(self):
        config = self.config
        full = config.design == "full"
        width = self.channels if full else config.width
        init = layers.uniform(*FAMILIES["adm"].init)
        zero_conv = config.init == "identity"  # one zero factor: of the blocks, or of the output
        self.block0 = TimeBlock(config, width, zero_conv)
        self.block1 = TimeBlock(config, width, zero_conv)
        if full and config.init == "zero":
            self.gate = self.param("gate", nn.initializers.zeros, (self.channels,))
        if not full:
            self.reduce = layers.Dense(width, init)
            self.expand = layers.Dense(self.channels, layers.uniform(0))

    def lift(self, f: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        f = self.reduce(f) if self.config.design == "neck" else f
        return self.block0.before_time(f, size)

    def __call__(self, lifted: PyTree, emb: jax.Array, sigma: jax.Array) -> jax.Array:
        h = self.block0.after_time(*lifted, emb)
        h = self.block1.after_time(*self.block1.before_time(h, h.shape[1:3]), emb)
        if self.config.design == "neck":
            return self.expand(h)
        return h * layers.over_axes(self.gate, h) if self.config.init == "zero" else h


class TimeBlock(nn.Module):
    """One residual block, cut where the time enters."""

    config: UpsamplerConfig
    width: int
    zero_conv: bool

    def setup(self):
        groups = norm_groups(self.config, self.width)
        init = layers.uniform(*FAMILIES["adm"].init)
        self.norm0 = layers.GroupNorm(groups, 1e-5)
        self.conv0 = layers.Conv(self.width, init)
        self.affine = layers.Dense(self.width, init)
        self.norm1 = layers.GroupNorm(groups, 1e-5)
        self.conv1 = layers.Conv(self.width, layers.uniform(0) if self.zero_conv else init)

    def before_time(self, x: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        h = self.conv0(enlarge(nn.silu(self.norm0(x)), size, self.config.resize))
        return h, enlarge(x, size, self.config.resize)

    def after_time(self, h: jax.Array, x: jax.Array, emb: jax.Array) -> jax.Array:
        shift = self.affine(emb.astype(h.dtype))[:, None, None, :]
        return x + self.conv1(nn.silu(self.norm1(h + shift)))


def enlarge(x: jax.Array, size: tuple[int, int], method: str) -> jax.Array:
    """[b, h, w, c] -> [b, *size, c]; the same size gives x itself."""
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method)


def init_upsamplers(config: UpsamplerConfig, key: jax.Array) -> PyTree:
    """Fresh parameters {place: ...}."""
    features = {name: jnp.zeros((1, 2, 2, channels)) for name, channels in config.channels}
    module = Upsamplers(config)
    emb = jnp.zeros((1, config.emb))
    return module.init(key, features, emb, method=Upsamplers.init_with)["params"]
