"""Encoders of captions: token numbers to a sequence of features and one pooled vector.

One linen module computes published encoders, which differ in the constants of `STYLES`: the
pre-norm transformer that trains together with its U-Net, BERT (MiniLM), CLIP's text tower by OpenAI
and by OpenCLIP, and the encoder of T5. A row of token numbers ends in -1, which means no token; a
row of -1 alone is the empty caption, the null condition: nothing is attended to, and the pooled
vector is zero.

Stable Diffusion's encoders are CLIP's, with a `pad` token in place of -1 that is attended to as all
others; the null condition is the caption `empty`. SDXL has two encoders, the second of which stands
in `beside`: a token's features are those of both, the pooled vector is the second's, and the null
condition is all zeros.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models import layers

NO_TOKEN = -1


class Style(NamedTuple):
    post_norm: bool  # norms after the sums (BERT), or before the branches and at the end
    causal: bool
    relative: bool  # T5: a bias of distances, RMS norms, no biases, logits not scaled
    gated: bool
    activation: str
    eps: float
    pooled: str  # mean over the tokens | end: the token with the highest number, CLIP's end mark


STYLES = {
    "transformer": Style(False, False, False, False, "gelu", 1e-6, "mean"),
    "bert": Style(True, False, False, False, "gelu_exact", 1e-12, "mean"),
    "clip": Style(False, True, False, False, "quick_gelu", 1e-5, "end"),
    "openclip": Style(False, True, False, False, "gelu_exact", 1e-5, "end"),
    "t5": Style(False, False, True, False, "relu", 1e-6, "mean"),
    "t5_gated": Style(False, False, True, True, "gelu", 1e-6, "mean"),  # version 1.1
}
ACTIVATIONS = {
    "gelu": nn.gelu,
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Plain values that determine an encoder.

    kind: one of STYLES. vocab: number of tokens. length: most tokens of a caption. width: of the
    features. mlp: width between the two linear maps. head_dim: channels of a head, 0 for
    width / heads. tokenizer: the vocabulary as JSON (`data.tokens`); it travels with the weights.
    pad: the token in place of none, -1 = none. empty: tokens of the null condition where there is
    a pad; () = zeros. skip: number of the last blocks that the features of tokens leave out, and
    then the norm after them too. projection: width of a linear map of the pooled vector, 0 = none.
    beside: a second encoder of the same tokens.
    """

    kind: str
    vocab: int
    length: int
    width: int
    depth: int
    heads: int
    mlp: int
    head_dim: int = 0
    tokenizer: str = ""
    pad: int = NO_TOKEN
    empty: tuple[int, ...] = ()
    skip: int = 0
    projection: int = 0
    beside: "TextConfig | None" = None

    def __post_init__(self):
        if self.kind not in STYLES:
            raise ValueError(f"text encoder {self.kind!r} is unknown: choose one of {[*STYLES]}")
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.width // self.heads)

    @property
    def token_width(self) -> int:
        """Width of the features of a token, over all encoders."""
        return self.width + (self.beside.token_width if self.beside else 0)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.beside.pooled_width if self.beside else self.projection or self.width


def text_config(fields: dict) -> TextConfig:
    """The config from its fields, also after JSON."""
    beside = fields.get("beside")
    beside = text_config(beside) if isinstance(beside, dict) else beside
    return TextConfig(**fields | {"empty": tuple(fields.get("empty", ())), "beside": beside})


class TextFeatures(NamedTuple):
    """What a U-Net reads of captions. tokens: [b, n, width]. mask: bool [b, n], true for tokens.
    pooled: [b, width], zero for the empty caption."""

    tokens: jax.Array
    mask: jax.Array
    pooled: jax.Array


class TextEncoder(nn.Module):
    """Token numbers int32 [b, n <= length] -> TextFeatures, in float32."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> TextFeatures:
        config, style = self.config, STYLES[self.config.kind]
        given, (ids, mask, shown) = ids, _padded(ids, config)
        n = ids.shape[1]
        start = nn.initializers.normal(0.02)
        norm = nn.RMSNorm if style.relative else nn.LayerNorm
        norm = functools.partial(norm, epsilon=style.eps, use_fast_variance=False)
        x = nn.Embed(config.vocab, config.width, embedding_init=start, name="embedding")(
            jnp.maximum(ids, 0)
        ).astype(jnp.float32)  # the weights may be narrower
        bias = jnp.where(mask[:, None, None, :], 0.0, -1e9)
        if style.relative:
            table = self.param("distance", start, (DISTANCES, config.heads))
            bias += jnp.take(table, _bucket(n), axis=0).transpose(2, 0, 1)[None]
        else:
            x += self.param("position", start, (config.length, config.width))[None, :n]
        if style.causal:
            bias += jnp.where(np.tri(n, dtype=bool), 0.0, -1e9)[None, None]
        if style.post_norm:
            x = norm(name="norm")(x)
        states = []  # before each block
        for i in range(config.depth):
            states.append(x)
            x = _Block(config, norm, name=f"block{i}")(x, bias)
        if not style.post_norm:
            x = norm(name="norm")(x)
        tokens = states[-config.skip] if config.skip else x
        pooled = _pooled(x, mask, ids, style.pooled)
        if config.projection:
            pooled = nn.Dense(config.projection, use_bias=False, name="projection")(pooled)
        tokens, pooled = jnp.where(shown[:, :, None], tokens, 0), jnp.where(shown, pooled, 0)
        if config.beside:
            other = TextEncoder(config.beside, name="beside")(given)
            tokens, pooled = jnp.concatenate([tokens, other.tokens], axis=-1), other.pooled
        return TextFeatures(tokens, mask, pooled)


def _padded(ids: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(token numbers, which of them are attended to, bool [b, 1]: rows that are not zeros)."""
    mask = ids > NO_TOKEN
    if config.pad == NO_TOKEN:
        return ids, mask, jnp.ones((len(ids), 1), bool)
    n = config.length
    ids = jnp.pad(ids, ((0, 0), (0, n - ids.shape[1])), constant_values=NO_TOKEN)
    null = jnp.full(n, NO_TOKEN).at[: len(config.empty)].set(jnp.array(config.empty, int))
    given = mask.any(axis=1, keepdims=True)
    ids = jnp.where(given, ids, null[None])
    shown = given if not config.empty else jnp.ones_like(given)
    return jnp.where(ids > NO_TOKEN, ids, config.pad), jnp.ones(ids.shape, bool), shown


class _Block(nn.Module):
    """Self-attention and two linear maps, each with a norm and a sum."""

    config: TextConfig
    norm: functools.partial

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x [b, n, width], bias of the logits [b or 1, heads or 1, n, n] -> like x."""
        config, style = self.config, STYLES[self.config.kind]
        dense = functools.partial(nn.Dense, use_bias=not style.relative)
        inner = config.heads * config.head_dim

        def attend(x):
            q, k, v = jnp.split(dense(3 * inner, name="qkv")(x), 3, axis=-1)
            scale = math.sqrt(config.head_dim) if style.relative else 1.0
            h = layers.attention(q * scale, k, v, config.heads, bias)
            return dense(config.width, name="proj")(h)

        def widen(x):
            h = ACTIVATIONS[style.activation](dense(config.mlp, name="fc0")(x))
            h = h * dense(config.mlp, name="gate")(x) if style.gated else h
            return dense(config.width, name="fc1")(h)

        for branch, name in ((attend, "norm0"), (widen, "norm1")):
            norm = self.norm(name=name)
            x = norm(x + branch(x)) if style.post_norm else x + branch(norm(x))
        return x


def _pooled(x: jax.Array, mask: jax.Array, ids: jax.Array, how: str) -> jax.Array:
    """[b, width]; zero where no token is."""
    if how == "end":
        chosen = jax.nn.one_hot(jnp.argmax(ids, axis=1), ids.shape[1]) * mask
    else:
        chosen = mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bn,bnd->bd", chosen, x)


DISTANCES, FARTHEST = 32, 128  # T5's buckets, and the distance from which all share the last


def _bucket(n: int) -> np.ndarray:
    """int [n, n]: T5's bucket of the distance from each query to each key (Raffel et al. 2020).

    Half of the buckets are for later keys; in each half, small distances have their own bucket and
    larger ones share buckets of logarithmic width.
    """
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    half, size = DISTANCES // 2, np.abs(distance)
    exact = half // 2
    far = np.log(np.maximum(size, 1) / exact) / math.log(FARTHEST / exact) * (half - exact)
    far = np.minimum(exact + far.astype(int), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)
