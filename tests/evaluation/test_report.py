"""The report's numbers on images whose values are known."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.data.resize import area_mean
from cheapscale.evaluation import detail, report, report_rows
from cheapscale.evaluation.fid import kernel_distance
from cheapscale.evaluation.patches import crop_corners
from cheapscale.evaluation.report_rows import Row
from cheapscale.features import FeatureNetwork
from cheapscale.teacher import load
from cheapscale.training.log import enlarge
from configs import scenes
from launch.pipeline import stage_configs

RNG = np.random.default_rng(0)


def test_one_patch_an_image_gives_the_unbiased_kernel_distance():
    x, y = RNG.normal(size=(30, 5)), RNG.normal(0.5, 1, size=(40, 5))
    found = detail.patch_distance(x[:, None], y[:, None])
    assert found.value == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert found.value == pytest.approx(found.u.mean() + found.v.mean())


def test_pairs_of_patches_of_one_image_are_left_out():
    """All patches of an image are equal here, so crops add nothing to one crop an image."""
    x, y = RNG.normal(size=(30, 1, 5)), RNG.normal(size=(20, 1, 5))
    one = detail.patch_distance(x, y)
    many = detail.patch_distance(x.repeat(3, axis=1), y.repeat(2, axis=1))
    assert many.value == pytest.approx(one.value, rel=1e-9)
    np.testing.assert_allclose(many.u, one.u, rtol=1e-9)


def test_intervals_cover_the_truth_and_ratios_gain_from_common_noise():
    """E k is known for a Gaussian in one dimension: with y = 0, k(x, y) = 1 and
    k(x, x') = (x x' + 1)^3, whose mean is 1 + 3 mu^2 + 3 (mu^2 + s^2)^2 + (mu^3 + 3 mu s^2)^2."""
    mu, s = 1.0, 0.3
    truth = 3 * mu**2 + 3 * (mu**2 + s**2) ** 2 + (mu**3 + 3 * mu * s**2) ** 2
    zeros, hits = np.zeros((50, 1, 1)), []
    for seed in range(200):
        x = np.random.default_rng(seed).normal(mu, s, (50, 1, 1))
        found = detail.patch_distance(x, zeros)
        hits.append(abs(found.value - truth) < found.interval)
    assert 0.9 < np.mean(hits) < 0.99
    ratio, interval = detail.ratio(detail.patch_distance(0.9 * x, zeros), found)
    assert 0.5 < ratio < 0.9 and interval < 0.1 * found.interval / found.value
    assert detail.ratio(found, found) == (1.0, 0.0)


def test_the_spectrum_of_waves_stands_at_their_frequency():
    side = 32
    column = np.arange(side)[None, None, :, None] * np.ones((1, side, 1, 3))
    wave = np.cos(2 * np.pi * 10 * column / side)
    spectrum = detail.power_spectrum(wave)
    assert len(spectrum) == 17 and spectrum.argmax() == 10
    # Hann's window halves the amplitude at both neighbours, and reaches no further.
    assert spectrum[[9, 11]].min() > 0.1 * spectrum[10] and spectrum[7] < 1e-12 * spectrum[10]
    noise = RNG.normal(size=(50, side, side, 3))
    flat = detail.power_spectrum(noise)
    assert flat[4:].max() < 1.1 * flat[4:].min()
    # 6 dB more power everywhere is a distance of 6 dB
    assert detail.spectrum_error(4 * flat, flat) == pytest.approx(10 * np.log10(4))
    # ... and what half the resolution can show does not count.
    assert detail.spectrum_error(np.r_[9 * flat[:9], flat[9:]], flat) == pytest.approx(0)


def edges(num, seed):
    """Images [n, 16, 16, 3] with a random vertical edge."""
    place = np.random.default_rng(seed).integers(2, 14, num)
    step = np.where(np.arange(16) < place[:, None], -0.5, 0.5)
    return np.broadcast_to(step[:, None, :, None], (num, 16, 16, 3)).astype(np.float32)


def test_detail_patches_tell_blur_and_noise_from_real_detail():
    real = edges(200, 0)
    scale = detail.detail_of(real).std()

    def distance(images):
        patches = [detail.detail_patches(x, scale) for x in (images, real)]
        found = detail.patch_distance(*patches)
        return found.value, found.interval

    floor, _ = distance(edges(200, 1))
    blurred, interval = distance(detail.enlarge_bicubic(area_mean(edges(200, 1), 8), 16))
    noisy, _ = distance(edges(200, 1) + 0.05 * RNG.normal(size=real.shape))
    same_power, _ = distance(scale * RNG.normal(size=real.shape))
    assert abs(floor) < 0.05 < 0.1 < min(blurred - interval, noisy, same_power)


def measure(images, real, judges=()):
    look = functools.partial(report.views, judges=judges, side=8, scale=0.1)
    return look(images), look(real)


def test_a_row_equal_to_real_images_reaches_every_limit():
    real = to_uint8(edges(20, 0))
    seen, reference = measure(real, real)
    again = {"held_out": from_uint8(real[:4])}
    wanted = {"held_out": from_uint8(real[:4]) + 0.02}
    found = report.measured(Row(real, again), seen, reference, wanted, None).numbers
    assert found["spectrum_db"] == 0 and found["recall_pixels_k3"] == 1
    assert found["psnr_held_out"] == pytest.approx(40, abs=1e-3)  # 20 log10(2 / 0.02)
    assert "psnr_train" not in found and "drift_rms" not in found


def test_growth_that_keeps_the_base_does_not_drift():
    small = Row(to_uint8(area_mean(edges(20, 0), 8)), {"held_out": np.zeros((4, 8, 8, 3))})
    large = enlarge(small.images, 16)
    seen, reference = measure(large, large)
    for images, drift in ((large, 0), (255 - large, None)):
        row, wanted = Row(images, {"held_out": np.zeros((4, 16, 16, 3))}), np.ones((4, 16, 16, 3))
        found = report.measured(row, seen, reference, {"held_out": wanted}, small).numbers
        expected = 2 * np.sqrt(np.mean(from_uint8(small.images) ** 2)) if drift is None else 0
        assert found["drift_rms"] == pytest.approx(expected, abs=1e-6)


def test_copies_have_no_distance_to_training_images():
    train, new = RNG.normal(size=(50, 12)), RNG.normal(size=(40, 12))
    unseen, copied = (report.Views({}, {"pixels": x}, None) for x in (new, train[:10]))
    assert report.relative_nearest(copied, unseen, train) < 1e-6
    assert report.relative_nearest(unseen, unseen, train) == 1


def test_a_judge_sees_crops_of_large_images():
    """A judge whose feature is the mean of a picture: 1 at the left half, 0 at the right."""
    images = np.zeros((6, 32, 32, 3), np.uint8)
    images[:, :, :16] = 255
    judge = FeatureNetwork(
        "mean", None, {}, outputs=lambda p, x: {"features": x.mean((1, 2, 3))[:, None] / 2 + 0.5}
    )
    seen, _ = measure(images, images, [judge])
    np.testing.assert_allclose(seen.whole["mean"], 0.5, atol=1e-6)
    corners = crop_corners(np.arange(6), 32, report.CROP, crops=2)[..., 1]
    expected = (16 - corners.clip(max=16)) / 16
    np.testing.assert_allclose(seen.patches["pkid_mean"][..., 0], expected, atol=1e-6)


def test_the_comparison_is_with_the_better_enlargement():
    real, names = RNG.normal(size=(30, 1, 2)), ("grow16", "distill-nearest16", "distill-bicubic16")
    found = {
        name: report.Measured(
            {"resolution": 16}, {"detail": detail.patch_distance(real + shift, real)}, None, None
        )
        for name, shift in zip(names, (1, 3, 2))
    }
    config = ConfigDict({"base": "runs/distill", "data": {"resolution": 16}})
    run = report.Run("grow16", config, "", {}, 0.0)
    (comparison,) = report.comparisons([run], found)
    distances = [found[name].distances["detail"].value for name in names]
    assert comparison["of"] == "distill-bicubic16"
    found["distill-bicubic16"].distances["detail"] = detail.patch_distance(real, real)
    assert not report.comparisons([run], found)  # nothing is left to gain
    assert comparison["ratio"] == pytest.approx(distances[0] / distances[2])


def test_the_recall_of_the_top_is_a_share_of_the_base_s():
    runs = [
        report.Run(f"g{n}", ConfigDict({"data": {"resolution": n}}), "", {}, 0) for n in (8, 16)
    ]
    found = {
        name: report.Measured({"recall_m_k3": recall, "resolution": 16}, {}, None, None)
        for name, recall in (("g8", 0.8), ("g16", 0.6))
    }
    (comparison,) = report.comparisons(runs, found)
    assert comparison["ratio"] == pytest.approx(0.75)
    assert (comparison["network"], comparison["of"]) == ("g16", "g8")


def test_a_number_has_two_digits_of_its_interval():
    row = {"a": 0.7473, "a_interval": 0.2602, "b": 0.01234, "b_interval": 0.00012, "c": 3}
    cells = [report.cell(row, name, form) for name, form in zip("abcd", ("", "", "d", ".2f"))]
    assert cells == ["747 ± 260", "12.34 ± 0.12", "3", ""]


def test_three_images_are_drawn(tmp_path):
    images = edges(3, 0)[:, :8, :8]
    report.save_rows(tmp_path / "rows.png", [images, images], 1)
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size == (2 + 3 * 10, 2 + 2 * 10)  # three columns of 8 px and gaps of 2


def test_a_control_is_the_network_of_its_run_with_its_own_weights(pipeline, monkeypatch):
    """Here the control is the teacher, whose weights fit stage 2; nothing compiles."""

    def paint(_, generator, z, labels, batch_size):
        generators.append(generator)
        return np.zeros((len(z), 8, 8, 3), np.float32)

    workdir, generators = pipeline[0], []
    monkeypatch.setattr(report_rows, "in_batches", paint)
    monkeypatch.setattr(report_rows, "sample", lambda *_, **options: (np.zeros((5, 8, 8, 3)),))
    configs = dict(stage_configs(scenes.__file__, "smoke,levels=1,top=16", workdir))
    folder = str(workdir / "distill")
    run = report.Run("distill", configs[folder], folder, {}, 0.0)
    control = report.Run("distill-x", configs[folder], str(workdir / "pretrain"), {}, 0.0, "x")
    part = np.zeros((5, 8, 8, 3)), np.zeros(5, np.int32)
    noise = report_rows.Noise({"fresh": part, "train": part}, "test", 3, (), 1.0)
    drawn = {}
    rows = dict(report_rows.rows(run, [control], load(control.workdir), noise, drawn))
    assert list(rows) == ["data8", "teacher", "distill-x", "distill"] and list(drawn) == [folder]
    assert rows["distill"].again["train"].shape == (5, 8, 8, 3)
    assert generators[0].origin is generators[1].origin  # one program serves both
    weights = [load(place).params for place in (control.workdir, run.workdir)]
    for generator, params in zip(generators, weights):
        jax.tree.map(np.testing.assert_array_equal, generator.params, params)
