"""One writer in a work directory: others are refused by name, the dead are replaced."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cheapscale.training import lock
from cheapscale.training.lock import Busy, only_writer


@pytest.fixture
def other():
    """A process that sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def held_by(folder, **changes):
    """Write the file of another process, which differs from this one in `changes`."""
    (folder / lock.NAME).write_text(json.dumps(lock._me() | changes))


def test_a_living_process_is_named_and_a_killed_one_is_replaced(tmp_path, other):
    held_by(tmp_path, pid=other.pid, started=lock._started(other.pid))
    with pytest.raises(Busy, match=f"process {other.pid} on {lock._me()['host']}: wait for it"):
        with only_writer(tmp_path):
            pass
    other.kill()  # a zombie from here on
    time.sleep(0.2)
    with only_writer(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"started": "1"}, {"pid": 2**22 + 1}, {"started": None}])
def test_the_number_of_a_dead_process_may_belong_to_another_one(changes, tmp_path):
    held_by(tmp_path, **changes)
    with only_writer(tmp_path):
        assert lock._read(tmp_path / lock.NAME)[0] == lock._me()


@pytest.mark.parametrize("changes", [{"host": "node7"}, {"space": "pid:[1]"}])
@pytest.mark.parametrize("living", [True, False])
def test_a_writer_on_another_machine_is_known_by_its_touches(
    changes, living, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "PATIENCE", 0.6)
    held_by(tmp_path, **changes)
    touch = threading.Timer(0.1, os.utime, [tmp_path / lock.NAME])
    if living:
        touch.start()
        with pytest.raises(Busy, match="is being written by process"), only_writer(tmp_path):
            pass
    else:
        with only_writer(tmp_path):
            assert lock._read(tmp_path / lock.NAME)[0] == lock._me()


@pytest.mark.parametrize("content", ["", "null", "[1]", "3"])
def test_an_unfinished_file_has_a_writer_only_if_it_changes(content, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.01)
    (tmp_path / lock.NAME).write_text(content)
    with only_writer(tmp_path):
        pass


def test_the_holder_touches_its_file_and_may_claim_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    folder = tmp_path / "a" / "b"
    with only_writer(folder), only_writer(tmp_path / "a" / "." / "b"):
        first = lock._read(folder / lock.NAME)[1]
        time.sleep(0.3)
        assert lock._read(folder / lock.NAME)[1] > first
    assert not (tmp_path / "a").exists()  # nothing was written, so nothing remains
    with only_writer(folder):
        (folder / "result").write_text("")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_file_that_somebody_else_took_over_is_left_to_them(tmp_path):
    with only_writer(tmp_path):
        held_by(tmp_path, host="node7")
    assert (tmp_path / lock.NAME).exists()
