"""The paper's mechanisms on a 2-D manifold, through the package's own step, denoiser and solver.

Data are points of two thin circles, where "off the manifold" is a distance. The teacher is the
*exact* denoiser of the n data points blurred by h: h small is a good teacher, h large a weak one.

    (1)  p_h = (1/n) sum_i N(x_i, h^2 I),   w_i = softmax_i( -|x - x_i|^2 / 2 (h^2 + s^2) )
         D_h(x; s) = m + h^2 / (h^2 + s^2) (x - m),   m = sum_i w_i x_i
    (2)  L_rec  = E_x |x - G(E(x))|^2          E: the ODE of D_h solved upwards (inversion)
         L_dstl = E_z |DDIM(z) - G(z)|^2       DDIM: the same ODE solved downwards
         L_adv  = hinge on fresh prior noise z ~ N(0, sigma_max^2 I)

Every run is one `gan_step` with an MLP generator; arms differ in the pairs they regress and in
whether the discriminator plays. The same seed means the same data, weights and noise in each arm.

`dirac` is the example of the stability theorem: G = theta, D = psi x, data at 0, L_rec = theta^2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.denoiser import Denoiser, one_step
from cheapscale.diffusion.process import inversion_grid, sampling_grid
from cheapscale.diffusion.solvers import solve
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import gan_step
from cheapscale.training.state import Optimiser, TrainState, create_state, stream_key

PyTree = Any

SIGMA_MAX = 80.0

# arm -> (pairs it regresses, weight of the regression, does the discriminator play)
ARMS = {
    "dstl": ("teacher", 1.0, False),
    "dstl+adv": ("teacher", 1.0, True),
    "rec": ("data", 1.0, False),
    "rec+adv": ("data", 1.0, True),
    "rec rescaled": ("rescaled", 1.0, False),
    "rec+adv rescaled": ("rescaled", 1.0, True),
}
# knows no teacher: the discriminator alone
ADVERSARIAL_ONLY = ("data", 0.0, True)


def circles(key: jax.Array, count: int, radii: tuple[float, ...]) -> jax.Array:
    """`count` points [count, 2], each on a circle drawn at random, at a uniform angle."""
    k_radius, k_angle = jax.random.split(key)
    radius = jax.random.choice(k_radius, jnp.asarray(radii), (count,))
    angle = jax.random.uniform(k_angle, (count,), maxval=2 * np.pi)
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)


def off_manifold(x: jax.Array, radii: tuple[float, ...]) -> jax.Array:
    """Distance [b] of points [b, 2] from the nearest circle."""
    radius = jnp.linalg.norm(x, axis=-1)
    return jnp.abs(radius[:, None] - jnp.asarray(radii)[None]).min(-1)


def energy_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two samples [n, 2], [m, 2], each with itself too."""

    def mean_distance(a, b):
        return jnp.sqrt(jnp.square(a[:, None] - b[None]).sum(-1)).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def blurred(points: jax.Array, blur: Any) -> Denoiser:
    """Equation (1): the exact denoiser D(x [b, 2], sigma) of `points` [n, 2] blurred by `blur`."""

    def denoise(x: jax.Array, sigma: Any) -> jax.Array:
        variance = blur**2 + sigma**2
        inner = jnp.matmul(x, points.T, precision="highest")
        weights = jax.nn.softmax((inner - 0.5 * jnp.square(points).sum(-1)[None]) / variance)
        mean = jnp.matmul(weights, points, precision="highest")
        return mean + blur**2 / variance * (x - mean)

    return denoise


@functools.partial(jax.jit, static_argnames="nodes")
def invert(points: jax.Array, blur: Any, nodes: int) -> jax.Array:
    """E(x): latents [seeds, n, 2] of each seed's points under the teacher fitted to them."""
    grid = inversion_grid(nodes)
    return jax.lax.map(lambda x: solve([(blurred(x, blur), grid)], x), points)


@functools.partial(jax.jit, static_argnames="nodes")
def sample(points: jax.Array, blur: Any, z: jax.Array, nodes: int) -> jax.Array:
    """DDIM(z): teacher samples [seeds, m, 2] of prior noise z [seeds, m, 2]."""
    grid = sampling_grid(nodes)
    return jax.lax.map(lambda xz: solve([(blurred(xz[0], blur), grid)], xz[1]), (points, z))


def prior(seeds: jax.Array, stream: str, count: int) -> jax.Array:
    """Prior noise [seeds, count, 2], each seed's own."""
    return SIGMA_MAX * jax.vmap(
        lambda seed: jax.random.normal(stream_key(seed, stream, 0), (count, 2))
    )(seeds)


def rms(z: jax.Array) -> jax.Array:
    """Root mean square coordinate of each seed's latents, [seeds, n, 2] -> [seeds]."""
    return jnp.sqrt(jnp.square(z).mean((1, 2)))


def init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> PyTree:
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense{i}": {"kernel": jax.random.normal(k, (m, n)) / m**0.5, "bias": jnp.zeros(n)}
        for i, (k, m, n) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def apply_mlp(params: PyTree, x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        layer = params[f"dense{i}"]
        x = (jax.nn.silu(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


def generate(params: PyTree, z: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """G(z [b, 2]) -> [b, 2], the package's one-step parameterisation of an MLP."""
    return one_step(lambda x, noise: apply_mlp(params, x), z, SIGMA_MAX)


def discriminate(params, extra, frozen, x, label, key):
    """Logits [b, 1] of an MLP on frozen random Fourier features."""
    phase = x @ frozen["frequencies"] + frozen["phases"][None]
    return apply_mlp(params, 2**0.5 * jnp.cos(phase)), extra


def squared_error(frozen, x, y, key):
    return jnp.square(x - y).sum(-1)


def init_run(
    seed: jax.Array, *, optimisers: dict, width: int, fourier_features: int, bandwidth: float
) -> tuple[TrainState, PyTree]:
    """(state, frozen) of one seed."""
    keys = jax.random.split(stream_key(seed, "init", 0), 4)
    params = {
        "generator": init_mlp(keys[0], (2, width, width, 2)),
        "discriminator": init_mlp(keys[1], (fourier_features, width, 1)),
    }
    frozen = {
        "frequencies": bandwidth * jax.random.normal(keys[2], (2, fourier_features)),
        "phases": jax.random.uniform(keys[3], (fourier_features,), maxval=2 * np.pi),
    }
    return create_state(params, {"discriminator": {}}, optimisers, ["generator"]), frozen


@functools.partial(jax.jit, static_argnames=("step", "batch_size", "count"), donate_argnums=0)
def advance(
    state: TrainState,
    frozen: PyTree,
    pairs: PyTree,
    points: jax.Array,
    seeds: jax.Array,
    *,
    step: Callable,
    batch_size: int,
    count: int,
) -> TrainState:
    """`count` steps of every seed at once; each leaf has the leading axis [seeds]."""

    def one(state, frozen, pairs, points, seed):
        k_pair, k_real, k_step = jax.random.split(stream_key(seed, "step", state.step), 3)
        i = jax.random.randint(k_pair, (batch_size,), 0, len(pairs["z"]))
        j = jax.random.randint(k_real, (batch_size,), 0, len(points))
        label = jnp.zeros(batch_size, jnp.int32)
        batch = {
            "pair": {"image": pairs["x"][i], "z": pairs["z"][i], "label": label},
            "real": {"image": points[j], "label": label},
        }
        return step(state, frozen, batch, k_step)[0]

    def body(state, _):
        return jax.vmap(one)(state, frozen, pairs, points, seeds), None

    return jax.lax.scan(body, state, length=count)[0]


@functools.partial(jax.jit, static_argnames="radii")
def measure(x: jax.Array, fresh: jax.Array, radii: tuple[float, ...]) -> dict:
    """Quality [seeds] of samples [seeds, m, 2] against fresh data of the same shape."""
    return {
        "off_manifold": off_manifold(x.reshape(-1, 2), radii).reshape(x.shape[:2]).mean(-1),
        "energy": jax.lax.map(lambda pair: energy_distance(*pair), (x, fresh)),
    }


@jax.jit
def reconstruction_rmse(params: PyTree, z: jax.Array, x: jax.Array) -> jax.Array:
    """sqrt(E|G(z) - x|^2), Euclidean over both coordinates, [seeds]."""
    return jnp.sqrt(jnp.square(jax.vmap(generate)(params, z) - x).sum(-1).mean(-1))


def statistics(values: dict) -> dict:
    """{metric: [seeds]} -> {metric: {mean, sd, seeds}}; sd is the sample's (0 of one seed)."""
    summary = {}
    for name, value in values.items():
        value = np.asarray(value, np.float64)
        sd = value.std(ddof=1) if len(value) > 1 else 0.0
        seeds = [round(float(v), 6) for v in value]
        summary[name] = {"mean": float(value.mean()), "sd": float(sd), "seeds": seeds}
    return summary


class Experiment:
    """What all arms share: each seed's data, prior noise, initial state, and the measurement."""

    def __init__(self, config):
        if config.total_steps % config.eval_every:
            raise ValueError(
                f"eval_every {config.eval_every} must divide total_steps {config.total_steps}"
            )
        self.config, self.radii = config, tuple(config.radii)
        self.seeds = jnp.arange(config.seeds)
        self.points = self.draw("data", config.points)
        self.fresh = self.draw("fresh", config.eval_samples)
        self.prior = prior(self.seeds, "eval prior", config.eval_samples)
        self.optimisers = {
            "generator": Optimiser(make_optimiser(**config.optim)),
            "discriminator": Optimiser(make_optimiser(**config.optim_discriminator)),
        }
        self.init = jax.jit(
            jax.vmap(
                functools.partial(
                    init_run,
                    optimisers=self.optimisers,
                    width=config.width,
                    fourier_features=config.fourier_features,
                    bandwidth=config.bandwidth,
                )
            )
        )
        self.step = functools.cache(self.make_step)

    def draw(self, stream: str, count: int) -> jax.Array:
        """Fresh data [seeds, count, 2]."""
        key = jax.vmap(lambda seed: stream_key(seed, stream, 0))(self.seeds)
        return jax.vmap(lambda k: circles(k, count, self.radii))(key)

    def make_step(self, reconstruction_weight: float, plays: bool) -> Callable:
        return functools.partial(
            gan_step,
            generate=generate,
            discriminate=discriminate,
            distance=squared_error,
            optimisers=self.optimisers,
            sigma_max=SIGMA_MAX,
            ema_decay=self.config.ema_decay,
            adversarial_weight=self.config.adversarial_weight if plays else 0.0,
            reconstruction_weight=reconstruction_weight,
            adaptive_layer="dense1/kernel",  # the last hidden kernel, as in the published code
        )

    def pairs(self, blur: float) -> dict:
        """{name: {z, x}} of one teacher: its samples, the inverted data, the same at rms 80."""
        nodes = self.config.nodes
        z = prior(self.seeds, "teacher prior", self.config.teacher_pairs)
        latents = invert(self.points, blur, nodes)
        return {
            "teacher": {"z": z, "x": sample(self.points, blur, z, nodes)},
            "data": {"z": latents, "x": self.points},
            "rescaled": {
                "z": latents * (SIGMA_MAX / rms(latents))[:, None, None],
                "x": self.points,
            },
        }

    def train(self, pairs: dict, arm: tuple) -> tuple[dict, jax.Array]:
        """One arm, all seeds: (figures with their curve over training, samples [seeds, m, 2]).

        The reconstruction is always that of the data's latents, whatever the arm regressed.
        """
        name, weight, plays = arm
        known = pairs["rescaled" if name == "rescaled" else "data"]
        state, frozen = self.init(self.seeds)
        every, curve = self.config.eval_every, []
        for done in range(every, self.config.total_steps + 1, every):
            state = advance(
                state, frozen, pairs[name], self.points, self.seeds,
                step=self.step(weight, plays), batch_size=self.config.batch_size, count=every,
            )  # fmt: skip
            ema = state.ema_params["generator"]
            samples = jax.vmap(generate)(ema, self.prior)
            figures = measure(samples, self.fresh, self.radii)
            figures["reconstruction_rmse"] = reconstruction_rmse(ema, known["z"], known["x"])
            means = {name: float(value.mean()) for name, value in figures.items()}
            curve.append({"step": done} | means)
        return statistics(figures) | {"curve": curve}, samples


def experiment(config, report: Callable[[str], None]) -> tuple[dict, dict]:
    """Every teacher, arm and seed: (figures, {row: {panel: points [m, 2] of the first seed}})."""
    game = Experiment(config)
    floor = measure(game.draw("floor", config.eval_samples), game.fresh, game.radii)
    figures = {"fresh data": statistics(floor), "teachers": {}}
    pictures = {}
    for blur in config.blurs:
        report(f"teacher h = {blur}: {2 * (config.nodes - 1)} calls to invert the data")
        pairs = game.pairs(blur)
        shown = pairs["teacher"]["x"][:, : config.eval_samples]
        own = measure(shown, game.fresh[:, : shown.shape[1]], game.radii)
        own["rms_over_sigma_max"] = rms(pairs["data"]["z"]) / SIGMA_MAX
        row = {"itself": statistics(own), "arms": {}}
        panels = {"data": game.points[0], "teacher": shown[0]}
        for name, arm in ARMS.items():
            report(f"teacher h = {blur}: {name}")
            row["arms"][name], samples = game.train(pairs, arm)
            panels[name] = samples[0]
        figures["teachers"][str(blur)] = row
        pictures[f"h = {blur}"] = {name: np.asarray(x) for name, x in panels.items()}
    report("no teacher: adversarial term alone")
    figures["adv"], samples = game.train(pairs, ADVERSARIAL_ONLY)
    for panels in pictures.values():
        panels["adv"] = np.asarray(samples[0])
    figures["dirac"] = dirac(**config.dirac)
    return figures, pictures


def dirac(etas: tuple, rate: float, steps: int, start: tuple[float, float]) -> dict:
    """|(theta, psi)| after `steps` of eta theta^2 + f(0) + f(-psi theta), f = log sigmoid.

    {eta: {discriminator_first: by gan_step, discriminator_first_float64, generator_first_float64}}:
    the step lets the discriminator move first, the specification's figures the generator.
    """
    optimisers = {n: Optimiser(make_optimiser("sgd", rate)) for n in ("generator", "discriminator")}
    step = functools.partial(
        gan_step,
        generate=lambda p, z, label: jnp.broadcast_to(p["theta"], z.shape),
        discriminate=lambda p, extra, frozen, x, label, key: (p["psi"] * x, extra),
        distance=lambda frozen, x, y, key: frozen["eta"] * squared_error(frozen, x, y, key),
        optimisers=optimisers,
        sigma_max=SIGMA_MAX,
        ema_decay=0.0,
        adversarial_weight=1.0,
        gan_loss="logistic",
    )
    zero = {"image": jnp.zeros((1, 1)), "z": jnp.zeros((1, 1)), "label": jnp.zeros(1, jnp.int32)}
    batch = {"pair": zero, "real": zero}

    @jax.jit
    @jax.vmap
    def play(eta):
        params = {"generator": {"theta": start[0]}, "discriminator": {"psi": start[1]}}
        params = jax.tree.map(jnp.asarray, params)
        state = create_state(params, {"discriminator": {}}, optimisers, ["generator"])
        key = stream_key(0, "dirac", 0)  # neither network looks at its noise
        params = jax.lax.fori_loop(
            0, steps, lambda _, state: step(state, {"eta": eta}, batch, key)[0], state
        ).params
        return jnp.hypot(params["generator"]["theta"], params["discriminator"]["psi"])

    stepped = play(jnp.asarray(etas))
    return {
        str(eta): {
            "discriminator_first": float(final),
            "discriminator_first_float64": dirac_recursion(eta, rate, steps, start, True),
            "generator_first_float64": dirac_recursion(eta, rate, steps, start, False),
        }
        for eta, final in zip(etas, stepped, strict=True)
    }


def dirac_recursion(
    eta: float, rate: float, steps: int, start: tuple[float, float], discriminator_first: bool
) -> float:
    """The same game written out by hand in float64."""
    theta, psi = start
    for _ in range(steps):
        for discriminator in (discriminator_first, not discriminator_first):
            slope = 1 / (1 + np.exp(-psi * theta))  # f'(-psi theta)
            if discriminator:
                psi -= rate * slope * theta
            else:
                theta += rate * (slope * psi - 2 * eta * theta)
    return float(np.hypot(theta, psi))
