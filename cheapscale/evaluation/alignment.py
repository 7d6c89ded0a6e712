"""Alignment of images with their captions by the CLIP score (Hessel et al. 2021, arXiv 2104.08718),
in the scale that is usually reported: 100 max(cos(image, text), 0)."""

import numpy as np

from cheapscale.evaluation.fid import check_features


def clip_scores(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """The CLIP score of each image, float64 [n] in 0..100.

    image_features, text_features: [n, d], row i of the texts for row i of the images.
    """
    images = np.asarray(image_features, np.float64)
    texts = np.asarray(text_features, np.float64)
    if images.shape != texts.shape:
        raise ValueError(
            f"image features are {images.shape}, text features {texts.shape}: give one caption to "
            "each image, both through the towers of one CLIP model"
        )
    for features, name in ((images, "image features"), (texts, "text features")):
        check_features(features, name)
        lengths = np.linalg.norm(features, axis=1)
        if not lengths.all():
            raise ValueError(f"row {int(np.argmin(lengths))} of the {name} is all zeros")
    cosine = np.einsum("nd,nd->n", images, texts)
    cosine /= np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return 100 * np.maximum(cosine, 0)
