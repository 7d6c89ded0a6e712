"""What downsampling and freezing save, counted from compiled single calls; nothing is trained.

    python -m launch.cost --workdir=runs/cost --record=notebooks/results/cost.json

1. Pretraining: FLOPs of one denoising gradient at full, 1/2, 1/4 and 1/8 resolution, one network.
2. Growth: for each doubling, the share of parameters that train, and the FLOPs of the generator's
   gradient with the frozen part left out, against training all of it (spec section 4).
3. Growth at step 0: the features at the end of the grown decoder against nearest enlargement of
   the old ones, which they must equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from cheapscale.evaluation.cost import cost_of_call
from cheapscale.models.generator import count, grow_params, trainable
from cheapscale.models.layers import upsample
from cheapscale.models.unet import plan, unet
from cheapscale.training.loop import provenance
from cheapscale.training.state import merge, split
from configs.models import preset
from launch.command import execute, start, write_record


def shapes(net, resolution: int):
    """Abstract parameters of a network, and its arguments for a batch of 8."""
    x = jax.ShapeDtypeStruct((8, resolution, resolution, 3), jnp.float32)
    noise = jax.ShapeDtypeStruct((8,), jnp.float32)
    label = jax.ShapeDtypeStruct((8,), jnp.int32)
    params = jax.eval_shape(
        lambda k, *a: net.init(k, *a)["params"], jax.random.key(0), x, noise, label
    )
    return params, (x, noise, label)


def gradient_flops(net, resolution: int, keep=lambda path: True) -> float:
    """FLOPs for each image of one gradient with respect to the leaves that `keep` names."""
    params, arguments = shapes(net, resolution)
    moving, fixed = split(params, keep)

    def gradient(moving, fixed, *arguments):
        def loss(moving):
            return jnp.mean(net.apply({"params": merge(moving, fixed)}, *arguments) ** 2)

        return jax.grad(loss)(moving)

    return cost_of_call(gradient, moving, fixed, *arguments).flops / 8


def pretraining(sizes: tuple[int, ...] = (64, 32, 16, 8)) -> dict:
    """{resolution: FLOPs per image, and relative to the first}."""
    model = preset("tiny8", attention=(), num_classes=8)
    flops = {r: gradient_flops(unet(**model | {"resolution": r}), r) for r in sizes}
    return {str(r): {"flops": f, "ratio": f / flops[sizes[0]]} for r, f in flops.items()}


def growth(base: int = 16, doublings: int = 3) -> dict:
    """{resolution: trainable share of parameters and of gradient FLOPs} of a grown tiny network."""
    rows = {}
    for n in range(1, doublings + 1):
        net = unet(**preset("tiny16", num_classes=10, growth=(32,) * n))
        keep = trainable(net.config)
        params, _ = shapes(net, base)
        some, every = gradient_flops(net, base, keep), gradient_flops(net, base)
        rows[str(base * 2**n)] = {
            "parameters": count(params),
            "trainable": count(params, keep),
            "trainable_share": count(params, keep) / count(params),
            "gradient_flops": some,
            "gradient_flops_if_all_trained": every,
            "flops_share": some / every,
        }
    return rows


def seamless(base: int = 8) -> dict:
    """Largest difference between grown features and enlarged old ones, at step 0."""
    model = preset("tiny8", num_classes=8)
    old, new = unet(**model), unet(**model | {"growth": (32, 32)})
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (4, base, base, 3))
    arguments = (x, jnp.zeros(4), jnp.arange(4))
    noisy = lambda tree, key: jax.tree.map(  # noqa: E731 - nothing may vanish by being zero
        lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), tree
    )
    trained = noisy(old.init(keys[1], *arguments)["params"], keys[2])
    params, _ = grow_params(new.init(keys[3], *arguments)["params"], trained, new.config)
    last = [b.name for b in plan(old.config) if b.kind == "res"][-1]
    end = [b.name for b in plan(new.config) if b.kind == "res"][-1]
    _, before = old.apply({"params": trained}, *arguments, taps=(last,))
    _, after = new.apply({"params": params}, *arguments, taps=(end,))
    enlarged = upsample(upsample(before[last], (1, 1)), (1, 1))
    return {"doublings": 2, "max_difference": float(np.abs(after[end] - enlarged).max())}


def run(record: str | None) -> dict:
    figures = {
        "pretraining": pretraining(),
        "growth": growth(),
        "seamless": seamless(),
        "provenance": provenance(),
    }
    for resolution, row in figures["pretraining"].items():
        print(f"pretraining at {resolution:>3} px  {row['flops']:.3g} FLOPs  {row['ratio']:.4f}")
    for resolution, row in figures["growth"].items():
        print(
            f"growth to {resolution:>3} px  parameters that train {row['trainable_share']:.3f}  "
            f"gradient FLOPs {row['flops_share']:.3f}"
        )
    write_record(record, figures)
    return figures


def main(argv) -> None:
    del argv
    execute("cost", flags.FLAGS.workdir, lambda: run(flags.FLAGS.record))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/cost", "Where the summary goes.")
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    start(main)
