"""Alignment of images with their captions by the CLIP score (Hessel et al. 2021, arXiv 2104.08718),
in the scale that is usually reported: 100 max(cos(image, text), 0)."""

import numpy as np

from cheapscale.evaluation.fid import check_features


def clip_scores(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """The CLIP score of each image, float64 [n] in 0..100.

    image_features, text_features: [n, d], row i of the texts for row i of the images.
    """
    check_features(image_features, "image features")
    check_features(text_features, "text features")
    images, texts = (
        np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (image_features, text_features)
    )
    return 100 * np.maximum(np.einsum("nd,nd->n", images, texts), 0)
