"""The U-Net of ADM, DDPM++ and NCSN++, and PaGoDA's grown generator: one module walks the plan.

    h     = conv1(drop(silu(norm1(conv0(resample(silu(norm0(x))))  o  affine(emb)))))          (1)
    x'    = residual_scale * (shortcut(resample(x)) + h)                                       (2)
    x''   = residual_scale * (x' + proj(attention(qkv(norm2(x')))))                            (3)
    o:      ADM  norm1(h) * (1 + scale) + shift;  others, and grown blocks:  norm1(h + shift)
    emb   = silu(map_layer1(silu(map_layer0(features(noise)))) + conditions)                   (4)

conv1, proj and the head's convolution start at zero, so that every block starts as its identity
path, and a grown part as nearest-neighbour enlargement of the features (spec 4.1).
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cheapscale.models import layers
from cheapscale.models.plan import FAMILIES, Block, UNetConfig, plan

__all__ = ["Block", "ResBlock", "UNet", "UNetConfig", "plan", "unet"]


class ResBlock(nn.Module):
    """Equations (1) to (3) for one entry of the plan."""

    block: Block
    kernel_init: tuple[float, str]
    dropout: float
    dilation: int = 1  # of conv0 and conv1
    steady_entropy: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, train: bool) -> jax.Array:
        """x [b, h, w, in_channels], emb [b, emb] -> [b, h', w', out_channels]."""
        block, init = self.block, layers.uniform(*self.kernel_init)
        zero = layers.uniform(0)
        resample = {"": lambda a, taps: a, "up": layers.upsample, "down": layers.downsample}
        resize = functools.partial(resample[block.resample], taps=block.taps)

        h = nn.silu(layers.GroupNorm(block.groups0, block.eps, name="norm0")(x))
        h = layers.Conv(block.inner, init, dilation=self.dilation, name="conv0")(resize(h))
        norm1 = layers.GroupNorm(block.groups1, block.eps, name="norm1")
        affine = layers.Dense(block.inner * (1 + block.scale_shift), init, name="affine")
        condition = affine(emb)[:, None, None, :]
        if block.scale_shift:
            scale, shift = jnp.split(condition, 2, axis=-1)
            h = nn.silu(norm1(h) * (1 + scale) + shift)
        else:
            h = nn.silu(norm1(h + condition))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = layers.Conv(block.out_channels, zero, dilation=self.dilation, name="conv1")(h)

        x = resize(x)
        if block.shortcut:
            x = layers.Dense(block.out_channels, init, name="skip")(x)
        x = (x + h) * block.residual_scale
        if block.heads:
            x = (x + self.attend(x)) * block.residual_scale
        return x

    def attend(self, x: jax.Array) -> jax.Array:
        block = self.block
        b, height, width, c = x.shape
        init, zero = layers.uniform(*self.kernel_init), layers.uniform(0)
        h = layers.GroupNorm(block.groups2, block.eps, name="norm2")(x).reshape(b, -1, c)
        qkv = layers.Dense(2 * block.qk + block.v, init, name="qkv")(h)
        q, k, v = jnp.split(qkv, (block.qk, 2 * block.qk), axis=-1)
        if self.steady_entropy and block.resolution > 1:  # over more positions than native
            q = q * math.sqrt(math.log(height * width) / math.log(block.resolution**2))
        h = layers.attention(q, k, v, block.heads)
        h = layers.Dense(block.out_channels, zero, name="proj")(h)
        return h.reshape(b, height, width, -1)


class Head(nn.Module):
    """norm, silu, 3x3 convolution; the convolution starts at zero."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(layers.GroupNorm(self.block.groups0, self.block.eps, name="norm")(x))
        return layers.Conv(self.block.out_channels, layers.uniform(0), name="conv")(h)


class UNet(nn.Module):
    """The raw network F. See `__call__`; build it with `unet(**fields)`."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        noise: jax.Array,
        label: jax.Array | None = None,
        *,
        augment: jax.Array | None = None,
        extra: jax.Array | None = None,
        caption: jax.Array | None = None,
        inject: dict[str, jax.Array] | None = None,
        taps: tuple[str, ...] = (),
        train: bool = False,
    ) -> Any:
        """x [b, h, w, in], noise [b] -> [b, H, W, out] in x's dtype; H / h = 2 ** len(growth).

        Args:
            noise: the noise feature, see UNetConfig.noise_feature.
            label: class indices [b], or weights [b, num_classes] to mix classes. Any index outside
                [0, num_classes), and None, mean no class: a zero embedding.
            augment: [b, augment_dim]; None is zero.
            extra: [b, extra_conditions] scalars, embedded like the noise; None adds nothing.
            caption: [b, caption_dim]; None is zero.
            inject: {block: array of the shape of its output} added to the stream after that block;
                with "/skip" appended to the name, only to what the decoder receives from it, with
                "/stream" only to what the next block receives.
            taps: names of blocks whose (injected) output is wanted: returns (out, {name: array});
                "emb" is the embedding of equation (4), [b, emb].
            train: dropout is on, and needs rngs={"dropout": key}.
        """
        config, inject = self.config, dict(inject or {})
        self._check(x, inject, taps)
        dtype = jnp.dtype(config.dtype)
        maps = {block.name: block for block in plan(config) if block.kind == "map"}
        emb = self._embedding(maps, noise, label, augment, extra, caption)
        h = aux = x.astype(dtype)
        skips, tapped = {}, {"emb": emb} if "emb" in taps else {}
        init = layers.uniform(*FAMILIES[config.family].init)
        for block in plan(config):
            if block.kind == "map":
                continue
            if block.kind == "conv_in":
                h = layers.Conv(block.out_channels, init, name=block.name)(h)
            elif block.kind == "res":
                if block.pop:
                    h = jnp.concatenate([h, skips.pop(block.pop)], axis=-1)
                h = self._res(block)(h, emb, train)
            elif block.kind == "aux":
                side = 1 + (len(block.taps) - 1) // 2  # the filter reads beyond the border
                conv = layers.Conv(block.out_channels, init, padding=side, name=block.name)
                h = aux = (h + layers.filter_stride2(conv(aux), block.taps)) * 0.5**0.5
            else:
                # in the input's precision: a step of bfloat16 near 1 is half a grey level
                h = Head(block, name=block.name)(h.astype(x.dtype))
            if block.name in inject:
                h = h + _fitting(inject[block.name], h, block.name)
            if block.push:
                key = f"{block.name}/skip"
                skips[block.name] = h + _fitting(inject[key], h, key) if key in inject else h
            key = f"{block.name}/stream"
            if key in inject:
                h = h + _fitting(inject[key], h, key)
            if block.name in taps:
                tapped[block.name] = h
        out = h.astype(x.dtype)
        return (out, tapped) if taps else out

    def _res(self, block):
        recompute = any(block.name.startswith(prefix) for prefix in self.config.remat)
        module = nn.remat(ResBlock, static_argnums=(3,)) if recompute else ResBlock
        family = FAMILIES[self.config.family]
        dilated = any(block.name.startswith(prefix) for prefix in self.config.dilated)
        return module(
            block,
            family.init,
            self.config.dropout,
            self.config.dilation if dilated else 1,
            self.config.steady_entropy,
            name=block.name,
        )

    def _embedding(self, maps, noise, label, augment, extra, caption):
        """Equation (4): [b, emb]."""
        config, family = self.config, FAMILIES[self.config.family]
        dtype = jnp.dtype(config.dtype)
        init = layers.uniform(*family.init)

        def dense(name, value, init=init, use_bias=True):
            layer = layers.Dense(maps[name].out_channels, init, use_bias, name=name)
            return layer(value.astype(dtype))

        if family.embedding == "fourier":
            features = layers.Fourier(maps["map_noise"].out_channels, name="map_noise")(noise)
        else:
            endpoint = family.embedding == "sin_cos"
            features = layers.sinusoids(noise, config.channels, endpoint=endpoint)
        if family.embedding != "cos_sin":
            features = jnp.roll(features, features.shape[-1] // 2, axis=-1)
        features = features.astype(dtype)
        if config.augment_dim:
            given = jnp.zeros((1, config.augment_dim)) if augment is None else augment
            features += dense("map_augment", given, use_bias=False)
        by_label = None
        if config.num_classes:
            weights = _label_weights(label, config.num_classes)
            unit = layers.uniform(config.num_classes)  # a row for each class, of unit variance
            if family.label_late:
                by_label = dense("map_label", weights, unit, False)
            else:
                features += dense("map_label", weights * config.num_classes**0.5)
        emb = dense("map_layer1", nn.silu(dense("map_layer0", features)))
        if by_label is not None:
            emb += by_label
        if config.extra_conditions:
            given = jnp.zeros((1, config.extra_conditions)) if extra is None else extra
            scalars = layers.sinusoids(given.reshape(-1), config.channels)
            hidden = nn.silu(dense("map_extra0", scalars.reshape(given.shape[0], -1)))
            by_extra = dense("map_extra1", hidden, layers.uniform(0))
            emb += by_extra if extra is not None else 0 * by_extra
        if config.caption_dim:
            given = jnp.zeros((1, config.caption_dim)) if caption is None else caption
            emb += dense("map_caption", given, use_bias=False)
        return nn.silu(emb)

    def _check(self, x, inject, taps):
        config = self.config
        if x.ndim != 4 or x.shape[-1] != config.in_channels:
            raise ValueError(
                f"the U-Net was given an array of shape {x.shape}: "
                f"give [b, h, w, {config.in_channels}] (model.in_channels)"
            )
        if any(side % config.stride for side in x.shape[1:3]):
            raise ValueError(
                f"an input of {x.shape[1]} x {x.shape[2]} px does not divide by the U-Net's stride "
                f"{config.stride}: resize it to multiples of {config.stride}"
            )
        streams = {block.name: block for block in plan(config) if block.kind != "map"}
        places = set(streams) | {f"{name}/stream" for name in streams}
        places |= {f"{name}/skip" for name, b in streams.items() if b.push}
        readable = {*streams, "emb"}
        for name in (*inject, *taps):
            if name not in (readable if name in taps else places):
                raise ValueError(
                    f"the U-Net has no block {name!r} to tap or inject at: its blocks are "
                    f"{', '.join(streams)} (to inject, '/stream' may follow, or '/skip' in the "
                    "encoder)"
                )


def unet(**fields: Any) -> UNet:
    """The network of a config given as plain values (lists count as tuples, as after JSON).

    Raises ValueError naming unknown fields, or whatever does not fit.
    """
    known = {field.name for field in dataclasses.fields(UNetConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"model has no field {', '.join(unknown)}: its fields are {', '.join(sorted(known))}"
        )
    config = UNetConfig(**{name: _frozen(value) for name, value in fields.items()})
    plan(config)
    return UNet(config)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _label_weights(label: jax.Array | None, num_classes: int) -> jax.Array:
    if label is None:
        return jnp.zeros((1, num_classes))
    if label.ndim == 2:
        return label
    return jax.nn.one_hot(label, num_classes)


def _fitting(value: jax.Array, stream: jax.Array, name: str) -> jax.Array:
    if value.shape != stream.shape:
        raise ValueError(
            f"inject[{name!r}] has shape {value.shape}, but the stream there has {stream.shape}"
        )
    return value.astype(stream.dtype)
