"""Flags of XLA's compiler for CPU, chosen by measurement.

XLA:CPU hands parts of a program to the library YNN. If these include elementwise operations, they
take the convolutions beside them along. In CPU seconds of an x86 core with AVX-512 (jaxlib 0.10.2),
against XLA's default: a gradient of a U-Net runs in 0.91 and compiles in 0.7, one call in 0.93 to
0.96; but EfficientNet-lite0, whose depthwise convolutions are sums of shifted products, takes 2.6
times as long and compiles 5 times as long. So its programs keep the default.
"""

import os
import platform

import jaxlib

OPTION = "xla_cpu_experimental_ynn_fusion_type"
DEFAULT = ("DOT", "INDIVIDUAL_DOT", "REDUCE", "INDIVIDUAL_CONVOLUTION")
ELEMENTWISE = ("DOT", "INDIVIDUAL_DOT", "REDUCE", "ELTWISE")
# An unknown flag aborts the process: these releases of jaxlib were searched for it.
KNOWN = ((0, 10), (0, 11))


def _listed(kinds: tuple[str, ...]) -> str:
    return ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)


# compiler_options of a program that runs once. For the random draws of a tiny U-Net's fifty shapes,
# XLA:CPU takes 11 to 18 s with optimisation, 3 s without (jax 0.10).
ONCE = {"xla_backend_optimization_level": 0}
FLAGS = f"--{OPTION}={_listed(ELEMENTWISE)}"


def choose_flags() -> str:
    """The XLA_FLAGS that it set; "" where the user has set some, or where they were not measured.

    Only for a process without an accelerator, and before its first computation.
    """
    known = tuple(jaxlib.version.__version_info__[:2]) in KNOWN
    if os.environ.get("XLA_FLAGS") or platform.machine() != "x86_64" or not known:
        return ""
    os.environ["XLA_FLAGS"] = FLAGS
    return FLAGS


def for_depthwise() -> dict[str, str]:
    """compiler_options of a program with depthwise convolutions: XLA's default kinds, if
    `choose_flags` has changed them."""
    return {OPTION: _listed(DEFAULT)} if os.environ.get("XLA_FLAGS") == FLAGS else {}
