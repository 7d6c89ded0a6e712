"""Optimisers by name, from plain values. PaGoDA: RAdam, no schedule, no clipping (section 3.5)."""

import optax

OPTIMISERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "radam": optax.radam,
    "sgd": lambda lr, b1=0.0, b2=0.0, eps=0.0: optax.sgd(lr),
}
DECAYS = ("cosine", "tail")
TAIL = 0.2  # share of the steps in which the rate of "tail" falls


def make_optimiser(
    name: str,
    lr: float,
    *,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    decay: str = "cosine",
    clip_norm: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """name: one of OPTIMISERS. The rate rises linearly over `warmup_steps` (0 = at once), then is
    constant, or falls to 0 at `decay_steps`: as a cosine, or ("tail") linearly over their last
    fifth. clip_norm: global gradient norm, 0 = off.
    """
    if name not in OPTIMISERS:
        raise ValueError(
            f"optim.name {name!r} is unknown: choose one of {', '.join(sorted(OPTIMISERS))}"
        )
    if decay not in DECAYS:
        raise ValueError(f"optim.decay {decay!r} is unknown: choose one of {', '.join(DECAYS)}")
    if decay == "tail" and not decay_steps:
        raise ValueError("optim.decay is 'tail' with optim.decay_steps 0: say when the rate is 0")
    falling = max(1, round(TAIL * decay_steps)) if decay == "tail" else 0
    if 0 < decay_steps and decay_steps - falling <= warmup_steps:
        raise ValueError(
            f"optim.decay_steps is {decay_steps}, but the rate rises for optim.warmup_steps "
            f"{warmup_steps}: decay over more steps than that, or not at all (0)"
        )
    if falling:
        rise = optax.linear_schedule(0.0, lr, warmup_steps)
        fall = optax.linear_schedule(lr, 0.0, falling)
        rate = optax.join_schedules(
            [rise, optax.constant_schedule(lr), fall], [warmup_steps, decay_steps - falling]
        )
    elif decay_steps:
        rate = optax.warmup_cosine_decay_schedule(0.0, lr, warmup_steps, decay_steps)
    elif warmup_steps:
        rate = optax.linear_schedule(lr / warmup_steps, lr, warmup_steps - 1)
    else:
        rate = lr
    tx = OPTIMISERS[name](rate, b1=b1, b2=b2, eps=eps)
    return optax.chain(optax.clip_by_global_norm(clip_norm), tx) if clip_norm else tx
