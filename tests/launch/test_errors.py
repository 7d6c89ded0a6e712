"""The net for errors: one sentence, a status that is not 0, a traceback where it can be kept."""

import errno
import fcntl
import importlib
import os
import pathlib
import tempfile

import jax
import pytest

from cheapscale.training import lock
from cheapscale.training.loop import Preempted
from launch import command, train
from launch.command import execute, start
from launch.errors import net
from tests.launch.shell import command as shell

COMMANDS = (
    "train",
    "sample",
    "edit",
    "recaption",
    "evaluate",
    "pipeline",
    "sweep",
    "import",
    "export",
    "bench.__main__",
)
SCENES = "--config=configs/scenes.py:stage=pretrain,smoke"


def ended(error, folder=None):
    """The exit code or sentence of a command in which `error` is raised."""
    with pytest.raises(SystemExit) as stop, net(folder, "work"):
        raise error
    return stop.value.code


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("give\n  another"), "error: give another"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device: "),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [OS]"), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a folder that you may write"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a part of it is a file"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), "a: No such file or directory: "),
        (OSError(errno.ENOSPC, "No space left on device"), ": No space left on device: free"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/x.jsonl"), "or move it away"),
        (MemoryError(), "too little memory (MemoryError): give --config.batch_size=16"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "--config.batch_size=16"),
        (ValueError("long " * 1000), "..."),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence_with_a_remedy(error, said, tmp_path):
    text = ended(error, tmp_path)
    assert said in text and "\n" not in text and len(text) < 800
    assert "Traceback" in (tmp_path / "work.traceback.txt").read_text()
    none = tmp_path / "none"
    assert ended(error, none) == text.replace(str(tmp_path), str(none)) and not none.exists()


@pytest.mark.parametrize(
    "error", [KeyError("net"), RecursionError("too deep"), AssertionError(), TypeError("x\ny")]
)
def test_a_fault_of_the_program_says_so_and_where_its_traceback_is(error, tmp_path, monkeypatch):
    text = ended(error, tmp_path)
    kept = tmp_path / "work.traceback.txt"
    assert "a fault of this program" in text and type(error).__name__ in text and "\n" not in text
    assert str(kept) in text and type(error).__name__ in kept.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept.unlink()
    text = ended(error)  # without a work directory
    (kept,) = tmp_path.glob("*/work.traceback.txt")
    assert str(kept) in text


@pytest.mark.parametrize("error", [KeyError("net"), OSError(errno.EROFS, "Read-only", "a")])
def test_a_traceback_that_cannot_be_written_is_no_second_failure(error, tmp_path):
    (tmp_path / "work.traceback.txt").mkdir()
    assert "the traceback could not be written to" in ended(error, tmp_path)


@pytest.mark.parametrize(
    "error, status", [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (Preempted("at"), 143)]
)
def test_signals_and_closed_pipes_have_their_usual_status(error, status, capfd):
    assert ended(error) == status
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_every_flag_with_status_0(name, capsys):
    module = importlib.import_module(f"launch.{name}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"python -m launch.{name.partition('.')[0]}" in shown
    assert "--workdir:" in shown or "--out:" in shown
    assert "--config: Config file" in shown or name not in ("train", "pipeline", "sweep", "import")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_flag_is_named_with_an_example(name):
    with pytest.raises(SystemExit, match=r"^error: --\w+ is missing: give --\w+=[\w/-]+"):
        importlib.import_module(f"launch.{name}").main([])


@pytest.mark.parametrize(
    "content, said",
    [
        ("def get_config(a):\n  x = = 1", "invalid syntax"),
        ("import nothing_of_this_name", "No module named"),
        ("def get_config(a=''):\n  return 1 / 0", "division by zero"),
        ("get_config = 3", "not callable"),
    ],
)
@pytest.mark.parametrize("name", ["train", "pipeline"])
def test_a_config_file_that_fails_is_named(name, content, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        words = f"{path}:x" if name == "train" else f"{path}"
        importlib.import_module(f"launch.{name}").main([f"--config={words}", f"--workdir={path}"])
    text = str(stop.value.code)
    assert text.startswith("error: ") and "\n" not in text and "fault of this program" not in text
    assert said in text or "mine.py" in text


@pytest.mark.parametrize("name", ["README.md", "README.md/x", "gs://bucket/run", "s3://b"])
def test_a_work_directory_that_cannot_be_one_is_refused_at_once(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("README.md").write_text("")

    def never():
        raise AssertionError("the command began")

    with pytest.raises(SystemExit, match="^error: .*(name a folder|mount the bucket)"):
        start(lambda: None, lambda given: execute("x", name, never), [])
    assert os.listdir() == ["README.md"]


def test_a_second_writer_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    with open(tmp_path / lock.NAME, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        print('{"host": "node7", "pid": 3}', file=held, flush=True)
        with pytest.raises(SystemExit, match="written by process 3 on node7: wait"):
            train.main([SCENES, f"--workdir={tmp_path}"])
    assert os.listdir(tmp_path) == [lock.NAME]


@pytest.mark.parametrize("text", ["Unable to initialize backend 'cuda': none (set x)", ""])
def test_a_backend_that_is_absent_is_one_sentence(text, tmp_path, monkeypatch):
    def devices():
        raise (RuntimeError if text else AssertionError)(text)

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit, match=r"JAX_PLATFORMS=cuda .* \([^()]+\): .* JAX_PLATFORMS=cpu"):
        train.main([SCENES, f"--workdir={tmp_path / 'w'}"])
    assert not (tmp_path / "w").exists()


def test_distributed_without_other_processes_is_one_sentence(tmp_path, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match="JAX_PROCESS_ID; on one host leave it out"):
        train.main([SCENES, f"--workdir={tmp_path / 'w'}", "--distributed"])


def test_variables_of_jax_that_it_cannot_read_are_named():
    _, stderr, status = shell("launch.sample", check=False, JAX_ENABLE_X64="maybe")
    assert status == 1 and len(stderr.splitlines()) == 1
    assert stderr.startswith("error: ") and "unset JAX_ENABLE_X64" in stderr


def test_the_home_folder_is_known_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert command.at_home("--workdir=~/runs") == "--workdir=/home/me/runs"
    assert command.at_home("--arg=data_dir=~,base=16") == "--arg=data_dir=~,base=16"
    assert command.at_home("--arg=data_dir='~/a,b'") == "--arg=data_dir='/home/me/a,b'"
    assert command.at_home("--out=a~b/~") == "--out=a~b/~"


def test_in_a_shell_an_error_is_the_last_line_of_stderr_and_a_full_stdout_is_one(tmp_path):
    _, stderr, status = shell("launch.sample", "--model=gs://bucket/run", check=False)
    assert status == 1 and len(stderr.splitlines()) == 1 and stderr.startswith("error: gs:/")
    _, stderr, status = shell("launch.train", "--help=", check=False)
    assert status == 1 and len(stderr.splitlines()) == 1
