"""How well images fit their captions: the CLIP score, 100 max(cos, 0) (Hessel et al. 2021)."""

import numpy as np

from cheapscale.evaluation.fid import check_features


def clip_scores(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """The score of each image [n, d] with its own caption [n, d]: float64 [n] in 0..100."""
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
