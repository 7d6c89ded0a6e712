"""The attention of latent diffusion: transformer layers over the positions of a feature map that
read the tokens of a caption (Rombach et al. 2022, arXiv 2112.10752, section 3.3).

    h  = proj_in(norm2(x))
    h += proj(attention(qkv(norm0(h))))                         every layer, self-attention
    h += text_proj(attention(text_q(norm1(h)), text_kv(tokens)))           cross-attention
    h += fc1(a * gelu(g)),  a, g = fc0(norm2(h))                                     GEGLU
    x' = x + proj_out(h)
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cheapscale.models import layers
from cheapscale.models.plan import Block
from cheapscale.models.text import TextFeatures

NORM_EPS = 1e-6  # of the group norm; the residual blocks have 1e-5
WIDER = 4  # inner width of the linear maps, in widths of the stream
zeros = nn.initializers.zeros


def entropy_scale(block: Block, positions: int) -> float:
    """sqrt(log N / log N_native), which sharpens the logits of attention over more positions (Jin
    et al. 2023, arXiv 2306.08645)."""
    return math.sqrt(math.log(positions) / math.log(block.resolution**2))


class Transformer(nn.Module):
    """x [b, h, w, c], tokens -> the change of x by `block.depth` layers, in x's shape."""

    block: Block
    kernel_init: tuple[float, str]
    entropy_scaling: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, text: TextFeatures) -> jax.Array:
        block, (b, height, width, c) = self.block, x.shape
        dense = functools.partial(layers.Dense, kernel_init=layers.uniform(*self.kernel_init))
        scale = 1.0
        if self.entropy_scaling and block.resolution > 1:
            scale = entropy_scale(block, height * width)
        h = layers.GroupNorm(block.groups2, NORM_EPS, name="norm2")(x).reshape(b, -1, c)
        h = dense(c, name="proj_in")(h)
        tokens = text.tokens.astype(x.dtype)
        bias = jnp.where(text.mask[:, None, None, :], 0.0, -1e9)
        for i in range(block.depth):
            h = Layer(block, self.kernel_init, scale, name=f"layer{i}")(h, tokens, bias)
        h = dense(c, kernel_init=zeros, name="proj_out")(h)
        return h.reshape(b, height, width, c)


class Layer(nn.Module):
    """One layer. h [b, n, c], tokens [b, m, text], bias of the logits of tokens -> like h."""

    block: Block
    kernel_init: tuple[float, str]
    scale: float  # of the queries of self-attention

    @nn.compact
    def __call__(self, h: jax.Array, tokens: jax.Array, bias: jax.Array) -> jax.Array:
        heads, c = self.block.heads, h.shape[-1]
        dense = functools.partial(layers.Dense, kernel_init=layers.uniform(*self.kernel_init))
        linear = functools.partial(dense, use_bias=False)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=h.dtype, use_fast_variance=False)

        q, k, v = jnp.split(linear(3 * c, name="qkv")(norm(name="norm0")(h)), 3, axis=-1)
        h = h + dense(c, name="proj")(layers.attention(q * self.scale, k, v, heads))

        q = linear(c, name="text_q")(norm(name="norm1")(h))
        k, v = jnp.split(linear(2 * c, name="text_kv")(tokens), 2, axis=-1)
        h = h + dense(c, name="text_proj")(layers.attention(q, k, v, heads, bias))

        a, g = jnp.split(dense(2 * WIDER * c, name="fc0")(norm(name="norm2")(h)), 2, axis=-1)
        return h + dense(c, name="fc1")(a * nn.gelu(g, approximate=False))
