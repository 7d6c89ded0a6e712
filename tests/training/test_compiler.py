"""The choice of XLA's flags on CPU."""

import os
import platform

import jax
import jax.numpy as jnp
import jaxlib
import pytest

from cheapscale.features.layers import conv, depthwise
from cheapscale.training import compiler
from launch import command

X86 = platform.machine() == "x86_64"


@pytest.fixture
def machine(monkeypatch):
    """An x86 machine where the user has set no flags."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("XLA_FLAGS", "")
    return monkeypatch


def test_a_command_sets_the_flags_before_it_meets_a_device(machine):
    machine.setattr(command.importlib.util, "find_spec", lambda name: None)
    seen = []
    machine.setattr(jax, "devices", lambda: seen.append(os.environ["XLA_FLAGS"]))
    command.prepare(keep=False)
    assert seen == [compiler.FLAGS]
    assert compiler.for_depthwise()


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
        lambda patch: patch.setattr(platform, "machine", lambda: "aarch64"),
        lambda patch: patch.setattr(jaxlib.version, "__version_info__", (0, 12, 0)),
    ],
    ids=["flags of the user", "another processor", "another jaxlib"],
)
def test_flags_stay_as_they_are(machine, change):
    change(machine)
    before = os.environ["XLA_FLAGS"]
    assert compiler.choose_flags() == ""
    assert os.environ["XLA_FLAGS"] == before
    assert compiler.for_depthwise() == {}


@pytest.mark.skipif(not X86, reason="the lists are for x86")
def test_xla_knows_both_lists_and_one_is_its_default():
    """A misspelt kind would end every command; a changed default would slow EfficientNet."""
    kernel, bias = jnp.ones((3, 3, 32, 32)), jnp.ones(32)

    def block(x):
        x = conv(x, {"kernel": kernel, "bias": bias})
        return depthwise(x, {"kernel": kernel[:, :, :1], "bias": bias}).sum(axis=(1, 2))

    lowered = jax.jit(block).lower(jnp.ones((2, 16, 16, 32)))
    texts = [
        lowered.compile(compiler_options={compiler.OPTION: compiler._listed(kinds)}).as_text()
        for kinds in (compiler.DEFAULT, compiler.ELEMENTWISE)
    ]
    assert texts[0] == lowered.compile().as_text() != texts[1]
