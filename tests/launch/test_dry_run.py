"""The plan of a stage, `launch.train --dry_run`, against the cost of the actual run."""

import json
import shutil
import types

import jax
import pytest

from cheapscale.data.pairs import PairStore
from cheapscale.models.growth import trainable
from cheapscale.models.unet import unet
from cheapscale.training import checkpoint
from cheapscale.training.stage import Job
from cheapscale.training.state import split
from launch import train
from launch.dry_run import describe


def every_file(folder):
    """{path: (time of change, size in bytes)} of a folder tree; folders have no size."""
    paths = sorted(folder.rglob("*"))
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}


def planned(stage, folder, workdir, *words, **paths):
    """The plan that `--dry_run` prints; asserts that it only writes plan.json into `folder`."""
    workdir.mkdir(exist_ok=True)
    before = every_file(folder)
    plan = train.main([
        f"--config=configs/scenes.py:smoke,levels=1,stage={stage}", "--dry_run",
        f"--workdir={workdir}", *(f"--config.{name}={path}" for name, path in paths.items()),
        *words,
    ])  # fmt: skip
    after = every_file(folder)
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
    (folder / "latents" / "shard-00001.npy").unlink()
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
    assert memory["bytes_per_device"] == sum(memory[k] for k in memory if k != "bytes_per_device")
    most = 4.5 * plan["flops_per_step"]
    assert planned("pretrain", copied, copied / "new", total_flops=most)["steps"] == 5


def test_a_compiled_plan_adds_what_the_step_needs(copied):
    memory = planned("pretrain", copied, copied / "new", "--compile")["memory"]
    assert memory["step"] > memory["state"] / 4  # at least the gradient
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
    on_disk = (store / "shard-00000.npy").stat().st_size  # as large as the one missing
    assert 16 * record <= on_disk <= plan["disk_bytes"]
    assert plan["disk"] == str(store)
    # a store that does not exist yet, on the disk of its own folder, is not begun
    plan = planned(
        "invert", copied, copied / "new", teacher=copied / "pretrain",
        latents=copied / "elsewhere" / "latents", **{"invert.dtype": "float16"},
    )  # fmt: skip
    assert plan["disk_bytes"] >= 48 * (16 + 8 * 8 * 3 * 2) and plan["shards_done"] == 0


def test_the_plan_of_distillation_fits_no_classifier_but_says_so(pipeline, copied, monkeypatch):
    monkeypatch.setenv("CHEAPSCALE_CACHE", str(copied / "cache"))  # none is fitted there
    latents = pipeline[0] / "latents"
    plan = planned("distill", copied, copied / "new", teacher=copied / "pretrain", latents=latents)
    generator = count(checkpoint.load_network(copied / "distill").params)
    assert plan["networks"]["generator"] == {"parameters": generator, "trainable": generator}
    (how,) = plan["fits_first"].values()
    assert "loss_classifier_8px" in plan["fits_first"] and how.startswith("3 updates of 128 images")
    assert plan["memory"]["frozen"] > 0
    paid = flops_done(copied / "pretrain") + PairStore.open(latents).cost()["flops"]
    trained = flops_done(copied / "distill") - paid
    assert plan["flops_total"] == pytest.approx(trained, rel=0.05)


def test_the_plan_of_growing_counts_what_trains(pipeline, copied):
    latents = pipeline[0] / "latents"
    plan = planned(
        "grow,resolution=16", copied, copied / "new", base=copied / "distill", latents=latents
    )
    grown = checkpoint.load_network(copied / "grow16")
    (model,) = grown.meta["networks"].values()
    moving, _ = split(grown.params, trainable(unet(**model).config))
    counts = {"parameters": count(grown.params), "trainable": count(moving)}
    assert plan["networks"]["generator"] == counts
    trained = flops_done(copied / "grow16") - flops_done(copied / "distill")
    assert plan["flops_total"] == pytest.approx(trained, rel=0.05)


def test_a_plan_refuses_a_disk_without_room(monkeypatch, tmp_path):
    """The disk that counts is that of the folder written to, not of the work directory."""
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
            assert describe(config, job, "/elsewhere", compiled=False)["disk_free_bytes"] == 1999
        else:
            with pytest.raises(OSError, match="store/latents needs .* choose another disk"):
                describe(config, job, "/elsewhere", compiled=False)
    assert asked == [tmp_path, tmp_path]
