"""The one runner of jobs: numbered shards, split over processes, each written whole or not at all.

Running the same command again skips what is done. Process p of n takes shards p, p+n, p+2n ...
"""

import time

import jax
from absl import logging

from cheapscale.training import checkpoint as ckpt
from cheapscale.training import sharding
from cheapscale.training.logging import Log
from cheapscale.training.loop import Preempted, StopSignal
from cheapscale.training.stage import Job


def run(job: Job, workdir: str, config: dict, *, name: str, mesh: dict | None = None) -> dict:
    """Run every shard that is not done and return the job's summary.

    Each process uses a mesh of its own devices: shards are independent, nothing is communicated.
    Raises Preempted between two shards after SIGTERM; one of several processes leaves the signal to
    jax.distributed, whose handler a later training stage needs, and loses the shard in hand.
    """
    # results do not depend on the batch size
    ckpt.claim_workdir(workdir, config, (*ckpt.HARMLESS, "batch_size"))
    mine = range(jax.process_index(), job.num_shards, jax.process_count())
    todo = [shard for shard in mine if not job.done(shard)]
    local = (mesh or {}) if jax.process_count() == 1 else {}
    device_mesh = sharding.make_mesh(**local, devices=jax.local_devices())
    logging.info("%s: %d of %d shards to do", name, len(todo), len(mine))
    context = job.prepare()
    log = Log(workdir, name, len(mine) * job.items_per_shard, unit="item")
    began = time.monotonic()
    try:
        with StopSignal() as stop, jax.set_mesh(device_mesh):
            done = (len(mine) - len(todo)) * job.items_per_shard
            log.start(done)
            for shard in todo:
                values = job.run_shard(context, shard, device_mesh)
                done += job.items_per_shard
                log.scalars(done, values, progress=True)
                if stop.raised:
                    raise Preempted(f"pre-empted after shard {shard} of {job.num_shards}")
    finally:
        log.close()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
    summary = job.finish(context)
    seconds = (time.monotonic() - began) * jax.device_count()
    return {"stage": name, "workdir": str(workdir), "device_seconds": round(seconds, 2)} | summary
