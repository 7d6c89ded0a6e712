"""Run commands as a user does, on one device and with cheap compilation."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(*words, check=True, **env):
    """(stdout lines, stderr, exit status) of `python -m ...`; check: fail the test on an error."""
    flags = os.environ["CHEAPSCALE_TEST_FLAGS"]
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    env = os.environ | env
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines(), done.stderr, done.returncode
