"""The one runner of jobs: numbered shards, split over processes, each written whole or not at all.

Running the same command again skips what is done. Process p of n takes shards p, p+n, p+2n ...
"""

import time
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from cheapscale.training import checkpoint as ckpt
from cheapscale.training import sharding
from cheapscale.training.logging import Log
from cheapscale.training.loop import Preempted, StopSignal
from cheapscale.training.stage import Job


def run(job: Job, workdir: str, config: dict, *, name: str, mesh: dict | None = None) -> dict:
    """Run every shard that is not done and return the job's summary.

    Each process uses a mesh of its own devices: shards are independent, nothing is communicated.
    The processes meet when all shards are written, and again after the summary, which one of them
    may take minutes to make: nobody exits while another works. Where one fails the others write
    their shards and fail too.

    Raises Preempted between two shards after SIGTERM; one of several processes leaves the signal to
    jax.distributed, whose handler a later training stage needs, and loses the shard in hand.
    """
    with sharding.together(f"the shards of {name}"):
        done = [job.done(shard) for shard in range(job.num_shards)]
        mine = range(jax.process_index(), job.num_shards, jax.process_count())
        todo = [shard for shard in mine if not done[shard]]
        # results do not depend on the batch size
        ckpt.claim_workdir(workdir, config, (*ckpt.HARMLESS, "batch_size"), begun=any(done))
        local = (mesh or {}) if jax.process_count() == 1 else {}
        device_mesh = sharding.make_mesh(**local, devices=jax.local_devices())
        logging.info("%s: %d of %d shards to do", name, len(todo), len(mine))
        context = job.prepare()
        began = time.monotonic()
        log = Log(workdir, name, len(mine) * job.items_per_shard, unit="item")
        items_done = (len(mine) - len(todo)) * job.items_per_shard
        try:
            _run_shards(job, context, todo, items_done, device_mesh, log)
        finally:
            log.close()
    with sharding.together(f"the summary of {name}"):
        summary = job.finish(context)
    seconds = (time.monotonic() - began) * jax.device_count()
    return {"stage": name, "workdir": str(workdir), "device_seconds": round(seconds, 2)} | summary


def _run_shards(job: Job, context: Any, todo: list[int], done: int, mesh: Mesh, log: Log) -> None:
    """Run the shards `todo` and log them; `done`: items of this process that are there already."""
    with StopSignal() as stop, jax.set_mesh(mesh):
        log.start(done)
        for n, shard in enumerate(todo, start=1):
            values = job.run_shard(context, shard, mesh)
            done += job.items_per_shard
            log.scalars(done, values, progress=True)
            if stop.raised:
                raise Preempted(f"pre-empted after {n} of {len(todo)} shards")
