"""The U-Net of ADM, DDPM++ and NCSN++, and PaGoDA's grown generator: one module runs the plan.

    h     = conv1(drop(silu(norm1(conv0(resample(silu(norm0(x))))  o  affine(emb)))))          (1)
    x'    = residual_scale * (shortcut(resample(x)) + h)                                       (2)
    x''   = residual_scale * (x' + proj(attention(qkv(norm2(x')))))                            (3)
    x'''  = x'' + text_proj(attention(text_q(norm3(x'')), text_kv(tokens)))      with captions (3t)
    o:      ADM  norm1(h) * (1 + scale) + shift;  others, and grown blocks:  norm1(h + shift)
    (3), (3t):  latent diffusion has the layers of transformer.py in their place
    emb   = silu(map_layer1(silu(map_layer0(features(noise)))) + conditions)                   (4)

Dhariwal & Nichol 2021 (arXiv 2105.05233), Song et al. 2021 (2011.13456), in the form of Karras et
al. 2022 (2206.00364, Table 7). conv1, proj, text_proj and the head's convolution start at zero, so
every block starts as its identity path, grown blocks as nearest-neighbour enlargement of features,
and a network with captions as the same one without. DDPM and latent diffusion change the size by a
3x3 convolution instead of inside (1).

Arrays are NHWC.
"""

import dataclasses
import difflib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cheapscale.models import layers
from cheapscale.models.plan import FAMILIES, Block, UNetConfig, plan
from cheapscale.models.text import NO_TOKEN, TextEncoder, TextFeatures, text_config
from cheapscale.models.transformer import Transformer, entropy_scale

__all__ = ["Block", "ResBlock", "UNet", "UNetConfig", "plan", "unet"]

RESAMPLE = {"": lambda x, taps: x, "up": layers.upsample, "down": layers.downsample}
zeros = nn.initializers.zeros


class ResBlock(nn.Module):
    """Equations (1) to (3t) for one entry of the plan."""

    block: Block
    kernel_init: tuple[float, str]
    dropout: float
    dilation: int = 1  # spacing of the taps of conv0 and conv1
    entropy_scaling: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, emb: jax.Array, train: bool, text: TextFeatures | None = None
    ) -> jax.Array:
        """x [b, h, w, in_channels], emb [b, emb] -> [b, h', w', out_channels]."""
        block, init = self.block, layers.uniform(*self.kernel_init)
        dense = functools.partial(layers.Dense, kernel_init=init)
        conv = functools.partial(layers.Conv, kernel_dilation=self.dilation)
        resize = functools.partial(RESAMPLE[block.resample], taps=block.taps)

        # (1) the residual branch
        h = nn.silu(layers.GroupNorm(block.groups0, block.eps, name="norm0")(x))
        h = conv(block.inner, kernel_init=init, name="conv0")(resize(h))
        norm1 = layers.GroupNorm(block.groups1, block.eps, name="norm1")
        affine = dense(block.inner * (1 + block.scale_shift), name="affine")
        condition = affine(emb)[:, None, None, :]
        if block.scale_shift:
            scale, shift = jnp.split(condition, 2, axis=-1)
            h = nn.silu(norm1(h) * (1 + scale) + shift)
        else:
            h = nn.silu(norm1(h + condition))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(block.out_channels, kernel_init=zeros, name="conv1")(h)

        # (2) the identity path
        x = resize(x)
        if block.shortcut:
            x = dense(block.out_channels, name="skip")(x)
        x = (x + h) * block.residual_scale
        if block.depth:
            change = Transformer(
                block, self.kernel_init, self.entropy_scaling, name="transformer"
            )  # fmt: skip
            return x + change(x, text)
        if block.heads:  # (3)
            x = (x + self.attend(x)) * block.residual_scale
        if block.text:  # (3t)
            x = x + self.attend_text(x, text)
        return x

    def attend(self, x: jax.Array) -> jax.Array:
        """proj(attention(qkv(norm2(x)))) over all positions: [b, h, w, c] -> the same shape."""
        block = self.block
        b, height, width, c = x.shape
        init = layers.uniform(*self.kernel_init)
        dense = functools.partial(layers.Dense, kernel_init=init)
        h = layers.GroupNorm(block.groups2, block.eps, name="norm2")(x).reshape(b, -1, c)
        qkv = dense(2 * block.qk + block.v, name="qkv")(h)
        q, k, v = jnp.split(qkv, (block.qk, 2 * block.qk), axis=-1)
        if self.entropy_scaling and block.resolution > 1:
            q = q * entropy_scale(block, height * width)
        h = layers.attention(q, k, v, block.heads)
        h = dense(block.out_channels, kernel_init=zeros, name="proj")(h)
        return h.reshape(b, height, width, -1)

    def attend_text(self, x: jax.Array, text: TextFeatures) -> jax.Array:
        """text_proj(attention(text_q(norm3(x)), text_kv(tokens))): [b, h, w, c] -> the same shape.

        Zero where the caption is empty.
        """
        block, c = self.block, x.shape[-1]
        dense = functools.partial(layers.Dense, kernel_init=layers.uniform(*self.kernel_init))
        h = layers.GroupNorm(block.groups2, block.eps, name="norm3")(x).reshape(len(x), -1, c)
        k, v = jnp.split(dense(2 * c, name="text_kv")(text.tokens.astype(x.dtype)), 2, axis=-1)
        bias = jnp.where(text.mask[:, None, None, :], 0.0, -1e9)
        h = layers.attention(dense(c, name="text_q")(h), k, v, block.heads, bias)
        h = dense(c, use_bias=False, kernel_init=zeros, name="text_proj")(h)
        return h.reshape(x.shape) * text.mask.any(axis=1)[:, None, None, None]


class Head(nn.Module):
    """norm, silu, 3x3 convolution; the convolution starts at zero."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(layers.GroupNorm(self.block.groups0, self.block.eps, name="norm")(x))
        return layers.Conv(self.block.out_channels, kernel_init=zeros, name="conv")(h)


class Pool(nn.Module):
    """The numbers [b, out_channels] of an encoder: norm, silu, mean over positions, linear."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(layers.GroupNorm(self.block.groups0, self.block.eps, name="norm")(x))
        h = h.mean(axis=(1, 2))
        return layers.Dense(self.block.out_channels, kernel_init=zeros, name="dense")(h)


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
                [0, num_classes), and None, mean no class: a zero embedding. With captions: token
                numbers [b, n], or what `encode` made of them; anything else means no caption.
            augment: [b, augment_dim]; None is zero.
            extra: [b, extra_conditions] scalars, embedded like the noise; 0 and None add nothing.
            caption: [b, caption_dim]; None is zero, or with captions their pooled vector.
            inject: {place: array}, added to a block's output. The place "block" adds it for all
                readers, "block/skip" only for the decoder block that reads the skip connection,
                "block/stream" only for the next block.
            taps: names of blocks; the result is then (out, {name: the block's output after
                injection}). "emb" is the embedding of equation (4), [b, emb].
            train: dropout is on, and needs rngs={"dropout": key}.

        Raises ValueError where x, inject or taps do not fit the network.
        """
        config, inject = self.config, inject or {}
        self._check(x, inject, taps)
        family, dtype = FAMILIES[config.family], jnp.dtype(config.dtype)
        init = layers.uniform(*family.init)
        conv = functools.partial(layers.Conv, kernel_init=init)

        def injected(h, place):
            if place not in inject:
                return h
            if inject[place].shape != h.shape:
                raise ValueError(
                    f"inject[{place!r}] has shape {inject[place].shape}, but the stream there has "
                    f"{h.shape}: give an array of that shape"
                )
            return h + inject[place].astype(h.dtype)

        text, label, caption = self._read(label, caption, len(x))
        canvas = x.shape[1:3]
        emb = self._embedding(noise, label, augment, extra, caption, canvas)
        h = aux = x.astype(dtype)
        skips, tapped = {}, {"emb": emb}
        for block in plan(config):
            name = block.name
            if block.kind == "map":
                continue  # part of the embedding
            if block.kind == "conv_in":
                h = conv(block.out_channels, name=name)(h)
            elif block.kind == "res":
                if block.pop:
                    h = jnp.concatenate([h, skips.pop(block.pop)], axis=-1)
                h = self._res(block)(h, emb, train, text)
            elif block.kind == "resample":
                h = layers.upsample(h, block.taps) if block.resample == "up" else h
                stride, sides = (1, (1, 1)) if block.resample == "up" else (2, family.down_padding)
                h = conv(block.out_channels, strides=stride, padding=[sides] * 2, name=name)(h)
            elif block.kind == "aux":
                side = 1 + (len(block.taps) - 1) // 2  # the filter reads beyond the border
                wide = conv(block.out_channels, padding=side, name=name)(aux)
                # NCSN++'s residual encoder; sqrt(1/2) keeps the variance of the sum.
                h = aux = (h + layers.filter_stride2(wide, block.taps)) * 0.5**0.5
            else:
                # The end computes in x's dtype: bfloat16 near 1 resolves half a grey level.
                end = Head if block.kind == "head" else Pool
                h = end(block, name=name)(h.astype(x.dtype))
            h = injected(h, name)
            if block.push:
                skips[name] = injected(h, f"{name}/skip")
            h = tapped[name] = injected(h, f"{name}/stream")
        out = h.astype(x.dtype)
        return (out, {name: tapped[name] for name in taps}) if taps else out

    def encode(self, params: Any, label: Any) -> Any:
        """The TextFeatures of token numbers [b, n] by a network with captions; any other label as
        it is."""
        if isinstance(label, TextFeatures) or label.ndim != 2:
            return label
        return TextEncoder(self.config.text, parent=None).apply({"params": params["text"]}, label)

    def _read(
        self, label: Any, caption: jax.Array | None, rows: int
    ) -> tuple[TextFeatures | None, Any, jax.Array | None]:
        """(what the blocks read of captions, label, pooled vector); without captions label and
        vector are as they are given."""
        if not self.config.text:
            return None, label, caption
        encoder, text = TextEncoder(self.config.text, name="text"), label
        if not isinstance(text, TextFeatures):
            given = text is not None and text.ndim == 2
            text = encoder(text if given else jnp.full((rows, 1), NO_TOKEN))
        return text, None, text.pooled if caption is None else caption

    def _res(self, block: Block) -> nn.Module:
        config = self.config
        recompute = block.name.startswith(config.remat)
        module = nn.remat(ResBlock, static_argnums=(3,)) if recompute else ResBlock
        dilated = block.name.startswith(config.dilated)
        return module(
            block,
            FAMILIES[config.family].init,
            config.dropout,
            config.dilation if dilated else 1,
            config.entropy_scaling,
            name=block.name,
        )

    def _embedding(self, noise, label, augment, extra, caption, canvas) -> jax.Array:
        """Equation (4): [b, emb]. canvas: (height, width) of x."""
        config, family = self.config, FAMILIES[self.config.family]
        dtype, init = jnp.dtype(config.dtype), layers.uniform(*family.init)
        widths = {block.name: block.out_channels for block in plan(config) if block.kind == "map"}

        def dense(name, value, kernel_init=init, use_bias=True):
            layer = layers.Dense(widths[name], use_bias, kernel_init=kernel_init, name=name)
            return layer(value.astype(dtype))

        def absent(width):  # a condition that is not given counts as zero
            return jnp.zeros((1, width))

        # features of the noise level, joined by the conditions that come before the mapping
        if family.embedding == "fourier":
            features = layers.Fourier(widths["map_noise"], name="map_noise")(noise)
        else:
            endpoint = family.embedding == "sin_cos"
            features = layers.sinusoids(noise, config.channels, endpoint=endpoint)
        if family.embedding != "cos_sin":
            # DDPM++ and NCSN++ have [sin, cos] where ADM has [cos, sin].
            features = jnp.roll(features, features.shape[-1] // 2, axis=-1)
        features = features.astype(dtype)
        if config.augment_dim:
            given = absent(config.augment_dim) if augment is None else augment
            features += dense("map_augment", given, use_bias=False)
        weights = _label_weights(label, config.num_classes) if config.num_classes else None
        if weights is not None and not family.label_late:
            features += dense("map_label", weights * config.num_classes**0.5)

        emb = dense("map_layer1", nn.silu(dense("map_layer0", features)))

        # conditions that join after the mapping
        if weights is not None and family.label_late:
            unit = layers.uniform(config.num_classes)  # a row for each class, of unit variance
            emb += dense("map_label", weights, unit, use_bias=False)
        if config.extra_conditions:
            first = layers.Dense(widths["map_extra0"], kernel_init=init, name="map_extra0")
            scalars = absent(config.extra_conditions) if extra is None else extra
            change = layers.change_from_zero(first, scalars, config.channels, dtype)
            emb += dense("map_extra1", change, zeros, use_bias=False)
        if config.caption_dim:
            given = absent(config.caption_dim) if caption is None else caption
            emb += dense("map_caption", given, use_bias=False)
        if config.sizes:
            added = jnp.concatenate([caption, self._sizes(canvas, len(caption))], axis=-1)
            emb += dense("map_added1", nn.silu(dense("map_added0", added)))
        return nn.silu(emb)

    def _sizes(self, canvas: tuple[int, int], rows: int) -> jax.Array:
        """[rows, 6 width]: sinusoids of (height, width, top, left, height, width) in pixels, those
        of a picture of the canvas's size that was not cropped (Podell et al. 2023, arXiv
        2307.01952, section 2.2)."""
        width, pixels = self.config.sizes
        sides = [pixels * side for side in canvas]
        numbers = jnp.array([*sides, 0, 0, *sides], jnp.float32)
        return jnp.tile(layers.sinusoids(numbers, width).reshape(1, -1), (rows, 1))

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
        blocks = [block for block in plan(config) if block.kind != "map"]
        names = {block.name for block in blocks}
        places = names | {f"{block.name}/stream" for block in blocks}
        places |= {f"{block.name}/skip" for block in blocks if block.push}
        unknown = [*(set(inject) - places), *(set(taps) - names - {"emb"})]
        if unknown:
            raise ValueError(
                f"the U-Net has no block {unknown[0]!r} to tap or inject at: its blocks are "
                f"{', '.join(b.name for b in blocks)} (to inject, '/stream' may follow, or '/skip' "
                "in the encoder)"
            )


def unet(**fields: Any) -> UNet:
    """The network of a config given as plain values (lists count as tuples, as after JSON).

    Raises ValueError on an unknown field, and where the fields do not fit together.
    """
    known = [field.name for field in dataclasses.fields(UNetConfig)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean model.{near[0]}?" if near else f"give one of {', '.join(known)}"
            raise ValueError(f"the U-Net has no field model.{name}: {hint}")
    text = fields.get("text")
    if isinstance(text, dict):
        fields["text"] = text_config(text)
    config = UNetConfig(**{name: _frozen(value) for name, value in fields.items()})
    plan(config)
    return UNet(config)


def init_params(fields: dict[str, Any], key: jax.Array) -> Any:
    """Fresh parameters of the network `unet(**fields)`."""
    net = unet(**fields)
    side, channels = net.config.resolution, net.config.in_channels
    x, label = jnp.zeros((1, side, side, channels)), jnp.zeros(1, jnp.int32)
    return net.init(key, x, jnp.zeros(1), label=label)["params"]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _label_weights(label: jax.Array | None, num_classes: int) -> jax.Array:
    """[b or 1, num_classes]: one-hot rows of indices; weights as they are; zeros for no label."""
    if label is None:
        return jnp.zeros((1, num_classes))
    if label.ndim == 2:
        return label
    return jax.nn.one_hot(label, num_classes)
