"""The papers' main ablations as lists of argument strings, for every image config.

    python -m launch.sweep --config=configs/scenes.py --sweep=pairs \\
        --arg=size=quick,teacher=runs/teacher,latents=runs/latents --workdir=runs/pairs

A string with stage=NAME runs that stage; any other runs a whole pipeline, which pretrains a teacher
unless `teacher=DIR` is given. Every run is repeated with three seeds.
"""

SEEDS = (0, 1, 2)
SWEEPS: dict[str, tuple[str, ...]] = {
    # PaGoDA (arXiv 2405.14822), section 3.2: L_rec on inverted data against L_dstl on the
    # teacher's samples, both with and without the discriminator
    "losses": tuple(
        f"pipeline=one_step,distill.adversarial_weight={weight}{pairs}"
        for weight in (0.2, 0.0)
        for pairs in ("", ",invert.direction=sample,distill.pairs=teacher")
    ),
    # PaGoDA, section 3.3: L_rec on a small share of the pairs
    "pairs": tuple(f"stage=distill,distill.data_proportion={p}" for p in (1.0, 0.1, 0.01)),
    "distances": tuple(
        f"stage=distill,distill.feature_weight={feature},distill.pixel_weight={pixel}"
        for feature, pixel in ((1.0, 10.0), (1.0, 0.0), (0.0, 10.0))
    ),
    # PaGoDA: growth with and without L_rec
    "growth": ("stage=grow", "stage=grow,grow.feature_weight=0.0,grow.pixel_weight=0.0"),
    # self-cascade (arXiv 2402.10491): trained weights, and restart levels
    "tunings": tuple(
        f"stage=cascade,tune={tune}" for tune in ("neck", "full", "gain", "2k", "lora", "ft")
    ),
    "cascade_k": tuple(f"stage=cascade,cascade.k=t{k}" for k in (0.2, 0.3, 0.5, 0.7, 0.9)),
    # step-adaptive training (arXiv 2312.13307): the budget's k and order, the groups, the search
    "k": tuple(f"pipeline=experts,prune.k={k}" for k in (0.3, 0.5, 0.7)),
    "orders": tuple(
        f"pipeline=experts,prune.mean=0.8,prune.order={order}"
        for order in ("snr_up", "snr_down", "mid")
    ) + ("pipeline=experts,prune.mean=0.8,prune.order=flat",),
    "groups": tuple(f"pipeline=experts,prune.groups={n}" for n in (3, 5, 8)),
    "partitions": tuple(
        f"pipeline=experts,prune.partition={kind}" for kind in ("equal", "decibels", "loss")
    ),
    "search": ("pipeline=experts", "pipeline=experts,prune.remember=False",
               "pipeline=experts,prune.proposer=uniform",
               "pipeline=experts,prune.proposer=uniform,prune.importance=magnitude"),
    "training": ("pipeline=experts", "pipeline=experts,prune.overlap=0",
                 "pipeline=experts,prune.base_target=0.5", "pipeline=experts,prune.start=scratch"),
    # one pruned network for all noise levels; multiply total_steps by the number of groups to
    # give it as many updates as the experts have together
    "single_network": ("pipeline=experts,prune.groups=1,prune.order=flat,prune.mean=0.8",),
}  # fmt: skip


def sweep(name: str) -> list[str]:
    """The argument strings of the study `name`; ValueError for an unknown name."""
    if name not in SWEEPS:
        raise ValueError(f"sweep {name!r} is unknown: choose one of {', '.join(SWEEPS)}")
    return [f"{words},seed={seed}" for seed in SEEDS for words in SWEEPS[name]]
