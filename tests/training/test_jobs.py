"""The job runner: shards once each, skipped when done, stopped between two."""

import json
import os
import signal

import pytest

from cheapscale.training import jobs
from cheapscale.training.loop import Preempted, StopSignal
from cheapscale.training.stage import Job


def counting(folder, num_shards=5, fail_at=None):
    """A job whose shard n writes n.txt, and the order in which shards ran."""
    ran = []

    def run_shard(context, shard, mesh):
        assert context == "weights" and mesh.axis_names == ("data", "fsdp", "tensor")
        if shard == fail_at:
            raise OSError("the disk is full")
        (folder / f"{shard}.txt").write_text(str(shard))
        ran.append(shard)
        return {"value": shard}

    job = Job(
        num_shards=num_shards,
        items_per_shard=10,
        prepare=lambda: "weights",
        done=lambda shard: (folder / f"{shard}.txt").exists(),
        run_shard=run_shard,
        finish=lambda context: {"files": len(list(folder.glob("*.txt")))},
    )
    return job, ran


def test_a_job_that_broke_off_goes_on_where_it_stopped(tmp_path):
    job, ran = counting(tmp_path, fail_at=3)
    with pytest.raises(OSError, match="full"):
        jobs.run(job, tmp_path / "work", {}, name="count")
    assert ran == [0, 1, 2]
    job, ran = counting(tmp_path)
    summary = jobs.run(job, tmp_path / "work", {}, name="count")
    assert ran == [3, 4] and summary["files"] == 5 and summary["stage"] == "count"
    rows = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [10, 20, 30, 40, 50]


def test_a_stop_signal_ends_the_job_after_the_shard_in_hand(tmp_path, monkeypatch):
    job, ran = counting(tmp_path)

    class Raised(jobs.StopSignal):
        def __enter__(self):
            self.raised = True
            return super().__enter__()

    monkeypatch.setattr(jobs, "StopSignal", Raised)
    with pytest.raises(jobs.Preempted, match="after 1 of 5 shards"):
        jobs.run(job, tmp_path / "work", {}, name="count")
    assert ran == [0]


def test_another_batch_size_may_go_on_and_another_seed_may_not(tmp_path):
    job, _ = counting(tmp_path)
    jobs.run(job, tmp_path / "work", {"batch_size": 8, "seed": 0}, name="count")
    jobs.run(job, tmp_path / "work", {"batch_size": 4, "seed": 0}, name="count")
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        jobs.run(job, tmp_path / "work", {"batch_size": 4, "seed": 1}, name="count")


def test_a_signal_that_nothing_acted_on_is_not_lost():
    """A finished job has no shard after which it could stop."""
    with pytest.raises(Preempted, match="what was done is saved"), StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.raised
