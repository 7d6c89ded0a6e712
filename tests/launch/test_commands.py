"""The commands as a user runs them: a pipeline from the shell, sampling, the plan, the errors."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from cheapscale.data.latents import LatentStore, PairSource
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.evaluation.quality import choice
from cheapscale.models.generator import trainable
from cheapscale.models.unet import unet
from cheapscale.stages.data import open_data
from cheapscale.stages.networks import make_generator
from cheapscale.training import checkpoint
from cheapscale.training.stage import Job
from cheapscale.training.state import split
from launch.plan import describe
from tests.launch.shell import command


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs")
    lines, _, _ = command(
        "launch.pipeline", "--config=configs/scenes.py", "--arg=smoke,jump,levels=1",
        f"--workdir={workdir}", "--num_samples=24",
    )  # fmt: skip
    return workdir, lines


def test_the_pipeline_ends_with_a_table_pictures_and_one_json_line(pipeline):
    workdir, lines = pipeline
    summary = json.loads(lines[-1])
    assert summary == json.loads((workdir / "pipeline.json").read_text())
    assert list(summary["stages"]) == ["teacher", "distill", "grow32"]
    assert lines[0].startswith("| network | px | fd_classifier | floor |")
    assert {"data.png", "teacher.png", "round_trip.png", "one_step.png", "report.md"} <= {
        path.name for path in workdir.iterdir()
    }
    assert summary["training_flops"] > 0 and summary["stages"]["grow32"]["drift_rms"] > 0


def test_sample_writes_images_and_each_depends_on_its_number_alone(pipeline, tmp_path):
    workdir, _ = pipeline
    model = f"--model={workdir / 'grow32'}"
    command("launch.sample", model, "--num=6", f"--out={tmp_path / 'a'}", "--labels=1,2")
    lines, _, _ = command(
        "launch.sample", model, "--num=2", "--start=4", f"--out={tmp_path / 'b'}", "--labels=1,2"
    )
    assert json.loads(lines[-1])["resolution"] == 32
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    np.testing.assert_array_equal(a["labels"], [1, 2, 1, 2, 1, 2])
    assert np.abs(a["images"][4:].astype(int) - b["images"]).max() <= 1
    assert (tmp_path / "a" / "samples.png").is_file()
    _, stderr, status = command("launch.sample", model, "--steps=5", check=False)
    assert status == 1 and "--steps say how to solve a teacher's ODE" in stderr
    _, stderr, status = command("launch.sample", model, "--labels=circle", check=False)
    assert status == 1 and "--labels=circle: give numbers from 0 on; the classes are 0 " in stderr


def every_file(folder):
    """{path: (time of change, bytes)} of a tree; a folder has no bytes."""
    paths = sorted(folder.rglob("*"))
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def planned(stage, folder, workdir, **paths):
    """What `--dry_run` prints of a stage; and that plan.json is all it leaves in `folder`."""
    workdir.mkdir(exist_ok=True)
    before = every_file(folder)
    lines, _, _ = command(
        "launch.train", f"--config=configs/scenes.py:smoke,levels=1,stage={stage}", "--dry_run",
        f"--workdir={workdir}", *(f"--config.{name}={path}" for name, path in paths.items()),
        CHEAPSCALE_CACHE=str(folder / "cache"),
    )  # fmt: skip
    plan, after = json.loads(lines[-1]), every_file(folder)
    assert json.loads(after.pop(workdir / "plan.json")[1]) == plan
    before.pop(workdir / "plan.json", None)
    for tree in (before, after):
        tree.pop(workdir, None)  # the folder itself changes with plan.json
    assert before == after
    return plan


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_done(workdir):
    return checkpoint.read_meta(workdir)[1]["ledger"]["flops"]


@pytest.fixture(scope="module")
def copied(pipeline, tmp_path_factory):
    """The pipeline's folders, with the second of three shards of latents missing."""
    folder = tmp_path_factory.mktemp("plans") / "runs"
    shutil.copytree(pipeline[0], folder)
    (folder / "latents" / "shard-00001.array_record").unlink()
    return folder


def test_the_plan_of_pretraining(copied):
    plan = planned("pretrain", copied, copied / "new", save_every=2)
    teacher = checkpoint.load_network(copied / "pretrain").params
    assert plan["networks"]["net"] == {"parameters": count(teacher), "trainable": count(teacher)}
    assert plan["flops_total"] == plan["flops_left"] == 3 * plan["flops_per_step"]
    # the compiler's own count after it has optimised
    assert plan["flops_total"] == pytest.approx(flops_done(copied / "pretrain"), rel=0.05)
    # weights, their average, two moments; loss and count of 16 noise bins, their edges; counters
    assert plan["checkpoint_bytes"] == 4 * (4 * count(teacher) + 16 + 16 + 17 + 3)
    assert plan["disk_bytes"] == 2 * plan["checkpoint_bytes"]  # of steps 2 and 3
    memory = plan["memory"]
    assert memory["state"] == plan["checkpoint_bytes"] and memory["frozen"] == 0
    assert memory["batch"] == 8 * (8 * 8 * 3 * 4 + 4)
    assert memory["values"] > memory["state"] / 4  # at least the gradient
    assert memory["bytes_per_device"] == sum(memory[k] for k in memory if k != "bytes_per_device")


def test_the_plan_of_a_run_that_is_done_asks_for_nothing_more(copied):
    plan = planned("pretrain", copied, copied / "pretrain")
    assert plan["steps_done"] == 3 and plan["flops_left"] == plan["disk_bytes"] == 0


def test_the_plan_of_inversion_leaves_out_shards_that_are_done(copied):
    store = copied / "latents"
    plan = planned("invert", copied, copied / "new", teacher=copied / "pretrain", latents=store)
    teacher = checkpoint.load_network(copied / "pretrain").params
    assert plan["networks"]["net"]["parameters"] == count(teacher)
    assert (plan["latents"], plan["latents_left"]) == (48, 16)
    assert (plan["shards"], plan["shards_done"]) == (3, 2)
    assert plan["network_calls_per_latent"] == 2 * 2  # Heun on three nodes
    assert plan["flops_per_latent"] == 4 * plan["flops_per_network_call"] > 0
    assert plan["flops_total"] == 48 * plan["flops_per_latent"] == 3 * plan["flops_left"]
    assert plan["memory"]["weights"] == 4 * count(teacher)
    record = 8 + 4 + 4 + 8 * 8 * 3 * 4  # id, flip, label, float32 latent
    assert plan["payload_bytes"] == 16 * record
    on_disk = (store / "shard-00000.array_record").stat().st_size  # as large as the one missing
    assert plan["payload_bytes"] <= on_disk <= plan["disk_bytes"]
    assert plan["disk"] == str(store)
    # a store that does not exist yet, on the disk of its own folder, is not begun
    plan = planned(
        "invert", copied, copied / "new", teacher=copied / "pretrain",
        latents=copied / "elsewhere" / "latents", **{"invert.dtype": "float16"},
    )  # fmt: skip
    assert plan["payload_bytes"] == 48 * (16 + 8 * 8 * 3 * 2) and plan["shards_done"] == 0


def test_the_plan_of_distillation_fits_no_classifier_but_says_so(pipeline, copied):
    latents = pipeline[0] / "latents"
    plan = planned("distill", copied, copied / "new", teacher=copied / "pretrain", latents=latents)
    generator = count(checkpoint.load_network(copied / "distill").params)
    assert plan["networks"]["generator"] == {"parameters": generator, "trainable": generator}
    (how,) = plan["fits_first"].values()
    assert "loss_classifier_8px" in plan["fits_first"] and how.startswith("3 updates of 128 images")
    assert plan["memory"]["frozen"] > 0
    paid = flops_done(copied / "pretrain") + LatentStore.open(latents).cost()["flops"]
    trained = flops_done(copied / "distill") - paid
    assert plan["flops_total"] == pytest.approx(trained, rel=0.05)


def test_the_plan_of_growing_counts_what_trains(pipeline, copied):
    latents = pipeline[0] / "latents"
    plan = planned(
        "grow,resolution=32,jump", copied, copied / "new", base=copied / "distill", latents=latents
    )
    grown = checkpoint.load_network(copied / "grow32")
    (model,) = grown.meta["networks"].values()
    moving, _ = split(grown.params, trainable(unet(**model).config))
    counts = {"parameters": count(grown.params), "trainable": count(moving)}
    assert plan["networks"]["generator"] == counts
    trained = flops_done(copied / "grow32") - flops_done(copied / "distill")
    assert plan["flops_total"] == pytest.approx(trained, rel=0.05)


def test_a_plan_refuses_a_disk_without_room(monkeypatch, tmp_path):
    """The disk of the folder that takes the bytes, not of the work directory."""
    store, asked = tmp_path / "store", []

    def usage(place):
        asked.append(place)
        return types.SimpleNamespace(free=1999)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    config = types.SimpleNamespace(stage="invert")
    for needed in (1999, 2000):
        figures = {"disk": str(store / "latents"), "disk_bytes": needed}
        job = Job(0, 1, None, None, None, None, describe=lambda: figures)  # noqa: B023
        if needed == 1999:
            assert describe(config, job, "/elsewhere")["disk_free_bytes"] == 1999
        else:
            with pytest.raises(OSError, match="store/latents needs .* choose another disk"):
                describe(config, job, "/elsewhere")
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["launch.sample", "--model=nowhere"], "no checkpoint in 'nowhere'"),
        (
            ["launch.pipeline", "--config=configs/none.py", "--workdir=runs/x"],
            "there is no config file 'configs/none.py'",
        ),
        (
            ["launch.train", "--config=configs/cifar10.py:stage=pretrain", "--workdir=runs/x"],
            "cifar10",
        ),
    ],
)
def test_an_error_is_one_sentence_and_no_traceback(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    words = [w.replace("runs/x", str(tmp_path)) for w in words]
    _, stderr, status = command(*words, check=False)
    assert status == 1 and sentence in stderr and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: ")
    # where the run had a folder, what lies behind the sentence is kept in it
    kept = [path.read_text() for path in tmp_path.rglob("*.traceback.txt")]
    assert all(text.startswith("Traceback") and sentence in text for text in kept)


def test_a_run_s_own_lines_stay_and_libraries_are_silent():
    import grain

    from cheapscale.training import loop
    from launch import command as shell

    def said(path):
        return shell.ours(types.SimpleNamespace(pathname=str(path)))

    assert said(loop.__file__) and said(shell.__file__) and said("/home/me/my_study.py")
    assert not said(grain.__file__) and not said(jax.__file__)


def test_evaluate_scores_a_checkpoint_and_its_cost(pipeline, tmp_path):
    workdir, _ = pipeline
    lines, _, _ = command(
        "launch.evaluate", f"--model={workdir / 'grow32'}", "--num=24", "--per_shard=16",
        "--num_reference=32", "--metrics=fd,kid,memorisation,floor", f"--workdir={tmp_path / 'a'}",
    )  # fmt: skip
    summary = json.loads(lines[-1])
    meta = checkpoint.read_meta(workdir / "grow32")[1]
    assert summary["cost"]["nfe"] == 1 and summary["cost"]["flops_per_image"] > 0
    assert summary["cost"]["training_flops"] == meta["ledger"]["flops"]
    assert summary["num"] == 24 and "no feature network was given" in summary["warnings"][0]
    assert (tmp_path / "a" / "samples.png").is_file()
    assert (tmp_path / "a" / "report.md").read_text().startswith("| images | num | fd_classifier")

    shards = sorted((tmp_path / "a" / "shards").glob("generated-*.npz"))
    assert [len(np.load(path)["ids"]) for path in shards] == [16, 8]


def test_evaluate_measures_reconstructions_of_models_and_of_files(pipeline, tmp_path):
    workdir, _ = pipeline
    lines, _, _ = command(
        "launch.evaluate", f"--model={workdir / 'grow32'}", "--num=20", "--nocost",
        "--metrics=reconstruction", f"--latents={workdir / 'latents'}",
        f"--workdir={tmp_path / 'grown'}",
    )  # fmt: skip
    found = json.loads(lines[-1])
    loaded = checkpoint.load_network(workdir / "grow32")
    source = open_data(loaded.meta["config"]["data"])
    pairs = PairSource(source, LatentStore.open(workdir / "latents"))
    items = [pairs[int(i)] for i in choice(len(pairs), 20)]
    z, targets = (np.stack([item[key] for item in items]) for key in ("z", "image"))
    generate = make_generator(loaded.meta["networks"]["generator"], loaded.meta["diffusion"])
    images = generate(loaded.params, z, np.asarray([item["label"] for item in items]))
    squares = np.mean((np.clip(images, -1, 1) - targets) ** 2, axis=(1, 2, 3), dtype=np.float64)
    expected = np.mean(10 * np.log10(4 / squares))
    assert found["reconstruction_psnr"] == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "grown" / "reconstructions.png").is_file()

    for name, values in (("a", images), ("b", targets)):
        np.savez(tmp_path / f"{name}.npz", images=to_uint8(np.asarray(values)))
    lines, _, _ = command(
        "launch.evaluate", f"--images={tmp_path / 'a.npz'}", f"--targets={tmp_path / 'b.npz'}",
        "--metrics=reconstruction", f"--workdir={tmp_path / 'files'}",
    )  # fmt: skip
    # eight bits cost little where the images are far apart
    assert json.loads(lines[-1])["reconstruction_psnr"] == pytest.approx(expected, rel=1e-2)
    _, stderr, status = command(
        "launch.evaluate", f"--images={tmp_path / 'a.npz'}", "--metrics=reconstruction",
        "--steps=18", f"--workdir={tmp_path / 'x'}", check=False,
    )  # fmt: skip
    assert status == 1 and "error: --steps is for a teacher only: leave it out" in stderr
