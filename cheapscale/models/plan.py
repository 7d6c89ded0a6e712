"""A U-Net as plain values: `UNetConfig`, and the ordered blocks that `plan(config)` derives.

Both the linen module (unet.py) and the pruner, which slices channels, read the plan, so that they
cannot diverge. ADM, DDPM++ and NCSN++ (Dhariwal & Nichol 2021; Song et al. 2021, in the form of
Karras et al. 2022, arXiv 2206.00364, Table 7), DDPM (Ho et al. 2020) and latent diffusion, which is
Stable Diffusion's (Rombach et al. 2022, arXiv 2112.10752), differ only in the constants of
`FAMILIES`; Stable Diffusion's attention is a stack of transformer layers (`depths`).

Growth (PaGoDA, arXiv 2405.14822, section 3.3) appends an up-block and two blocks to the decoder for
every doubling. They have no attention, encoder skip or residual scaling, and the embedding is added
to them. The up-block comes first, as in the published code.

A block's name contains the side in pixels of its output at the native resolution: "enc_16_conv",
"enc_16_block0", "enc_8_down", "dec_8_in0", "dec_16_up", "grow_32_up", "head". These names are the
top level of the parameters; the network itself runs at every multiple of its stride.
"""

import dataclasses
import functools
from typing import NamedTuple

from cheapscale.models.text import TextConfig


class Family(NamedTuple):
    embedding: str  # cos_sin | sin_cos (swapped halves, frequencies with endpoint) | fourier
    noise_feature: str  # default of UNetConfig.noise_feature
    noise_width: int  # width of the embedding's input / channels
    label_late: bool  # label joins after the mapping layers, without bias (ADM), or before
    eps: float
    scale_shift: bool
    residual_scale: float
    resample_conv: bool  # a 1x1 convolution on the identity path wherever the size changes
    attend_all: bool  # attention in every decoder block of a level, or in its last one only
    taps: tuple[int, ...]  # resampling filter
    encoder_aux: bool  # NCSN++'s residual encoder
    init: tuple[float, str]  # variance scale and fan of kernels
    # Levels are joined by a 3x3 convolution of this padding before and after, not by a block.
    down_padding: tuple[int, int] = ()


FAMILIES = {
    "adm": Family(
        "cos_sin", "openai", 1, True, 1e-5, True, 1.0, False, True, (1, 1), False, (1 / 3, "fan_in")
    ),
    "ddpmpp": Family(
        "sin_cos", "edm", 1, False, 1e-6, False, 0.5**0.5, True, False, (1, 1), False,
        (1.0, "fan_avg"),
    ),
    "ncsnpp": Family(
        "fourier", "edm", 2, False, 1e-6, False, 0.5**0.5, True, False, (1, 3, 3, 1), True,
        (1.0, "fan_avg"),
    ),
    "ddpm": Family(
        "sin_cos", "openai", 1, True, 1e-6, False, 1.0, False, True, (1, 1), False,
        (1 / 3, "fan_in"), (0, 1),
    ),
    "latent": Family(
        "cos_sin", "openai", 1, True, 1e-5, False, 1.0, False, True, (1, 1), False,
        (1 / 3, "fan_in"), (1, 1),
    ),
}  # fmt: skip


WHOLE_TUPLES = ("channel_mult", "attention", "growth", "depths", "sizes")
DTYPES = ("float32", "bfloat16", "float16")
SIZES = 6  # numbers of SDXL's micro-conditioning: height, width, top, left, height, width


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Plain values that determine a U-Net and the names and shapes of its parameters.

    resolution: native side in pixels; a grown generator's is the side of its latent.
    channels, channel_mult, num_blocks: width of the first level, multiples, blocks per level.
    attention: native sides at which blocks attend. head_dim: channels of a head, 0 for one head.
    heads: number of heads at every width, in place of head_dim; 0 = by head_dim.
    depths: number of transformer layers where a level's blocks attend, for each level (the
      bottleneck has the last); they read the tokens of `text`. () = plain attention.
    num_classes: 0 = no label (a label passed is then ignored).
    augment_dim: width of the augmentation label (9 for EDM's), 0 = none.
    extra_conditions: number of scalar conditions. caption_dim: width of a caption embedding.
    text: the encoder of the captions whose tokens every attending block reads by cross-attention;
      the label is then the row of a caption's token numbers. None = no text.
    sizes: (width, pixels): the embedding takes the size of the canvas and the captions' pooled
      vector (SDXL); `width` sinusoids of each of six numbers in pixels, of which a position of x
      has `pixels` per side. () = neither.
    encoder: only the encoder, whose pooled features give out_channels numbers.
    groups, group_size: a norm of c channels has min(groups, c // group_size) groups.
    growth: width of every doubling appended to the decoder; () is the plain U-Net.
    overrides: (block, field of Block, value) entries that replace a number of the plan. Groups,
      heads and shortcuts are derived from the widths before the overrides.
    noise_feature: how sigma becomes the network's noise input, "edm" or "openai"; "" = family's.
    dtype: precision of the computation; parameters are float32.
    remat: prefixes of the names of blocks recomputed in the backward pass; ("",) means all.
    dilation, dilated: spacing of the taps of the 3x3 convolutions in the residual blocks whose
      names start with one of `dilated`. entropy_scaling: scale the queries of attention over more
      positions than the native ones by sqrt(log N / log N_native). Both change what the same
      weights compute on a larger canvas (baselines of the self-cascade).
    """

    resolution: int
    channels: int
    channel_mult: tuple[int, ...] = (1, 2)
    num_blocks: int = 1
    attention: tuple[int, ...] = ()
    family: str = "adm"
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    augment_dim: int = 0
    extra_conditions: int = 0
    caption_dim: int = 0
    text: TextConfig | None = None
    encoder: bool = False
    head_dim: int = 64
    heads: int = 0
    depths: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    embedding_mult: int = 4
    groups: int = 32
    group_size: int = 4
    dropout: float = 0.0
    growth: tuple[int, ...] = ()
    growth_blocks: int = 2
    overrides: tuple[tuple[str, str, int], ...] = ()
    noise_feature: str = ""
    dtype: str = "float32"
    remat: tuple[str, ...] = ()
    dilation: int = 1
    dilated: tuple[str, ...] = ()
    entropy_scaling: bool = False

    def __post_init__(self):
        self._check_values()
        if not self.noise_feature:
            object.__setattr__(self, "noise_feature", FAMILIES[self.family].noise_feature)
        if self.resolution % self.stride:
            raise ValueError(
                f"model.resolution {self.resolution} is not a multiple of the stride {self.stride} "
                f"of {len(self.channel_mult)} levels: use fewer levels or another resolution"
            )
        if self.text and self.num_classes:
            raise ValueError(
                f"the model has model.num_classes {self.num_classes} and captions: its label is "
                "one of the two, so give --config.model.num_classes=0"
            )
        if self.depths and not (self.text and len(self.depths) == len(self.channel_mult)):
            raise ValueError(
                f"model.depths is {self.depths}: it needs model.text and a number for each of the "
                f"{len(self.channel_mult)} levels"
            )
        if self.sizes and not (self.text and len(self.sizes) == 2):
            raise ValueError(
                f"model.sizes is {self.sizes}: it needs model.text, and two numbers, as (256, 8)"
            )
        sides = [self.resolution >> level for level in range(len(self.channel_mult))]
        absent = [side for side in self.attention if side not in sides]
        if absent:
            raise ValueError(
                f"model.attention names {absent}, but the levels have sides {sides}: "
                "name sides of levels at the native resolution"
            )

    def _check_values(self) -> None:
        """Raise ValueError for a field of another type, or out of its range."""
        known = {
            "family": tuple(FAMILIES), "noise_feature": ("", "openai", "edm"),
            "dtype": DTYPES,
        }  # fmt: skip
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            whole = (value,) if field.type is int else ()
            if name in WHOLE_TUPLES:
                whole = value if isinstance(value, tuple) else (None,)
            low = 0 if field.default == 0 or name == "head_dim" else 1  # 0: one head
            if any(type(n) is not int or not low <= n <= 2**20 for n in whole):
                raise ValueError(
                    f"model.{name} is {value!r}: give whole numbers from {low} to {2**20}"
                )
            if value not in known.get(name, (value,)):
                raise ValueError(f"model.{name} is {value!r}: choose one of {known[name]}")
        if not self.channel_mult:
            raise ValueError("model.channel_mult is (): give a multiple for each level, as (1, 2)")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout!r}: give a probability below 1")

    @property
    def stride(self) -> int:
        """Ratio of the finest to the coarsest side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def output_resolution(self) -> int:
        return self.resolution * 2 ** len(self.growth)


@dataclasses.dataclass(frozen=True)
class Block:
    """One entry of the plan. Fields that a kind does not use are 0, "" or False.

    kind: map (embedding), conv_in, res, resample (a convolution that changes the size), aux
      (NCSN++'s image branch), head, pool (an encoder's end).
    resolution: native side of the output. in_channels counts the channels from `pop` too.
    pop: the block whose kept output is concatenated to the stream. push: the output is kept for
      the decoder. inner: width between the two convolutions. emb: width of the embedding it reads.
    heads: 0 = no attention; qk, v: summed widths of the heads' queries (= keys) and of the values.
    depth: number of transformer layers that attend, 0 = plain attention.
    text, text_tokens: width and number of the tokens that cross-attention reads, 0 = none; it has
      as many heads as self-attention.
    groups0, groups1, groups2: norms before conv0, before conv1, before qkv and text_q.
    shortcut: the identity path has a 1x1 convolution.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    resolution: int = 0
    pop: str = ""
    push: bool = False
    resample: str = ""
    taps: tuple[int, ...] = (1, 1)
    inner: int = 0
    emb: int = 0
    scale_shift: bool = False
    residual_scale: float = 1.0
    shortcut: bool = False
    heads: int = 0
    depth: int = 0
    qk: int = 0
    v: int = 0
    text: int = 0
    text_tokens: int = 0
    groups0: int = 0
    groups1: int = 0
    groups2: int = 0
    eps: float = 1e-5


OVERRIDABLE = ("out_channels", "inner", "heads", "qk", "v", "groups0", "groups1", "groups2")


def num_heads(config: UNetConfig, width: int) -> int:
    """Number of heads of attention over `width` channels."""
    return config.heads or (max(1, width // config.head_dim) if config.head_dim else 1)


@functools.lru_cache(maxsize=64)
def plan(config: UNetConfig) -> tuple[Block, ...]:
    """The blocks in the order in which they run, overrides applied and input widths propagated.

    Raises ValueError where an override names no block or no field, or where widths do not fit.
    """
    layout = _layout(config)
    changes = _changes(config, {block.name for block in layout})
    stream, emb, aux = 0, 0, config.in_channels
    kept, blocks = {"": 0}, []  # widths of what the decoder concatenates
    for block in layout:
        block = dataclasses.replace(block, **changes.get(block.name, {}))
        if block.kind == "map":
            block = _chain_map(block, {b.name: b for b in blocks})
            emb = block.out_channels if block.name == "map_layer1" else emb
            blocks.append(block)
            continue
        if block.kind == "aux":
            block = dataclasses.replace(block, in_channels=aux, out_channels=stream)
            aux = stream
        elif block.kind == "resample":
            block = dataclasses.replace(block, in_channels=stream)
        elif block.kind in ("res", "head"):
            width = stream + kept[block.pop]
            block = dataclasses.replace(block, in_channels=width, emb=emb if block.emb else 0)
            _check_widths(block)
        stream = block.out_channels
        if block.push:
            kept[block.name] = stream
        blocks.append(block)
    return tuple(blocks)


def _layout(config: UNetConfig) -> list[Block]:
    """The plan before overrides."""
    family = FAMILIES[config.family]
    emb = config.channels * config.embedding_mult
    blocks = _maps(config, family, emb)

    def groups(width):
        return max(1, min(config.groups, width // config.group_size))

    def res(name, side, stream, out, *, skip=("", 0), attend=0, grown=False, **fields):
        # attend: 0, or 1 plus the number of transformer layers
        width = stream + skip[1]
        resample = fields.get("resample", "")
        if resample and family.down_padding and not grown:
            return Block(name, "resample", stream, out, side, **fields)
        heads = num_heads(config, out) if attend else 0
        return Block(
            name, "res", width, out, side, pop=skip[0], inner=out, emb=emb,
            taps=(1, 1) if grown else family.taps,
            scale_shift=family.scale_shift and not grown,
            residual_scale=1.0 if grown else family.residual_scale,
            shortcut=width != out or (bool(resample) and family.resample_conv and not grown),
            heads=heads, qk=out if heads else 0, v=out if heads else 0, depth=max(attend - 1, 0),
            text=config.text.token_width if heads and config.text else 0,
            text_tokens=config.text.length if heads and config.text else 0,
            groups0=groups(width), groups1=groups(out), groups2=groups(out) if heads else 0,
            eps=family.eps, **fields,
        )  # fmt: skip

    depths = [1 + depth for depth in config.depths] or [1] * len(config.channel_mult)
    stream, aux, skips = config.channels, config.in_channels, []
    for level, mult in enumerate(config.channel_mult):
        side = config.resolution >> level
        if level == 0:
            name = f"enc_{side}_conv"
            blocks.append(Block(name, "conv_in", config.in_channels, stream, side, push=True))
        else:
            name, keep = f"enc_{side}_down", not family.encoder_aux
            blocks.append(res(name, side, stream, stream, resample="down", push=keep))
            if family.encoder_aux:
                name = f"enc_{side}_aux"
                blocks.append(Block(name, "aux", aux, stream, side, push=True, taps=family.taps))
                aux = stream
        skips.append((name, stream))
        for i in range(config.num_blocks):
            name, out = f"enc_{side}_block{i}", config.channels * mult
            attend = depths[level] if side in config.attention else 0
            blocks.append(res(name, side, stream, out, attend=attend, push=True))
            stream = out
            skips.append((name, stream))

    if config.encoder:
        out, groups0 = config.out_channels, groups(stream)
        return [*blocks, Block("pool", "pool", stream, out, groups0=groups0, eps=family.eps)]
    blocks += [
        res(f"dec_{side}_in0", side, stream, stream, attend=depths[-1]),
        res(f"dec_{side}_in1", side, stream, stream),
    ]
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        side = config.resolution >> level
        if side != blocks[-1].resolution:
            blocks.append(res(f"dec_{side}_up", side, stream, stream, resample="up"))
        for i in range(config.num_blocks + 1):
            out = config.channels * mult
            last = i == config.num_blocks
            attends = side in config.attention and (last or family.attend_all)
            attend = depths[level] if attends else 0
            name = f"dec_{side}_block{i}"
            blocks.append(res(name, side, stream, out, skip=skips.pop(), attend=attend))
            stream = out

    for out in config.growth:
        side *= 2
        blocks.append(res(f"grow_{side}_up", side, stream, out, grown=True, resample="up"))
        for i in range(config.growth_blocks):
            blocks.append(res(f"grow_{side}_block{i}", side, out, out, grown=True))
        stream = out
    head = Block(
        "head", "head", stream, config.out_channels, side, groups0=groups(stream), eps=family.eps
    )
    return [*blocks, head]


def _maps(config: UNetConfig, family: Family, emb: int) -> list[Block]:
    """The blocks of the embedding, equation (4) of unet.py: one or two maps for each condition."""
    noise = config.channels * family.noise_width
    maps = []
    if family.embedding == "fourier":
        maps.append(Block("map_noise", "map", 1, noise))
    if config.augment_dim:
        maps.append(Block("map_augment", "map", config.augment_dim, noise))
    maps += [Block("map_layer0", "map", noise, emb), Block("map_layer1", "map", emb, emb)]
    if config.num_classes:
        out = emb if family.label_late else noise
        maps.append(Block("map_label", "map", config.num_classes, out))
    if config.extra_conditions:
        features = config.extra_conditions * config.channels
        maps.append(Block("map_extra0", "map", features, emb))
        maps.append(Block("map_extra1", "map", emb, emb))
    if config.caption_dim:
        maps.append(Block("map_caption", "map", config.caption_dim, emb))
    if config.sizes:
        width = config.text.pooled_width + SIZES * config.sizes[0]
        maps += [Block("map_added0", "map", width, emb), Block("map_added1", "map", emb, emb)]
    return maps


def _chain_map(block: Block, done: dict[str, Block]) -> Block:
    """The map with the input and output widths that follow from overrides of the mapping layers."""
    layer0, layer1 = done.get("map_layer0"), done.get("map_layer1")
    if block.name == "map_layer1":
        return dataclasses.replace(block, in_channels=layer0.out_channels)
    late = block.name in ("map_extra1", "map_caption", "map_added1") or (
        block.name == "map_label" and block.out_channels != layer0.in_channels
    )
    return dataclasses.replace(block, out_channels=layer1.out_channels) if late else block


def _changes(config: UNetConfig, names: set[str]) -> dict[str, dict[str, int]]:
    """The overrides by block: {name: {field: value}}."""
    changes: dict[str, dict[str, int]] = {}
    for name, field, value in config.overrides:
        if name not in names:
            raise ValueError(
                f"model.overrides names the block {name!r}, which the plan lacks: name one of "
                f"{', '.join(sorted(names))}"
            )
        allowed = ("out_channels",) if name.startswith("map_") else OVERRIDABLE
        fixed = name == "head" and field == "out_channels"
        if field not in allowed or fixed or value < 1:
            raise ValueError(
                f"model.overrides sets {field} = {value} of {name!r}: "
                f"give a positive value to one of {', '.join(allowed)}"
            )
        changes.setdefault(name, {})[field] = value
    return changes


def _check_widths(block: Block) -> None:
    """Refuse a block if its groups or heads do not divide its widths, or if its two paths differ
    in width and it has no shortcut."""
    pairs = [("groups0", block.in_channels)]
    if block.kind == "res":
        pairs.append(("groups1", block.inner))
        if not block.shortcut and block.in_channels != block.out_channels:
            raise ValueError(
                f"block {block.name!r} adds {block.in_channels} to {block.out_channels} channels "
                "and has no shortcut: give the two the same width in model.overrides"
            )
    if block.heads:
        pairs += [("groups2", block.out_channels), ("heads", block.qk), ("heads", block.v)]
    for field, width in pairs:
        if width % getattr(block, field):
            raise ValueError(
                f"block {block.name!r} splits {width} channels into {field} = "
                f"{getattr(block, field)}, which does not divide them: change model.channels, "
                "group_size or overrides"
            )
