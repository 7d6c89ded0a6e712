"""The cost of an image of a one-step generator and of the samplers that it replaces.

For a generator grown from r to R px (PaGoDA, arXiv 2405.14822), with random weights for teachers:

    one_step        G(z, y), one network call
    teacher<r>      Heun's method with the generator's own U-Net without the grown blocks
    teacher<R>      the same with a U-Net for R px: one level of multiplier 1 on top for each
                    doubling, as in ADM's networks of 64 and 128 px (arXiv 2105.05233, Table 4)
    ... guided      classifier-free guidance, whose every evaluation has twice the batch

FLOPs are those of one compiled network call times the number of calls. So are seconds: those of a
sampler's own arithmetic are left out, which is no advantage for the generator.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.samplers import nfe
from cheapscale.models.unet import init_params, unet
from cheapscale.teacher import Generator, Teacher, load
from cheapscale.teacher.sampling import levels, one_step
from cheapscale.teacher.teacher import Origin
from cheapscale.training.log import markdown

PyTree = Any
GUIDANCE = 2.0  # any scale but 0 and 1 costs the same


def measure(
    workdir: str, *, steps: int, batch: int, rounds: int, paired: Callable[..., dict]
) -> dict:
    """{"model", "steps", "batch", "rows": {name: {"calls", "flops", "seconds", "ratio"}}}, for one
    image; a ratio divides a row's seconds by the generator's.

    workdir: of stage distill or grow. paired: launch.bench's, which times calls in turns.
    """
    generator = load(workdir)
    if not isinstance(generator, Generator):
        raise ValueError(f"{workdir} holds no one-step generator: give --model=DIR of stage grow")
    sides = {"one_step": (one_step, generator, 1)}
    for teacher in teachers(generator):
        evaluations = int(nfe(levels(teacher.process, steps)))
        for name, scale in (("", 1.0), (" guided", GUIDANCE)):
            call = functools.partial(denoise, scale=scale)
            sides[f"teacher{teacher.resolution}{name}"] = (call, teacher, evaluations)
    programs, flops = {}, {}
    for name, (call, model, evaluations) in sides.items():
        z = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *model.shape)), jnp.float32)
        inputs = (jax.tree.map(jnp.asarray, model), z, jnp.zeros(batch, jnp.int32))
        program = jax.jit(call).lower(*inputs).compile()
        flops[name] = program.cost_analysis()["flops"] * evaluations / batch
        programs[name] = functools.partial(waited, program, inputs)
    rows = {}
    for name, found in paired(programs, rounds).items():
        evaluations = sides[name][2]
        rows[name] = {
            "calls": evaluations * (2 if "guided" in name else 1),
            "flops": flops[name],
            "seconds": found["seconds"] * evaluations / batch,
            "ratio": round(found["ratio"] * evaluations, 2),
        }
    print(table(rows))
    return {"model": workdir, "steps": steps, "batch": batch, "rows": rows}


def teachers(generator: Generator) -> list[Teacher]:
    """Teachers for the generator's base and for its output resolution, with random weights."""
    fields, doublings = generator.fields | {"growth": ()}, len(generator.net.config.growth)
    large = {
        "resolution": generator.net.config.output_resolution,
        "channel_mult": (1,) * doublings + generator.net.config.channel_mult,
    }
    return [
        Teacher(weights(row), unet(**row), generator.process, Origin(generator.meta))
        for row in ([fields, fields | large] if doublings else [fields])
    ]


def weights(fields: dict) -> PyTree:
    """Small random weights for a U-Net with these fields."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_params, fields), jax.random.key(0))
    return jax.tree.map(lambda s: (0.02 * rng.standard_normal(s.shape)).astype(s.dtype), shapes)


def denoise(teacher: Teacher, x: jax.Array, label: jax.Array, *, scale: float) -> jax.Array:
    """One evaluation of the sampler, D_w(x; 1, label)."""
    return teacher.denoiser(label, cfg_scale=scale)(x, 1.0)


def waited(program: Callable, inputs: tuple) -> None:
    """Run a compiled program to its end."""
    jax.block_until_ready(program(*inputs))


def table(rows: dict[str, dict]) -> str:
    """The rows as a Markdown table."""
    lines = [("model", "network calls", "GFLOP an image", "ms an image", "ratio")]
    for name, row in rows.items():
        flops, seconds = f"{row['flops'] / 1e9:.3g}", f"{1e3 * row['seconds']:.3g}"
        lines.append((name, row["calls"], flops, seconds, f"{row['ratio']:.4g}"))
    return markdown(lines)
