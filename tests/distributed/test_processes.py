"""Two real processes, connected by jax.distributed, against one process with as many devices."""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cheapscale.data.pairs import PairStore
from cheapscale.data.sources import open_data
from cheapscale.pagoda.invert import oriented
from cheapscale.teacher.load import load_teacher
from cheapscale.teacher.sampling import inverter
from cheapscale.training import checkpoint, loop
from launch import train as run

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("worker.py")

pytestmark = pytest.mark.slow


def load_worker():
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, processes, seconds=600):
    for _ in range(10 * seconds):
        if condition() or any(p.poll() is not None for p in processes):
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(folder, [(exit status, last line, log)]) of two processes; only one is told to stop."""
    folder = tmp_path_factory.mktemp("together")
    flags = f"--xla_force_host_platform_device_count=2 {os.environ['CHEAPSCALE_TEST_FLAGS']}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    port, processes = str(free_port()), []
    for index in range(2):
        with open(folder / f"log{index}", "w") as log:
            words = [sys.executable, str(WORKER), port, "2", str(index), str(folder)]
            processes.append(subprocess.Popen(words, env=env, stdout=log, stderr=log))
    metrics = folder / "stopped" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = []
    for index, process in enumerate(processes):
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
        log = (folder / f"log{index}").read_text()
        ends.append((process.returncode, log.strip().splitlines()[-1], log[-3000:]))
    return folder, ends


@pytest.fixture
def four_devices(monkeypatch, eight_devices):
    devices = eight_devices[:4]
    monkeypatch.setattr(jax, "devices", lambda *_: list(devices))


def difference(a, b):
    """|a - b| / |a| of two trees."""
    squares = jax.tree.map(lambda x, y: (np.sum((x - y) ** 2), np.sum(x**2)), a, b)
    pairs = jax.tree.leaves(squares, is_leaf=lambda x: isinstance(x, tuple))
    return np.sqrt(sum(d for d, _ in pairs) / sum(n for _, n in pairs))


def test_a_stop_signal_to_one_process_stops_both_at_the_same_saved_step(together):
    folder, ends = together
    assert [status for status, *_ in ends] == [143, 143], ends
    steps = {line for _, line, _ in ends}
    assert len(steps) == 1 and steps.pop().startswith("pre-empted at step ")
    saved = max(int(p.name) for p in (folder / "stopped" / "checkpoints").iterdir())
    assert ends[0][1] == f"pre-empted at step {saved}" and saved > 3
    assert checkpoint.load_network(folder / "stopped").step == saved


def test_training_in_two_processes_is_training_in_one(together, tmp_path, four_devices):
    folder, _ = together
    config = worker.teacher_config()
    # without the preview, which changes no weights: the two processes drew theirs together
    stage, place = run.build(config)._replace(evals={}), str(tmp_path / "teacher")
    settings = {"name": "teacher", "seed": config.seed, "log_every": 1, "save_every": 0}
    loop.train(stage, place, {}, total_steps=config.total_steps, **settings)
    losses = [
        {row["step"]: row["loss"] for row in map(json.loads, log.open()) if "loss" in row}
        for log in (place / "teacher" / "metrics.jsonl" for place in (folder, tmp_path))
    ]
    assert list(losses[0]) == list(losses[1]) == [1, 2, 3]
    np.testing.assert_allclose(*(list(row.values()) for row in losses), rtol=1e-5)
    one = {}
    for ema in (False, True):
        two, one[ema] = (
            checkpoint.load_network(place / "teacher", ema=ema).params
            for place in (folder, tmp_path)
        )
        assert difference(one[ema], two) <= 1e-5
    assert difference(one[False], one[True]) > 1e-3  # and the weights have moved


def test_weights_split_over_processes_are_saved_and_taken_up_again(
    together, tmp_path, four_devices, monkeypatch
):
    folder, _ = together
    monkeypatch.setattr(loop.sharding, "MIN_SHARDED", 1)
    worker.train_toy(tmp_path, 4)
    two, one = (checkpoint.load_network(place).params for place in (folder / "toy", tmp_path))
    assert difference(one, two) <= 1e-5


def test_the_shards_of_an_inversion_are_divided_and_all_there(together):
    folder, _ = together
    store = PairStore.open(folder / "latents")
    assert len(store) == 48 and store.manifest["per_shard"] == 16
    # process 0 logs its own shards only: 0 and 2 of three
    rows = (folder / "invert" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [16, 32]
    config = worker.invert_config(folder)
    source = open_data(config.data)
    keys = [(i, f) for i in range(24) for f in (0, 1)]
    images, labels = zip(*(oriented(source, *key) for key in keys))
    invert = inverter(load_teacher(config.teacher), nodes=config.invert.nodes, batch_size=16)
    z = invert(np.stack(images), np.asarray(labels))
    stored = np.stack([store.latent(*key) for key in keys])
    assert difference(z, stored) <= 1e-5


@pytest.fixture
def seen(together):
    """What each process wrote down of what they do together."""
    return [json.loads((together[0] / f"seen{index}").read_text()) for index in range(2)]


def test_all_processes_have_what_the_first_has(seen):
    assert [one["agreed"] for one in seen] == [[2**40], [2**40]]


def test_nobody_leaves_a_job_that_another_still_sums_up(seen):
    assert [one["jobs"]["waited"] for one in seen] == [True, True]


def test_where_one_process_fails_the_others_write_their_shards_and_fail_too(together, seen):
    first, second = (one["jobs"] for one in seen)
    assert second["shard"] == "the disk is full"
    assert first["shard"].startswith("process 1 failed in the shards of shard")
    written = (together[0] / "jobs" / "shard").glob("*.txt")
    assert sorted(path.stem for path in written) == ["0", "1", "2", "4"]
    assert first["summary"] == "no room for the summary"
    assert second["summary"].startswith("process 0 failed in the summary of summary")


def test_the_first_process_has_the_classifier_whatever_the_others_have(together, seen):
    first, second = (one["classifiers"] for one in seen)
    assert first["found"] == second["found"]
    fitted, again, read = first["found"]
    assert read == fitted and again[0] != fitted[0] and again[1] != fitted[1]
    # process 0 kept both, each in the cache it was told
    kept = (together[0] / "classifiers").glob("*/classifiers/*.json")
    assert sorted(json.loads(path.read_text())["sha256"] for path in kept) == sorted(
        (fitted[0], again[0])
    )
    assert first["failed"] == "the disk is full"
    assert second["failed"].startswith("process 0 failed in fitting the classifier")
