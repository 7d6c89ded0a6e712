"""The runner of jobs: numbered shards, which are distributed over processes.

Shards are written atomically, and running the same command again skips the finished ones. Process p
of n takes the shards p, p + n, p + 2n ...
"""

import time

import jax
from absl import logging

from cheapscale.training import checkpoint as ckpt
from cheapscale.training import mesh as sharding
from cheapscale.training.lock import only_writer
from cheapscale.training.log import Log
from cheapscale.training.loop import Preempted, StopSignal
from cheapscale.training.stage import Job


def run(job: Job, workdir: str, config: dict, *, name: str, mesh: dict | None = None) -> dict:
    """Run every shard that is not done and return the job's summary.

    Each process uses a mesh of its local devices. If one fails, the others finish their shards,
    then fail too. Raises Preempted between two shards after SIGTERM; of several processes the
    current shards are lost then.
    """
    with only_writer(workdir), sharding.barrier(f"the shards of {name}"):
        done = [job.done(shard) for shard in range(job.num_shards)]
        mine = range(jax.process_index(), job.num_shards, jax.process_count())
        todo = [shard for shard in mine if not done[shard]]
        # A job's results do not depend on its batch size, so it may change.
        ckpt.claim_workdir(workdir, config, (*ckpt.HARMLESS, "batch_size"), begun=any(done))
        local = (mesh or {}) if jax.process_count() == 1 else {}
        device_mesh = sharding.make_mesh(**local, devices=jax.local_devices())
        logging.info("%s: %d of %d shards to do", name, len(todo), len(mine))
        context = job.prepare()
        began, size, speed = time.monotonic(), job.items_per_shard, 0.0
        items = (len(mine) - len(todo)) * size
        with (
            Log(workdir, name, len(mine) * size, unit="item") as log,
            StopSignal() as stop,
            jax.set_mesh(device_mesh),
        ):
            log.start(items)
            for n, shard in enumerate(todo, start=1):
                values = job.run_shard(context, shard, device_mesh)
                items += size
                if n == 1:  # it compiled the programs
                    second = time.monotonic()
                else:
                    speed = (n - 1) * size / (time.monotonic() - second)
                log.scalars(items, values, progress=True)
                if stop.raised:
                    raise Preempted(f"pre-empted after {n} of {len(todo)} shards")
    with only_writer(workdir), sharding.barrier(f"the summary of {name}"):
        summary = job.finish(context)
    seconds = (time.monotonic() - began) * jax.device_count()
    took = {"device_seconds": round(seconds, 2), "items_per_second": speed}
    return {"stage": name, "workdir": str(workdir)} | took | summary
