"""Optimisers by name. PaGoDA (arXiv 2405.14822) uses RAdam without schedule or clipping."""

import optax

OPTIMISERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "radam": optax.radam,
    "sgd": lambda lr, b2: optax.sgd(lr),
}


def make_optimiser(
    name: str, lr: float, *, warmup_steps: int = 0, decay_steps: int = 0, b2: float = 0.999
) -> optax.GradientTransformation:
    """The optimiser `name` of OPTIMISERS, with the schedule of `learning_rate`."""
    return OPTIMISERS[name](learning_rate(lr, warmup_steps, decay_steps), b2=b2)


def learning_rate(lr: float, warmup_steps: int = 0, decay_steps: int = 0) -> optax.ScalarOrSchedule:
    """A learning rate that rises linearly over `warmup_steps`, and then either is constant or, with
    decay_steps > 0, falls along a cosine to 0 at step `decay_steps`.

    Raises ValueError if the warm-up does not end before `decay_steps`.
    """
    if 0 < decay_steps <= warmup_steps:
        raise ValueError(
            f"optim.decay_steps is {decay_steps}, but the rate rises for optim.warmup_steps "
            f"{warmup_steps}: decay over more steps than that, or not at all (0)"
        )
    if decay_steps:
        return optax.warmup_cosine_decay_schedule(0.0, lr, warmup_steps, decay_steps)
    if warmup_steps:
        # From lr / warmup_steps in the first update to lr in update number warmup_steps.
        return optax.linear_schedule(lr / warmup_steps, lr, warmup_steps - 1)
    return lr
