"""The job runner: every shard runs once, is skipped when done, and a signal stops in between."""

import json
import os
import signal

import pytest

from cheapscale.training import jobs
from cheapscale.training.loop import Preempted, StopSignal
from cheapscale.training.stage import Job


def counting(folder, num_shards=5, fail_at=None):
    """(a job whose shard n writes n.txt, the list of shards in the order in which they ran)."""
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


def test_an_interrupted_job_continues_with_the_missing_shards(tmp_path):
    job, ran = counting(tmp_path, fail_at=3)
    with pytest.raises(OSError, match="full"):
        jobs.run(job, tmp_path / "work", {}, name="count")
    assert ran == [0, 1, 2]
    job, ran = counting(tmp_path)
    summary = jobs.run(job, tmp_path / "work", {}, name="count")
    assert ran == [3, 4] and summary["files"] == 5 and summary["stage"] == "count"
    rows = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [10, 20, 30, 40, 50]


def test_a_stop_signal_ends_the_job_after_the_current_shard(tmp_path):
    job, ran = counting(tmp_path)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return job.run_shard(*args)

    with pytest.raises(Preempted, match="after 1 of 5 shards"):
        jobs.run(job._replace(run_shard=interrupted), tmp_path / "work", {}, name="count")
    assert ran == [0]


def test_a_job_resumes_with_another_batch_size_but_not_with_another_seed(tmp_path):
    job, _ = counting(tmp_path)
    jobs.run(job, tmp_path / "work", {"batch_size": 8, "seed": 0}, name="count")
    jobs.run(job, tmp_path / "work", {"batch_size": 4, "seed": 0}, name="count")
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        jobs.run(job, tmp_path / "work", {"batch_size": 4, "seed": 1}, name="count")


@pytest.mark.parametrize(
    "result", ["checkpoints/3/meta/metadata", "evaluate.json", "shards/generated-0000000.npz"]
)
def test_a_job_leaves_the_folder_of_another_run_as_it_was(result, tmp_path):
    """Else the other run could never be resumed."""
    job, ran = counting(tmp_path)
    for name, content in ((result, '{"networks": {}}'), ("config.json", '{"stage": "other"}')):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text(content)
    with pytest.raises(ValueError, match="stage: 'other' -> 'count'.*use a new work directory"):
        jobs.run(job, tmp_path / "work", {"stage": "count"}, name="count")
    assert (tmp_path / "work" / "config.json").read_text() == '{"stage": "other"}' and not ran
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_a_signal_after_the_last_shard_is_reported():
    """A finished job has no shard after which it could stop."""
    with pytest.raises(Preempted, match="all results are saved"), StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.raised
