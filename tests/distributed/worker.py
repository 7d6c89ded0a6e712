"""One process of several, each with two CPU devices: worker.py PORT COUNT INDEX FOLDER.

Every process runs the same four runs in turn, as the processes of a pod would, and the last one
until it is told to stop. test_processes.py starts them and looks at what they leave in FOLDER.
"""

import importlib.util
import pathlib
import sys

import jax

from cheapscale.stages import run
from cheapscale.training import loop, sharding
from configs.scenes import get_config


def teacher_config():
    """Three denoising steps of a U-Net of one level, at a rate that moves the weights."""
    config = get_config("smoke,stage=pretrain")
    config.model.channels, config.model.channel_mult = 8, (1,)
    config.optim.warmup_steps = 0
    config.log_every = 1
    return config


def invert_config(folder):
    config = get_config("smoke,stage=invert")
    config.teacher, config.latents = str(folder / "teacher"), str(folder / "latents")
    return config


def toy():
    """The stage of tests/training/test_loop.py, fed with this process's rows."""
    path = pathlib.Path(__file__).parents[1] / "training" / "test_loop.py"
    spec = importlib.util.spec_from_file_location("test_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stage = module.denoise_stage()

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


def main(port, count, index, folder):
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
    folder = pathlib.Path(folder)
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
