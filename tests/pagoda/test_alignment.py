"""CLIP regularisation: the angle between images and captions, and which networks may judge it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.sources import SceneSource
from cheapscale.data.tokens import train_vocabulary
from cheapscale.pagoda.alignment import make_aligner, squared_angle
from configs import fields


def test_the_squared_angle_is_arccos_squared_with_finite_slopes():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 50, 8)).astype("f")
    cosine = np.sum(u * v, 1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    np.testing.assert_allclose(squared_angle(u, v), np.arccos(cosine) ** 2, rtol=1e-4)
    equal = squared_angle(u, 2 * u)
    np.testing.assert_allclose(equal, 0, atol=1e-5)
    for other in (u, -u):
        slope = jax.grad(lambda x, other=other: squared_angle(x, other).sum())(jnp.asarray(u))
        assert np.all(np.isfinite(slope))


def test_the_aligner_reads_the_generators_tokens_or_is_refused():
    source, settings = (
        SceneSource("train", 8, size=8),
        fields.defaults("distill").features.to_dict(),
    )
    vocabulary = train_vocabulary([source.caption(0)], 300)
    text = {"kind": "transformer", "tokenizer": vocabulary, "length": 9}
    aligner = make_aligner(settings, source, text)
    network = aligner.planned.network
    assert network.name == "loss_contrastive_8px" and aligner.planned.recipe
    x, ids = jax.ShapeDtypeStruct((3, 8, 8, 3), "f"), jax.ShapeDtypeStruct((3, 9), "i")
    assert jax.eval_shape(aligner.distance, network.params, x, ids).shape == (3,)
    with pytest.raises(ValueError, match="alignment_weight=0"):
        make_aligner(settings, source, None)
    with pytest.raises(ValueError, match="aligner=contrastive"):
        make_aligner(settings | {"aligner": "clip_vitb32"}, source, text)
