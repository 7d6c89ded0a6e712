"""One process of several, each with two CPU devices: worker.py PORT COUNT INDEX FOLDER.

Every process runs the same runs in turn, as the processes of a pod would, and the last one until it
is told to stop. test_processes.py starts them and looks at what they leave in FOLDER.
"""

import importlib.util
import json
import pathlib
import sys
import time

import jax
import numpy as np

from cheapscale.features import fitted as classifier
from cheapscale.training import jobs, loop
from cheapscale.training import mesh as sharding
from configs.scenes import get_config
from launch import train as run


def teacher_config():
    """Three denoising steps of a U-Net of one level, at a rate that moves the weights."""
    config = get_config("smoke,stage=pretrain")
    config.model.channels, config.model.channel_mult = 8, (1,)
    config.optim.warmup_steps = 0
    config.log_every = 1
    return config


def invert_config(folder):
    config = get_config("smoke,stage=invert,invert.noise=0.0")
    config.teacher, config.latents = str(folder / "teacher"), str(folder / "latents")
    return config


def other_test(name):
    """The module tests/`name`.py, whose toys are used here too."""
    path = (pathlib.Path(__file__).parents[1] / name).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def toy():
    """The stage of tests/training/test_loop.py, fed with this process's rows."""
    stage = other_test("training/test_loop").denoise_stage()

    def batches(start):
        for batch in stage.batches(start):
            part = len(batch["x"]) // jax.process_count()
            first = part * jax.process_index()
            yield {"x": batch["x"][first : first + part]}

    return stage._replace(batches=batches)


def train_toy(folder, total_steps):
    """On a mesh that splits every kernel over the devices of all processes."""
    sharding.MIN_SHARDED = 1
    settings = {"name": "toy", "seed": 0, "log_every": 1, "save_every": 0}
    mesh = {"data": 1, "fsdp": 4}
    return loop.train(toy(), str(folder), {}, total_steps=total_steps, mesh=mesh, **settings)


def caught(body):
    """The error that `body` ends in, as text."""
    try:
        body()
    except (OSError, RuntimeError) as error:
        return str(error)


def jobs_seen(folder):
    """What this process sees of a job whose summary takes long, and of two that fail on the other
    or here: a shard of process 1, then the summary of process 0."""
    counting, first = other_test("training/test_jobs").counting, jax.process_index() == 0

    def count(name, fail_at=None, **changes):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        job = counting(place, fail_at=fail_at)[0]._replace(**changes)
        return jobs.run(job, place / "work", {}, name=name)

    def late(_):
        if first:
            time.sleep(1)
            (folder / "late" / "scored").touch()
        return {}

    def broken(_):
        if first:
            raise OSError("no room for the summary")
        return {}

    count("late", finish=late)
    return {
        "waited": (folder / "late" / "scored").exists(),
        "shard": caught(lambda: count("shard", fail_at=3)),
        "summary": caught(lambda: count("summary", finish=broken)),
    }


def classifiers_seen(folder):
    """Hashes and weights of three classifiers, one for each way of having something in the caches,
    and how this process ends where the fit fails. Fits draw weights: no two give the same."""
    toys, seeds = other_test("features/test_fitted"), iter(range(100))
    source = toys.Stripes(60)

    def draw(source, spec):
        assert jax.process_index() == 0
        return toys.drawn(source, spec, seed=next(seeds))

    def full(*_):
        raise OSError("the disk is full")

    def fit(number, **options):
        cache = folder / str((number + jax.process_index()) % 2)
        planned = classifier.lazy_classifier(source, purpose="loss", cache_dir=cache, **options)
        assert planned.recipe and not planned.network.sha256
        network = planned.fit()
        assert network.outputs
        return network.sha256, np.asarray(network.params["stem"]["kernel"]).tolist()

    classifier._fit = draw
    # 0: nobody has one. 1: process 1 has that one. 2: both have one, and not the same.
    found = [fit(number) for number in range(3)]
    classifier._fit = full
    return {"found": found, "failed": caught(lambda: fit(0, seed=7))}


def main(port, count, index, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    folder = pathlib.Path(folder)
    value = np.asarray([2**40]) if index == "0" else np.zeros((3, 2), np.float32)
    seen = {
        "agreed": sharding.broadcast_from_host0(value).tolist(),
        "jobs": jobs_seen(folder / "jobs"),
    }
    # as the loop loads frozen weights: on a mesh of this process's own
    with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices()[:1])):
        seen["classifiers"] = classifiers_seen(folder / "classifiers")
    (folder / f"seen{index}").write_text(json.dumps(seen))
    run.run(teacher_config(), folder / "teacher")
    run.run(invert_config(folder), folder / "invert")
    train_toy(folder / "toy", 2)
    train_toy(folder / "toy", 4)  # goes on from what both have saved
    try:
        train_toy(folder / "stopped", 10**6)
    except loop.Preempted as stop:
        print(stop, flush=True)
        sys.exit(143)


if __name__ == "__main__":
    main(*sys.argv[1:])
