"""Corruptions against closed forms, and the verdict on metrics whose order is known."""

import numpy as np
import pytest

from cheapscale.data.resize import area_mean
from cheapscale.evaluation.corruptions import (
    FALLS,
    MUST,
    RISES,
    blurred,
    judge,
    noised,
    of_classes,
)
from cheapscale.evaluation.coverage import prdc
from cheapscale.evaluation.fid import classifier_score, frechet_distance, kernel_distance
from cheapscale.evaluation.memorisation import nearest_features

GREY = np.full((20, 16, 16, 3), 128, np.uint8)


def pictures(n, seed, side=16):
    """Random colours in 4 x 4 fields with fine texture on top: detail at every scale."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 40, (n, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    fine = rng.normal(0, 10, (n, side, side, 3))
    return np.rint(128 + coarse + fine).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_noise_has_the_stated_deviation_and_no_mean(sigma):
    difference = noised(GREY, sigma, np.random.default_rng(0)).astype(float) - 128
    expected = np.sqrt((127.5 * sigma) ** 2 + 1 / 12)  # rounding to levels adds its own
    np.testing.assert_allclose(difference.std(), expected, rtol=0.02)
    assert abs(difference.mean()) < 4 * expected / difference.size**0.5
    # white: neighbouring pixels and channels have nothing in common
    across, along = difference[..., :-1, :] * difference[..., 1:, :], difference.prod(-1)
    assert abs(across.mean()) < 0.05 * expected**2 and abs(along.mean()) < 0.1 * expected**3


def test_noise_is_its_seeds_and_none_changes_nothing():
    images = pictures(4, 0)
    first, again, other = (noised(images, 0.1, np.random.default_rng(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(noised(images, 0, np.random.default_rng(0)), images)


@pytest.mark.parametrize("through", [8, 4, 2])
def test_a_blurred_image_is_a_function_of_the_smaller_one(through):
    images = pictures(6, 1)
    k = 16 // through
    # turning every k x k block by half a turn moves pixels but no block's mean
    blocks = images.reshape(6, through, k, through, k, 3)
    moved = blocks[:, :, ::-1, :, ::-1].reshape(images.shape)
    assert (moved != images).any()
    np.testing.assert_array_equal(blurred(images, through), blurred(moved, through))


def test_blur_keeps_what_the_smaller_image_can_show_and_drops_the_rest():
    np.testing.assert_array_equal(blurred(GREY, 4), GREY)
    images = pictures(3, 2)
    np.testing.assert_array_equal(blurred(images, 16), images)
    ramp = np.broadcast_to(np.arange(20, 212, 3, np.uint8)[:64, None, None], (1, 64, 64, 3))
    kept = blurred(ramp, 32).astype(float) - ramp  # away from the edge; half a level of rounding
    assert np.abs(kept[:, 6:-6]).max() <= 1
    board = np.indices((16, 16)).sum(0) % 2 * 200
    board = np.broadcast_to(board[None, :, :, None], (1, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(blurred(board, 8), 100)


def test_block_means_survive_a_blur():
    """An enlargement that shifted or darkened would show in the means of large blocks."""
    images = pictures(10, 3, side=32)
    before, after = (area_mean(x.astype(np.float32), 4) for x in (images, blurred(images, 16)))
    assert abs((after - before).mean()) < 0.5 and np.abs(after - before).max() < 10


def test_dropped_modes_keep_their_number_and_the_others_classes():
    labels = np.random.default_rng(0).choice(5, 2000, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    rows = of_classes(labels, [0, 2, 4], 900, np.random.default_rng(1))
    assert len(rows) == len(set(rows)) == 900
    shares = np.bincount(labels[rows], minlength=5) / 900
    np.testing.assert_allclose(shares, [2 / 3, 0, 1 / 6, 0, 1 / 6], atol=0.03)
    with pytest.raises(ValueError, match=r"classes \[3, 4\] have .* of 2000 images but 900"):
        of_classes(labels, [4, 3], 900, np.random.default_rng(1))


@pytest.fixture(scope="module")
def read():
    """{corruption: {metric: its values, of real images first}} of one invented data set.

    Four classes, each a pattern with detail at 2, 4 and 8 px and an image its pattern with noise.
    Features are linear in the pixels: the classes are four far clusters, which a blur draws to one
    point and noise blows up. Logits are the cosines with the four patterns, which both lower.
    """
    rng, made = np.random.default_rng(0), 150
    patterns = sum(
        rng.choice([-30, 30], (4, s, s, 3)).repeat(8 // s, 1).repeat(8 // s, 2) for s in (2, 4, 8)
    )
    projection = rng.normal(size=(8 * 8 * 3, 24)) / 400

    def like(labels):
        noise = rng.normal(0, 12, (len(labels), 8, 8, 3))
        return np.rint(128 + patterns[labels] + noise).clip(0, 255).astype(np.uint8)

    labels = np.arange(8 * made) % 4
    known, pool = like(labels[:made]), like(labels)
    real, reference = pool[:made], (known.reshape(made, -1) - 128.0) @ projection

    def values(images):
        pixels, flat = images.reshape(len(images), -1) - 128.0, patterns.reshape(4, -1)
        lengths = (np.linalg.norm(x, axis=1) for x in (pixels, flat))
        cosine = pixels @ flat.T / np.multiply.outer(*lengths)
        features = pixels @ projection
        return prdc(reference, features, ks=(3,))[3]._asdict() | {
            "fd": frechet_distance(features, reference),
            "kid": kernel_distance(features, reference),
            "score": classifier_score(6 * cosine),
            "memorisation": nearest_features(features, reference).distance.mean(),
        }

    def copied(num):
        return np.concatenate([known[:num], real[num:]])

    chains = {
        "blur": [blurred(real, through) for through in (4, 2)],
        "noise": [noised(real, sigma, rng) for sigma in (0.2, 0.4, 0.8)],
        "modes": [pool[of_classes(labels, range(kept), made, rng)] for kept in (3, 2, 1)],
        "copies": [copied(num) for num in (15, 75, 150)],
    }
    found = {}
    for corruption, chain in chains.items():
        rows = [values(images) for images in (real, *chain)]
        found[corruption] = {metric: [row[metric] for row in rows] for metric in rows[0]}
    return found


NOTICES = {
    "fd": ("blur", "noise", "modes"),
    "kid": ("blur", "noise", "modes"),
    "score": ("blur", "noise", "modes"),
    "precision": ("blur", "noise"),
    "density": ("blur", "noise"),
    "recall": ("modes",),
    "coverage": ("blur", "noise", "modes"),
    "memorisation": ("copies",),
}


@pytest.mark.parametrize("metric", NOTICES)
def test_each_metric_goes_the_way_that_it_must(metric, read):
    assert set(MUST[metric]) == set(NOTICES[metric]) and set(MUST) == set(NOTICES)
    for corruption, direction in MUST[metric].items():
        values = np.array(read[corruption][metric])[:, None]
        assert judge(values, direction) == (True, True, 1), (corruption, values)
        assert judge(values, -direction) == (False, False, 0)


def test_the_verdict_says_what_is_out_of_order():
    ordered = np.array([[1, 1], [2, 3], [4, 5]])
    assert judge(ordered, RISES) == (True, True, 2)
    assert judge(ordered, FALLS) == (False, False, 0)
    # one draw disagrees, the mean does not; then two strengths change places
    assert judge(np.array([[1, 1], [2, 6], [9, 5]]), RISES) == (True, True, 1)
    assert judge(np.array([[1, 1], [4, 4], [3, 3]]), RISES) == (False, True, 0)
    # a share of images that is 0 cannot fall further; one that stays at 0.5 has noticed nothing
    assert judge(np.array([[0.9], [0.0], [0.0]]), FALLS) == (True, True, 1)
    assert judge(np.array([[0.9], [0.5], [0.5]]), FALLS) == (False, True, 0)


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="take uint8"):
        blurred(GREY.astype(np.float32), 8)
    with pytest.raises(ValueError, match="multiple of 5"):
        blurred(GREY, 5)
    with pytest.raises(ValueError, match="sigma is -1"):
        noised(GREY, -1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="strengths"):
        judge(np.zeros(3), RISES)
