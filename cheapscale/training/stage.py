"""The interfaces `Stage` and `Job` of all stages, and the training step of denoising regression.

A `Stage` trains networks; a `Job` maps a function over data. `launch/train.py` builds the one that
`config.stage` names and passes it to `loop.train` or `jobs.run`. Steps are pure functions of
(state, frozen, batch, key); a stage binds other arguments with functools.partial.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cheapscale.data.loader import Transform, stream
from cheapscale.data.source import Source
from cheapscale.training.optim import make_optimiser
from cheapscale.training.state import Optimiser, TrainState, merge, update_ema

PyTree = Any


class Stage(NamedTuple):
    """A training stage, as the loop needs it.

    init_params(key) -> ({net: params}, {net: extra}): traceable, reads no files.
    optimisers: {net: Optimiser}, one for each network that is trained.
    step(state, frozen, batch, key) -> (state, {name: scalar}): pure; compiled once, state donated.
    batches(start_step) -> iterator of nested dicts of NumPy arrays with this process's rows: a pure
        function of the step, so that resuming needs no iterator state.
    load_frozen() -> (weights, {network: SHA-256}): weights that are an argument of `step` but are
        not trained, donated or saved; `meta` records the hashes. May fit a classifier first.
    frozen_shapes() -> the same weights as ShapeDtypeStructs, without fitting anything.
    warm_start(params) -> params with weights of other runs; only called for a new work directory.
    evals: name -> (interval in steps, fn(state, frozen) -> {name: scalar or uint8 image}).
    meta: JSON values that are saved beside the weights, and from which the networks are rebuilt.
    batch_size: global; the mesh has to divide it.
    fits: {network: description} of the networks that load_frozen has yet to fit.
    compiler_options: of the compilation of `step`.
    """

    init_params: Callable[[jax.Array], tuple[PyTree, PyTree]]
    optimisers: dict[str, Optimiser]
    step: Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, dict]]
    batches: Callable[[int], Iterator[PyTree]]
    load_frozen: Callable[[], tuple[PyTree, dict[str, str]]]
    frozen_shapes: Callable[[], PyTree]
    warm_start: Callable[[PyTree], PyTree]
    evals: dict[str, tuple[int, Callable]]
    meta: dict
    batch_size: int
    fits: dict[str, str]
    compiler_options: dict[str, str] | None = None


class Job(NamedTuple):
    """A computation in numbered shards, which trains nothing.

    items_per_shard: number of results in a shard, for the rate and the time left in the log.
    prepare() -> context (weights, data); writes the first files.
    done(shard) -> whether the shard is written.
    run_shard(context, shard, mesh) -> {name: number} for the log; writes the shard atomically.
    finish(context) -> summary; called when every shard is done.
    describe() -> further entries of a dry run's plan, such as FLOPs: "disk_bytes" is the largest
        size of the remaining shards, and "disk" their folder.
    """

    num_shards: int
    items_per_shard: int
    prepare: Callable[[], Any]
    done: Callable[[int], bool]
    run_shard: Callable[[Any, int, Any], dict]
    finish: Callable[[Any], dict]
    describe: Callable[[], dict] = dict


NOISE_BINS = 16  # the loss is logged in this many bins of ln sigma


def noise_bins() -> dict:
    """Empty running means of the loss in equal bins of ln sigma, over EDM's sigma, 0.002 to 80."""
    edges = jnp.linspace(-6.2, 4.4, NOISE_BINS + 1)
    return {"edges": edges, "loss": jnp.zeros(NOISE_BINS), "count": jnp.zeros(NOISE_BINS)}


def update_noise_bins(bins: dict, loss: jax.Array, sigma: jax.Array, rate: float = 0.99) -> dict:
    """The running means after one batch of loss [b] and sigma [b]; empty bins do not change."""
    index = jnp.clip(jnp.searchsorted(bins["edges"], jnp.log(sigma)) - 1, 0, NOISE_BINS - 1)
    # A sum over one-hot rows has a static shape, unlike selecting the rows of each bin.
    member = jax.nn.one_hot(index, NOISE_BINS)
    count = member.sum(0)
    mean = (member * loss[:, None]).sum(0) / jnp.maximum(count, 1.0)
    first = bins["count"] == 0  # the first mean of a bin replaces its initial 0
    moved = jnp.where(first, mean, rate * bins["loss"] + (1 - rate) * mean)
    return bins | {
        "loss": jnp.where(count > 0, moved, bins["loss"]),
        "count": bins["count"] + count,
    }


def denoise_step(
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    loss_fn: Callable,
    optimiser: Optimiser,
    ema_decay: float,
    net: str = "net",
) -> tuple[TrainState, dict]:
    """(new state, metrics) after one step of denoising regression: gradient, optimiser, EMA.

    loss_fn(params, frozen, batch, key) -> (weighted loss [b], sigma [b]), such as
    `diffusion.denoiser.denoising_loss` with EDM's loss (arXiv 2206.00364, Eq. 8).
    """
    # Only the trainable leaves are differentiated: frozen ones need no memory for gradients.
    moving, fixed = optimiser.split(state.params[net])

    def objective(moving):
        loss, sigma = loss_fn(merge(moving, fixed), frozen, batch, key)
        return loss.mean(), (loss, sigma)

    (mean, (loss, sigma)), grads = jax.value_and_grad(objective, has_aux=True)(moving)
    params, opt_state = optimiser.apply(grads, state.opt_state[net], state.params[net])
    ema = update_ema(state.ema_params[net], optimiser.split(params)[0], state.step, ema_decay)
    bins = update_noise_bins(state.extra[net], jax.lax.stop_gradient(loss), sigma)
    new = state.replace(
        step=state.step + 1,
        params=state.params | {net: params},
        ema_params={net: ema},
        opt_state=state.opt_state | {net: opt_state},
        extra=state.extra | {net: bins},
    )
    return new, {"loss": mean, "grad_norm": optax.tree.norm(grads)}  # the norm before clipping


def denoise_stage(
    config,
    source: Source,
    *,
    init: Callable[[jax.Array], PyTree],
    loss_fn: Callable,
    meta: dict,
    warm_start: Callable[[PyTree], PyTree],
    trainable: Callable[[str], bool] | None = None,
    transform: Transform | None = None,
    frozen: PyTree = None,
    evals: dict | None = None,
    net: str = "net",
) -> Stage:
    """The Stage that trains the network `net` on images of `source` by `denoise_step`.

    init: key -> its params. transform: of each image. frozen: weights that loss_fn reads.
    """
    optimiser, frozen = Optimiser(make_optimiser(**config.optim), trainable), frozen or {}
    place = jax.process_index(), jax.process_count()
    return Stage(
        init_params=lambda key: ({net: init(key)}, {net: noise_bins()}),
        optimisers={net: optimiser},
        step=functools.partial(
            denoise_step, loss_fn=loss_fn, optimiser=optimiser, ema_decay=config.ema.decay, net=net
        ),
        batches=stream(config, source, transform, process=place),
        load_frozen=lambda: (frozen, {}),
        frozen_shapes=lambda: jax.eval_shape(lambda weights: weights, frozen),
        warm_start=warm_start,
        evals=evals or {},
        meta=meta,
        batch_size=config.batch_size,
        fits={},
    )
