"""Our U-Net against `diffusers.UNet2DModel` on CPU: a training step, one-step sampling, a profile.

    OMP_WAIT_POLICY=passive python -m launch.bench --workdir=runs/bench \\
        --record=notebooks/results/bench_cpu.json

Both sides are the same function: the residual blocks, their widths, group norms and attention are
mapped onto each other, our weights are copied into theirs, and the record holds how far the two
outputs are apart. A training step is EDM's denoising loss, its gradient, Adam and the weights'
moving average; one-step sampling is one forward pass. The sides take turns, call by call, so that
whatever else the machine does falls on both; a ratio is their seconds over ours in the same round.

Seconds are wall clock. A second set counts CPU seconds of all threads; where these are no more than
the wall's on several cores, other work had the rest of the machine. Waiting OpenMP threads spin by
default, which makes PyTorch many times slower on such a machine: hence OMP_WAIT_POLICY. `--cores=1`
gives the steadier figures.
"""

import copy
import glob
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from cheapscale.evaluation.cost import param_count
from cheapscale.models.unet import unet
from cheapscale.stages.networks import complete, make_denoiser, make_generator
from cheapscale.stages.pretrain import denoising_loss
from cheapscale.training.loop import provenance
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import denoise_step, noise_bins
from cheapscale.training.state import Optimiser, create_state
from configs.models import preset
from launch.command import execute
from launch.memory import keep_memory

PyTree = Any


class Size(NamedTuple):
    model: dict  # fields of our U-Net; `groups` such that every norm has as many, as theirs do
    batch: int


SIZES = {
    "cifar32": Size(
        dict(
            resolution=32, channels=64, channel_mult=(1, 2, 2), num_blocks=2, attention=(16,),
            groups=16,
        ),
        16,
    ),
    "tiny16": Size(preset("tiny16", groups=8), 32),
}  # fmt: skip
DIFFUSION = dict(process="edm", P_mean=-1.2, P_std=1.2, sigma_data=0.5, sigma_max=80.0)
RATE, DECAY = 1e-4, 0.999
SETTINGS = ("XLA_FLAGS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES")  # environment that changes seconds
FORMATS = ("contiguous", "channels_last")  # PyTorch's default layout, and ours


def random_weights(model: dict, seed: int = 0) -> PyTree:
    """Weights of order one for every tensor: a fresh network has zeros where it ends a block."""
    rng, shape = np.random.default_rng(seed), (1, model["resolution"], model["resolution"], 3)
    shapes = jax.eval_shape(unet(**model).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def our_step(model: dict) -> tuple[Callable, Optimiser]:
    """Pretraining's step, (state, frozen, batch, key) -> (state, metrics), and its optimiser."""
    optimiser = Optimiser(make_optimiser("adam", RATE))
    loss = partial(
        denoising_loss, bind=make_denoiser(model, DIFFUSION), diffusion=DIFFUSION, null_label=0,
        label_dropout=0.0,
    )  # fmt: skip
    return partial(denoise_step, loss_fn=loss, optimiser=optimiser, ema_decay=DECAY), optimiser


def our_calls(model: dict, params: PyTree, images: np.ndarray) -> tuple[dict, dict, Any]:
    """({use: call to time}, {use: FLOPs}, the compiled training step)."""
    step, optimiser = our_step(model)
    params = {"net": jax.tree.map(jnp.copy, params)}  # the step takes its state for good
    state = create_state(params, {"net": noise_bins()}, {"net": optimiser}, ["net"])
    batch = {"image": jnp.asarray(images), "label": jnp.zeros(len(images), jnp.int32)}
    key = jax.random.key(0)
    train = jax.jit(step, donate_argnums=0).lower(state, {}, batch, key).compile()
    z = DIFFUSION["sigma_max"] * batch["image"]
    weights = jax.tree.map(jnp.copy, params["net"])
    generate = jax.jit(make_generator(model, DIFFUSION)).lower(weights, z, batch["label"]).compile()

    def train_once():
        nonlocal state
        state, metrics = train(state, {}, batch, key)
        jax.block_until_ready((state, metrics))

    calls = {
        "training": train_once,
        "sampling": lambda: jax.block_until_ready(generate(weights, z, batch["label"])),
    }
    flops = {"training": train, "sampling": generate}
    return calls, {use: c.cost_analysis()["flops"] for use, c in flops.items()}, train


def alternate(calls: dict[str, Callable], rounds: int) -> dict:
    """Seconds {side: {"wall": [..], "cpu": [..]}} of `rounds` turns, after two to warm up."""
    seconds = {side: {"wall": [], "cpu": []} for side in calls}
    for turn in range(-2, rounds):  # in the second, memory still grows
        for side, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if turn >= 0:
                seconds[side]["wall"].append(time.perf_counter() - wall)
                seconds[side]["cpu"].append(time.process_time() - cpu)
    return seconds


def summary(seconds: dict) -> dict:
    """Medians by side, and the medians of their seconds over ours in the same round."""
    ours, out = seconds["ours"], {}
    for side, clocks in seconds.items():
        row = {f"{clock}_seconds": round(statistics.median(clocks[clock]), 5) for clock in clocks}
        for clock in clocks if side != "ours" else ():
            ratios = sorted(t / o for t, o in zip(clocks[clock], ours[clock]))
            row[f"{clock}_ratio"] = round(statistics.median(ratios), 3)
            row[f"{clock}_ratio_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        out[side] = row
    return out


# The first pattern found in "<shape> <path of the operation>" names the class of a compiled
# operation. A fusion carries the path of its last operation.
CLASSES = (
    ("convolution: gradient of the kernel", r"^\w+\[\d+,3,3,\d+\].*transpose\(jvp.*/conv_general"),
    ("convolution: gradient of the input", r"transpose\(jvp.*/conv_general"),
    ("convolution: forward", r"/conv_general"),
    ("normalisation", r"/norm\d?/"),
    ("attention and dense", r"attend|/dot_general|/qkv/|/proj/|/skip/|/affine/|/map_"),
    ("changes of layout", r" $"),
    ("activations, resizing, sums", r"UNet"),
    ("loss, optimiser, EMA", r""),
)


def profile(compiled, call: Callable, calls: int = 3) -> dict:
    """Milliseconds of the compiled step by class of operation, of the quickest of a few traces."""
    instruction = r"%?([\w.\-]+) = (\S+) [^\n]*?(?:op_name=\"([^\"]*)\"[^\n]*)?\n"
    kinds = {}
    for name, shape, path in re.findall(instruction, compiled.as_text()):
        text = f"{shape} {path}"
        kinds[name] = next(kind for kind, pattern in CLASSES if re.search(pattern, text))
    traces = []
    for _ in range(calls):
        total = Counter()
        for event in traced(call):
            if event.name in kinds:
                total[kinds[event.name]] += event.duration_ns / 1e6
        traces.append(total)
    quickest = min(traces, key=Counter.total)
    return {kind: round(quickest[kind], 2) for kind, _ in CLASSES}


def traced(call: Callable) -> list:
    """The events of all threads during one call."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        trace = jax.profiler.ProfileData.from_file(path)
    return [event for plane in trace.planes for line in plane.lines for event in line.events]


def counterpart(cores: int):
    """The module of their side, its threads set. Raises ValueError where it cannot be imported."""
    try:
        from launch import bench_diffusers
    except ImportError as error:
        raise ValueError(
            f"the comparison needs diffusers and torch ({error}): pip install diffusers torch"
        ) from None
    bench_diffusers.torch.set_num_threads(cores)
    return bench_diffusers


def compare(size: Size, rounds: int, theirs) -> dict:
    """Everything the record says about one size; `theirs` is the module of their side."""
    model = complete(size.model)
    params, net = random_weights(model), theirs.network(model)
    theirs.copy_weights(params, model, net)
    shape = (size.batch, model["resolution"], model["resolution"], 3)
    images = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    apart = theirs.difference(model, params, net, images[:2])
    calls, flops, compiled = our_calls(model, params, images)
    sides, counts = {"ours": calls}, {"ours": flops}
    for layout in FORMATS:
        sides[layout], counts["theirs"] = theirs.calls(
            copy.deepcopy(net), images, layout, DIFFUSION, RATE, DECAY
        )
    uses = {}
    for use in ("sampling", "training"):
        seconds = alternate({side: calls[use] for side, calls in sides.items()}, rounds)
        uses[use] = summary(seconds) | {"flops": {side: int(n[use]) for side, n in counts.items()}}
    return {
        "model": model,
        "batch": size.batch,
        "parameters": {
            "ours": param_count(params),
            "theirs": sum(p.numel() for p in net.parameters()),
        },
        "output_difference": float(f"{apart:.2g}"),
        "uses": uses,
        "profile_ms": profile(compiled, sides["ours"]["training"]),
    }


def table(sizes: dict) -> str:
    """The figures as text."""
    lines = []
    for name, figures in sizes.items():
        for use, sides in figures["uses"].items():
            ours = sides["ours"]
            lines.append(f"{name:>10} {use:<10} ours {1e3 * ours['wall_seconds']:9.1f} ms")
            for layout in FORMATS:
                row = sides[layout]
                lines.append(
                    f"{layout:>33} {1e3 * row['wall_seconds']:9.1f} ms  "
                    f"theirs / ours: {row['wall_ratio']:.2f} (CPU seconds: {row['cpu_ratio']:.2f})"
                )
        total = sum(figures["profile_ms"].values())
        lines += [
            f"{kind:>40} {value:9.1f} ms {100 * value / total:5.1f} %"
            for kind, value in figures["profile_ms"].items()
        ]
    return "\n".join(lines)


def run(sizes: dict[str, Size], rounds: int, workdir: str, record: str = "") -> dict:
    """Measure every size, write the record, and return the ratios for the closing line."""
    if rounds < 1:
        raise ValueError(f"--rounds={rounds} measures nothing: give 1 or more")
    began, load, cores = time.monotonic(), os.getloadavg()[0], len(os.sched_getaffinity(0))
    theirs, figures = counterpart(cores), {}
    for name, size in sizes.items():
        logging.info("bench: %s, %d rounds on %d cores", name, rounds, cores)
        figures[name] = compare(size, rounds, theirs)
    content = {
        "provenance": provenance() | theirs.VERSIONS,
        "cores": cores,
        "load_before": round(load, 2),
        "rounds": rounds,
        "settings": {name: os.environ.get(name, "") for name in SETTINGS}
        | {"memory": "freed memory stays in the process (launch/memory.py), for both sides"},
        "differences": theirs.DIFFERENCES,
        "sizes": figures,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(table(figures), flush=True)
    path = pathlib.Path(record or pathlib.Path(workdir) / "record.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs |= {f"{cores}_cores": content}  # a record holds one run for each number of cores
    path.write_text(json.dumps(runs, indent=1) + "\n")
    ratios = {
        name: {use: row["contiguous"]["wall_ratio"] for use, row in figure["uses"].items()}
        for name, figure in figures.items()
    }
    return {"record": str(path), "seconds": content["seconds"], "theirs_over_ours": ratios}


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    if options.cores:  # before either library starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    keep_memory()
    jax.config.update("jax_platforms", "cpu")  # also where there is an accelerator
    chosen = {name: SIZES[name] for name in options.sizes}
    execute(
        "bench",
        options.workdir,
        lambda: run(chosen, options.rounds, options.workdir, options.record),
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Where the summary goes.")
    flags.DEFINE_string("record", "", "Where the record (.json) goes instead.")
    flags.DEFINE_integer("rounds", 10, "Turns of each side.")
    flags.DEFINE_integer("cores", 0, "Cores to use; 0 = all.")
    flags.DEFINE_multi_enum("sizes", list(SIZES), list(SIZES), "What to measure.")
    flags.mark_flags_as_required(["workdir"])
    app.run(main)
