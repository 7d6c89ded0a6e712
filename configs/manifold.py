"""PaGoDA's mechanisms on a 2-D manifold: the prior hole, weak teachers, stability.

Paper: Kim et al. 2024 (arXiv 2405.14822), Figure 5 (L_rec against L_dstl), section 3.2 (why both
terms) and Theorem 3.2 (stability), on two thin circles with an analytic teacher.
Hardware: 2 CPU cores, about 5 CPU-minutes for 5 seeds; `smoke` takes seconds and proves nothing.

    python -m launch.manifold --config=configs/manifold.py --workdir=runs/manifold
    python -m launch.manifold --config=configs/manifold.py:smoke --workdir=runs/manifold_smoke

Measured (5 seeds, notebooks/results/manifold.json), distance of samples from the circles where the
teacher's blur is 0.02, 0.1, 0.2: L_dstl + L_adv 0.055, 0.075, 0.111; L_rec + L_adv 0.071, 0.069,
0.069; L_rec alone 0.099, 0.094, 0.105. The adversarial arms are not converged: three times the
steps (2 seeds, teachers 0.02 and 0.2) give L_rec + L_adv 0.022 and 0.024, L_dstl + L_adv 0.024 and
0.059, but the energy distance of L_rec + L_adv rises from 0.004 to 0.022: coverage is lost.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = ""):
    args = common.parse_arg(arg, smoke=False, seeds=0)
    config = ConfigDict()
    # every seed has its own data, teacher pairs, weights and noise
    config.seeds = args.seeds or (2 if args.smoke else 5)
    config.points = 2000
    config.radii = (0.5, 0.8)
    config.blurs = (0.02, 0.1, 0.2)  # the teacher's weakness: it knows the data blurred by this
    config.nodes = 40
    config.teacher_pairs = 10000
    config.width = 128
    config.fourier_features = 64
    config.bandwidth = 6.0  # standard deviation of the discriminator's random frequencies
    config.batch_size = 128
    config.total_steps = 4200
    config.eval_every = 600
    config.eval_samples = 1500
    config.optim = common.optimiser("radam", 1e-3)
    config.optim_discriminator = common.optimiser("radam", 5e-4)
    config.ema_decay = 0.999
    config.adversarial_weight = 0.2  # times |grad L_rec| / |grad L_adv| at the hidden kernel
    config.dirac = ConfigDict(
        {"etas": (0.0, 0.01, 0.1, 1.0), "rate": 0.1, "steps": 400, "start": (1.0, 0.5)}
    )
    return smoke(config) if args.smoke else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The same experiment in seconds: what the tests run."""
    config.points = config.teacher_pairs = 64  # one shape, fewer compilations
    config.blurs = (0.02, 0.2)
    config.nodes = 6
    config.width, config.fourier_features = 16, 16
    config.batch_size, config.eval_samples = 16, 64
    config.total_steps, config.eval_every = 60, 30
    return config
