"""Settings and fixtures of all tests: cheap compilation, a persistent compile cache, one of 8
simulated CPU devices, and one finished pipeline that many tests read.

The environment must be set before jax is imported anywhere. Rank promotion raises, so that a
[4, 1] array silently broadcast against [8] is an error rather than a wrong number.
"""

import contextlib
import fcntl
import importlib
import io
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute. Without the fusion emitters a U-Net's training step
# compiles in a third of the time; two test processes share two cores, so one thread each.
os.environ["CHEAPSCALE_TEST_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_max_isa=SSE4_2 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    + os.environ["CHEAPSCALE_TEST_FLAGS"]
)
os.environ.setdefault("CHEAPSCALE_CACHE", str(ROOT / ".pytest_cache" / "cheapscale"))

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from cheapscale.features import classifier, fitted  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The folder that the commands use too, so that both test processes and subprocesses share it.
jax.config.update("jax_compilation_cache_dir", f"{os.environ['CHEAPSCALE_CACHE']}/jax")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)  # to write one takes time
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which pytest never parses

COUNTED = ("devices", "local_devices", "device_count", "local_device_count")
ALL_DEVICES = {name: getattr(jax, name) for name in COUNTED}


@pytest.fixture(scope="session", autouse=True)
def first_device():
    """Show tests only the first device: a program for eight takes far longer to compile."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        for name in COUNTED:
            found = len(one) if name.endswith("count") else one
            patch.setattr(jax, name, lambda *args, found=found, **options: found)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_levels():
    """Classifiers that fit in a GAN's test have two of their four levels: half to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "WIDTHS", classifier.WIDTHS[:2])
        patch.setattr(fitted, "VERSION", -fitted.VERSION)  # cached under other names
        yield


@pytest.fixture
def eight_devices(monkeypatch):
    """All simulated devices, for tests of what is split over them."""
    for name, function in ALL_DEVICES.items():
        monkeypatch.setattr(jax, name, function)
    return jax.devices()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """(work directory, lines of stdout) of PaGoDA's pipeline from 8 px to 16 on 24 tiny scenes.

    It runs once for all test processes, whose folders lie side by side; tests only read it.
    """
    from launch import pipeline as command

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    workdir, printed = folder / "pipeline", folder / "pipeline.txt"
    with open(folder / "pipeline.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                command.main([
                    f"--config={ROOT / 'configs' / 'scenes.py'}", "--arg=smoke,levels=1,top=16",
                    f"--workdir={workdir}", "--num_samples=24",
                ])  # fmt: skip
            printed.write_text(out.getvalue())
    return workdir, printed.read_text().splitlines()


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and reference vectors; tests that need it skip where it is absent."""
    folder = pathlib.Path(os.environ.get("CHEAPSCALE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set CHEAPSCALE_SHARED to run this test")
    return folder


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, which the packages we compare with import.

    Its compiled part may belong to another build of torch; its import then fails at two operators
    of object detection. They are declared, which is all the import needs, and never called.
    """
    why = "install the extra test to compare with other implementations"
    torch = pytest.importorskip("torch", reason=why)
    try:
        yield pytest.importorskip("torchvision", reason=why)
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        yield importlib.import_module("torchvision")


@pytest.fixture
def key():
    return jax.random.key(0)
