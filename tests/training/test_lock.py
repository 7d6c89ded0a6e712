"""One writer in a work directory: others are refused by name, the dead are replaced."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from cheapscale.training import lock
from cheapscale.training.lock import Busy, only_writer

HOLD = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(json.dumps({"host": "here", "pid": os.getpid()}), file=file, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_living_process_is_named_and_a_killed_one_is_replaced(tmp_path):
    words = [sys.executable, "-c", HOLD, str(tmp_path / lock.NAME)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=f"by process {other.pid} on here: wait for it"):
            with only_writer(tmp_path):
                pass
        other.kill()
        other.wait()
        with only_writer(tmp_path):
            assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "null", '{"pid": 1, "host": "node7"}'])
def test_a_file_without_a_lock_has_no_writer(content, tmp_path):
    (tmp_path / lock.NAME).write_text(content)
    with only_writer(tmp_path):
        pass


def test_a_folder_may_be_claimed_again_and_goes_if_nothing_was_written(tmp_path):
    folder = tmp_path / "a" / "b"
    with only_writer(folder), only_writer(tmp_path / "a" / "." / "b"):
        assert (folder / lock.NAME).exists()
    assert not (tmp_path / "a").exists()
    with only_writer(folder):
        (folder / "result").write_text("")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_the_file_of_a_writer_that_ended_meanwhile_is_opened_anew(tmp_path, monkeypatch):
    locked, flock = [], fcntl.flock

    def late(file, how):
        locked.append(os.fstat(file.fileno()).st_ino)
        if len(locked) == 1:
            (tmp_path / lock.NAME).rename(tmp_path / "deleted")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_writer(tmp_path):
        assert (tmp_path / lock.NAME).stat().st_ino == locked[1] != locked[0]


def test_a_disk_without_locks_is_written_with_a_warning(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path):
        assert (tmp_path / lock.NAME).exists()
