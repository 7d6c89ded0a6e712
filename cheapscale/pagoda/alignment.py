"""The regularisation of a generator of captions by a frozen image-text network (PaGoDA, Kim et al.
2024, arXiv 2405.14822, appendix C). The paper states neither form nor weight; the form is that of
StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515).

    L_clip = E arccos(cos(image, text))^2        of fakes, added to G's part of L_adv

The network is CLIP from a file, where the generator reads captions by CLIP's text encoder and hence
by its tokens, or a small one that is fitted on the captions (features.contrastive). Another seed of
the latter evaluates: launch.evaluate --clip=contrastive.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cheapscale import features
from cheapscale.features import clip
from cheapscale.features.contrastive import lazy_contrastive, text_features
from cheapscale.features.fitted import LazyClassifier

PyTree = Any


class Aligner(NamedTuple):
    """planned: the network, which may have to be fitted. text: the function (params, token numbers
    [b, n]) -> [b, d] of its text tower."""

    planned: LazyClassifier
    text: Callable[[PyTree, jax.Array], jax.Array]

    def distance(self, params: PyTree, x: jax.Array, ids: jax.Array) -> jax.Array:
        """arccos(cos)^2 of the embeddings of images x [b, h, w, 3] and captions ids [b, n]: [b]."""
        return squared_angle(
            self.planned.network.outputs(params, x)["features"], self.text(params, ids)
        )


def squared_angle(u: jax.Array, v: jax.Array) -> jax.Array:
    """The squared angle between the rows of u and v [b, d], in radians: [b]."""
    u, v = (e / jnp.linalg.norm(e, axis=1, keepdims=True) for e in (u, v))
    # arccos has an infinite slope at 1, which 2 arcsin(|u - v| / 2) has not; its square is smooth.
    half = jnp.sqrt(jnp.sum((u - v) ** 2, axis=1) + 1e-12) / 2
    return (2 * jnp.arcsin(jnp.minimum(half, 1 - 1e-6))) ** 2


def make_aligner(settings: dict, source: Any, text: dict | None) -> Aligner:
    """The Aligner that `settings`, config.features, names for a generator with the encoder `text`.

    Raises ValueError for a generator without captions, and for CLIP where its tokens are others.
    """
    name = settings["aligner"]
    if not text:
        raise ValueError(
            "alignment_weight is for generators of captions, and this one has none: set "
            "--config.distill.alignment_weight=0"
        )
    if name == "contrastive":
        steps = {"steps": settings["fit_steps"]} if settings["fit_steps"] else {}
        planned = lazy_contrastive(
            source, text["tokenizer"], text["length"], purpose="loss", **steps
        )
        return Aligner(planned, text_features(text["tokenizer"], text["length"]))
    if not name.startswith("clip") or text["kind"] != "clip":
        raise ValueError(
            f"features.aligner is {name} and the generator's text encoder {text['kind']}: give "
            "--config.features.aligner=contrastive, or a CLIP for a generator with the encoder clip"
        )
    network = features.load(
        name, settings["paths"].get(name) or None, sha256=settings["sha256"].get(name) or None
    )
    return Aligner(LazyClassifier(network, "", lambda: network), clip.text_features)
