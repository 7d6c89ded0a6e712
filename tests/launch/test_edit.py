"""launch.edit as a user runs it, on the tiny pipeline's generators and on pictures of any size."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

import cheapscale
from cheapscale.data.pairs import PairStore
from cheapscale.data.pixels import from_uint8
from cheapscale.data.tokens import train_vocabulary
from cheapscale.model import Model
from cheapscale.pagoda import edit as pagoda
from cheapscale.teacher.load import load
from cheapscale.teacher.teacher import Teacher
from cheapscale.teacher.text import tokenise
from launch import edit
from tests.pagoda.test_guided import generator as random_generator

LOADED = functools.cache(cheapscale.load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photo of 40 x 24 px that lies on its side by its EXIF data, masks, a smaller picture."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = (
        np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right: 24 x 40
    Image.fromarray(pixels).save(folder / "photo.png", exif=exif)
    Image.fromarray(pixels[:5, :5]).save(folder / "tiny.gif")
    mask = np.zeros((40, 24), np.uint8)
    for name, rows in (("none", 0), ("lower", 20), ("border", 7), ("all", 40)):
        mask[:] = 0
        mask[40 - rows :] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    Image.fromarray(mask.T).save(folder / "turned.png")
    (folder / "text.png").write_text("no picture")
    return folder


def run(pipeline, folder, out, task, *words, model="grow16"):
    words = [str(folder / w[1:]) if w.startswith("@") else w for w in words]
    words = [w.replace("=@", f"={folder}/").replace(",@", f",{folder}/") for w in words]
    return edit.main([f"--model={pipeline[0] / model}", f"--task={task}", f"--out={out}", *words])


def image(path):
    return np.asarray(Image.open(path)).astype(int)


def upright(folder, side):
    """The photo as `launch.edit` should see it: turned, its central 24 x 24 px shrunk."""
    pixels = np.asarray(Image.open(folder / "photo.png"))
    square = np.rot90(pixels, -1)[8:32]
    assert side == 8
    return square.reshape(8, 3, 8, 3, 3).mean(axis=(1, 3))


def test_transfer_to_the_same_class_reconstructs_and_to_another_does_not(
    pipeline, folder, tmp_path
):
    found = run(pipeline, folder, tmp_path, "transfer", "--image=@photo.png", "--source=star",
                "--label=5,disc", model="distill")  # fmt: skip
    assert found["results"] == ["result.png", "result-2.png"]
    star, disc = (image(tmp_path / name) for name in found["results"])
    sheet = image(tmp_path / "sheet.png")  # captions, and tiles of 128 px under them
    assert np.abs(sheet[16:144:16, 4:132:16] - upright(folder, 8)).max() <= 1
    np.testing.assert_array_equal(sheet[16:144:16, 4 + 3 * 132 :: 16][:, :8], disc)
    assert star.shape == (8, 8, 3) and (star != disc).any()
    mse = np.square((star - upright(folder, 8)) / 127.5).mean()
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / mse), abs=0.1)
    assert found["loss"] == pytest.approx([mse], rel=0.03)
    assert json.loads((tmp_path / "edit.json").read_text()) == found
    assert "--label=5,disc" in found["command"] and found["teacher"].endswith("pretrain")
    # E is the one that made the latents; a run that does not record it has their store
    store = PairStore.open(pipeline[0] / "latents")
    generator = load(pipeline[0] / "distill")
    assert found["inversion"] == generator.meta["inversion"] == store.inversion()
    assert found["inversion"].items() >= {"noise": store.manifest["noise"], "scale": 1.0}.items()
    del generator.meta["inversion"]
    assert pagoda.inversion_of(generator)._asdict() == found["inversion"]


def test_inpainting_keeps_known_pixels_and_the_best_start_is_first(pipeline, folder, tmp_path):
    found = run(pipeline, folder, tmp_path, "inpaint", "--image=@photo.png", "--mask=@lower.png",
                "--label=5", "--steps=4", "--restarts=2", model="distill")  # fmt: skip
    assert found["loss"] == sorted(found["loss"]) and len(found["psnr_known"]) == 2
    known = upright(folder, 8)[:4]
    for name in found["results"]:
        assert np.abs(image(tmp_path / name)[:4] - known).max() <= 1
    first, second = (image(tmp_path / name)[4:] for name in found["results"])
    assert np.abs(first - second).max() > 1
    # the mean over the entries of the known half
    assert 10 * np.log10(4 / found["loss"][0]) == pytest.approx(found["psnr_known"][0], abs=1e-3)


def test_superres_fits_the_small_picture_and_is_judged_by_the_large_one(pipeline, folder, tmp_path):
    found = run(pipeline, folder, tmp_path, "superres", "--image=@photo.png", "--label=star",
                "--method=optimise", "--steps=2", "--restarts=1")  # fmt: skip
    result = image(tmp_path / "result.png")
    assert result.shape == (16, 16, 3) and "teacher" not in found
    small = result.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)) - upright(folder, 8)
    assert found["loss"][0] == pytest.approx(np.square(small / 127.5).mean(), rel=0.05)
    assert found["psnr_bicubic"] > found["psnr_result"] > 0  # of an untrained start


@pytest.fixture
def captioned(monkeypatch):
    """(teacher, guided generator) of captions at 8 px, of random weights, as any --model."""
    vocabulary = train_vocabulary(["a red star", "a blue ring"], 300)
    text = dict(kind="transformer", vocab=300, length=6, width=8, depth=1, heads=1, mlp=8,
                tokenizer=vocabulary)  # fmt: skip
    net = dict(num_classes=0, caption_dim=8, text=text, attention=(8,), head_dim=8)
    G = random_generator(**net)
    E = random_generator(**net, extra_conditions=0)
    E = Teacher(E.params, E.net, E.process, E.origin)
    monkeypatch.setattr(cheapscale, "load", lambda place: Model(G))
    monkeypatch.setattr(pagoda, "teacher_of", lambda *place: E)
    monkeypatch.setattr(pagoda, "inversion_of", lambda G: pagoda.Inversion(nodes=2))
    return E, G


def test_a_caption_becomes_another_at_a_scale(captioned, folder, tmp_path):
    E, G = captioned
    found = edit.main([
        "--model=W", "--task=transfer", f"--image={folder / 'photo.png'}", f"--out={tmp_path}",
        "--source=a red star", "--prompt=a blue ring", "--prompt=a red star", "--cfg_scale=4",
    ])  # fmt: skip
    captions = tokenise(G.net.config.text, ["a red star", "a blue ring"])
    x_lo = from_uint8(upright(folder, 8))[None]
    z = np.repeat(pagoda.encode(E, x_lo, captions[:1], pagoda.Inversion(nodes=2)), 2, axis=0)
    for omega, agrees in ((4.0, True), (1.0, False)):
        wanted = np.clip(G(z, captions[::-1], np.full(2, omega, np.float32)), -1, 1)
        drawn = [from_uint8(image(tmp_path / name)) for name in found["results"]]
        assert (np.abs(drawn - wanted).max() < 0.02) == agrees


def test_interpolation_runs_from_one_seeds_sample_to_the_others(pipeline, folder, tmp_path):
    words = ["interpolate", "--seeds=3,7", "--label=star,disc"]
    (tmp_path / "own.png").touch()
    longer = run(pipeline, folder, tmp_path, *words, "--frames=6", model="distill")
    found = run(pipeline, folder, tmp_path, *words, "--frames=5", model="distill")
    assert longer["results"][:5] == found["results"]
    left = {path.name for path in tmp_path.glob("*.png")}
    assert left == {*found["results"], "sheet.png", "own.png"}  # no sixth frame of the first edit
    model = cheapscale.load(pipeline[0] / "distill")
    ends = [model.sample(1, seed=seed, labels=label).images[0] for seed, label in ((3, 5), (7, 0))]
    for name, end in zip((found["results"][0], found["results"][-1]), ends):
        assert np.abs(from_uint8(image(tmp_path / name)) - end).max() < 0.01
    gif = Image.open(tmp_path / "interpolation.gif")
    assert gif.n_frames == 8 and gif.size == (128, 128) and found["degrees"] > 45


@pytest.mark.parametrize(
    "task, words, said",
    [
        ("inpaint", "--image=@photo.png --label=1", "--mask is missing: give --mask=FILE"),
        ("inpaint", "--image=@photo.png --mask=@turned.png --label=1",
         "turned.png is 40x24 px, but .*photo.png is 24x40"),
        ("inpaint", "--image=@photo.png --mask=@all.png --label=1", "all.png marks everything"),
        ("inpaint", "--image=@photo.png --mask=@none.png --label=1", "none.png marks nothing"),
        ("inpaint", "--image=@photo.png --mask=@border.png --label=1",
         "central square .* marks nothing"),
        ("inpaint", "--image=@photo.png --mask=@lower.png", "--label is missing: name one"),
        ("superres", "--image=@photo.png --label=8", "label 8 is out of range"),
        ("superres", "--image=@photo.png --label=unicorn", "'unicorn' is no class"),
        ("superres", "--image=@photo.png --label=1,2", "--label was given 2 times: give 1"),
        ("superres", "--image=@gone.png --label=1", "there is no picture .*gone.png"),
        ("superres", "--image=@text.png --label=1", "text.png does not decode"),
        ("superres", "--label=1", "was given 0 pictures, not 1: give --image=FILE"),
        ("superres", "--image=@photo.png --label=1 --mask=@all.png", "--mask: only for --task=inp"),
        ("superres", "--image=@photo.png --label=1 --rate=0.1", "--rate: only for --method=optim"),
        ("superres", "--image=@photo.png --label=1 --method=optimise --penalty=nan",
         "--penalty is nan: give a finite number"),
        ("superres", "--image=@photo.png --label=1 --method=optimise --tries=1 --restarts=2",
         "--restarts=2 of --tries=1 starts"),
        ("superres", "--image=@photo.png --label=1 --method=optimise --start=inversion --tries=4",
         "--tries: an inversion is one start"),
        ("measure", "--method=optimise", "--method: measure compares all of them"),
        ("measure", "--steps=2", "--judge is missing"),
        ("interpolate", "--seeds=3,7 --label=1,2,3", "--label was given 3 times: give 1 or 2"),
        ("transfer", "--image=@photo.png --label=1", "--source is missing: name one of"),
        ("interpolate", "--image=@photo.png --label=1", "was given 1 pictures, not 2"),
        ("interpolate", "--seeds=3 --label=1", "--seeds=3: give two whole numbers"),
        ("interpolate", "--seeds=3,x --label=1", "--seeds=3,x: give two whole numbers"),
        ("interpolate", "--seeds=3,7 --image=@photo.png --label=1", "instead of pictures"),
        ("superres", "--image=@photo.png --prompt=star", "knows no captions: give --label"),
        ("paint", "--image=@photo.png", "should be one of <inpaint"),
    ],
)  # fmt: skip
def test_what_cannot_be_edited_is_refused_before_anything_compiles(
    task, words, said, pipeline, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "jit", None)
    monkeypatch.setattr(cheapscale, "load", LOADED)
    with pytest.raises(SystemExit, match=said):
        run(pipeline, folder, tmp_path, task, *words.split())


@pytest.mark.parametrize(
    "model, task, said",
    [
        ("pretrain", "transfer", "holds no one-step generator"),
        ("distill", "superres", "images of 8 px, the size of its teacher"),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused(model, task, said, pipeline, folder, tmp_path):
    with pytest.raises(SystemExit, match=said):
        run(pipeline, folder, tmp_path, task, "--image=@tiny.gif", "--label=1", model=model)
