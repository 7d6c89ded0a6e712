"""The papers' main ablations as lists of argument strings, for every image config.

    python -m launch.sweep --config=configs/scenes.py --sweep=pairs --arg=size=ablation \\
        --measure=mobilenet_v2=FILE --workdir=runs/sweeps

A string with stage=NAME runs that stage; any other runs a pipeline. The first string of a sweep is
its control: the table has the paired differences of all others from it. Every run is repeated with
three seeds. FLOPs and updates are those of size=ablation in configs/scenes.py, with which sweeps
`inversion` to `base` in one work directory take about four hours of one CPU core.
"""

SEEDS = (0, 1, 2)
ONE = "pipeline=one_step"
MANY = f"{ONE},data.options.size=3000"
RATIONS = "data.options.size=200,invert.nodes=10"  # else inversion takes all
STEADY = "optim.decay_steps=0"  # the rate, where FLOPs decide how many updates there are


def both(word: str) -> str:
    """A word of stage distill, and of the regression from which it starts."""
    return f"regress.{word},distill.{word}"


SWEEPS: dict[str, tuple[str, ...]] = {
    # PaGoDA (arXiv 2405.14822), section 3.1: nodes of the inversion (the paper has 40); latents
    # of the prior's size by the images' noise, as size=ablation has it, by a factor, or not at all,
    # as in the paper.
    "inversion": (
        ONE, *(f"{ONE},invert.nodes={n}" for n in (10, 40, 160)), f"{ONE},invert.noise=0.0",
        f"{ONE},invert.noise=0.0,rescale_latents=True",
    ),
    # Section 3.3: L_rec on a small share of the pairs. The paper: 1 % loses nothing.
    "pairs": (MANY, *(f"{MANY},{both(f'data_proportion={p}')}" for p in (0.1, 0.02))),
    # Section 3.3: x4 in one jump, for the FLOPs of x2 twice. The paper: as good.
    "jump": tuple(
        f"top=32{jump},grow32.total_flops=6e12,grow32.{STEADY}" for jump in ("", ",jump=True")
    ),
    # Section 3.3: the paper freezes all but the end of the decoder.
    "freezing": ("top=16", "top=16,grow.freeze=False"),
    # Figure 5: L_rec on inverted data against L_dstl on the teacher's samples, for teachers that
    # were stopped early. The paper: L_rec does not depend on the teacher, L_dstl does.
    "teachers": tuple(
        f"{ONE},pretrain.total_steps={steps}{pairs}"
        for steps in (1000, 200, 50)
        for pairs in ("", f",invert.direction=sample,{both('pairs=teacher')}")
    ),
    # The same with and without the discriminator.
    "losses": tuple(
        f"{ONE},distill.adversarial_weight={weight}{pairs}"
        for weight in (0.2, 0.0)
        for pairs in ("", f",invert.direction=sample,{both('pairs=teacher')}")
    ),
    # Table 2: base resolutions, here for equal FLOPs in all (teacher, inversion, generators). The
    # paper: 32 and 64 px are equally good, below 32 px is too hard.
    "base": tuple(
        f"base={base},top=32,{RATIONS},{STEADY},pretrain.batch_size=16,pretrain.total_flops=2e12,"
        + rest
        for base, rest in (
            (8, "distill.total_flops=3e12,grow16.total_flops=4e12,grow32.total_flops=6e12"),
            (16, "distill.total_flops=4e12,grow32.total_flops=6e12"),
            (32, "distill.total_flops=6e12"),
        )
    ),
    "distances": tuple(
        f"{ONE},distill.feature_weight={feature},distill.pixel_weight={pixel}"
        for feature, pixel in ((1.0, 10.0), (1.0, 0.0), (0.0, 10.0))
    ),
    # Growth: also without a regression of pixels before it, and without any L_rec.
    "growth": (
        "top=16", "top=16,regress16.total_steps=1",
        "top=16,regress16.total_steps=1,grow.feature_weight=0.0,grow.pixel_weight=0.0",
    ),
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
    """The argument strings of the study `name`, seed by seed; ValueError for an unknown name."""
    if name not in SWEEPS:
        raise ValueError(f"sweep {name!r} is unknown: choose one of {', '.join(SWEEPS)}")
    return [f"{words},seed={seed}" for seed in SEEDS for words in SWEEPS[name]]
