"""How many separate things a picture shows: a count that blur and wrong colours do not change.

The reader of scenes names every object and takes two colours for two objects, which a small model
mixes; here a thing is whatever stands out from the ground in one piece.
"""

import numpy as np
from scipy import ndimage

CONTRAST = 0.2  # distance from the ground's colour, [-1, 1] units, root mean square of the channels
LEAST = 0.012  # of the picture's area: smaller pieces are specks


def count_objects(images: np.ndarray) -> np.ndarray:
    """int [n] of float images [n, h, w, c] in [-1, 1].

    The ground is the median colour of the border. Pieces touch along sides or corners.
    """
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    ground = np.median(border, axis=1)[:, None, None, :]
    distance = np.sqrt(np.mean((images - ground) ** 2, axis=-1))
    least = LEAST * images.shape[1] * images.shape[2]
    counts = []
    for foreground in distance > CONTRAST:
        pieces, number = ndimage.label(foreground, structure=np.ones((3, 3)))
        areas = np.bincount(pieces.ravel(), minlength=number + 1)[1:]
        counts.append(int(np.sum(areas >= least)))
    return np.array(counts, int)
