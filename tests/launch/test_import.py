"""A file of EDM's weights becomes a teacher with the outputs of EDM's network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.features.weights import Weights
from cheapscale.interop import teachers
from cheapscale.interop.teachers import import_teacher
from cheapscale.teacher.load import load_teacher
from cheapscale.training.checkpoint import load_network
from configs import scenes

# EDM's NCSN++ of the reference vectors
MODEL = dict(
    family="ncsnpp", resolution=16, channels=32, channel_mult=(1, 2), attention=(8,), head_dim=0,
    num_blocks=2, num_classes=0,
)  # fmt: skip


def config(**changes):
    made = scenes.get_config("stage=pretrain,smoke")
    made.data.resolution = 16
    with made.unlocked():
        made.model = MODEL | changes
    return made


def test_an_imported_teacher_denoises_as_the_original(shared, tmp_path):
    reference = dict(np.load(shared / "parity" / "ncsnpp_edm_16px.npz"))
    state = {k.removeprefix("param/"): v for k, v in reference.items() if k.startswith("param/")}
    weights = str(tmp_path / "weights.npz")
    # the average has the reference's weights, the raw weights are others
    raw = {f"net.{name}": array + np.float32(0.1) for name, array in state.items()}
    np.savez(weights, **raw, **{f"ema.{name}": array for name, array in state.items()})
    summary = import_teacher(config(), tmp_path / "teacher", weights, "edm")
    loaded = load_teacher(tmp_path / "teacher")
    assert loaded.step == 0 and loaded.meta["imported"].items() <= summary.items()
    assert summary["noise_feature"] == "edm"
    assert summary["weights"] == {"network": "net.model", "average": "ema.model"}
    assert summary["teacher"] == loaded.fingerprint
    unaveraged = load_network(tmp_path / "teacher", ema=False)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b) + np.float32(0.1)),
        unaveraged.params, loaded.params,
    )  # fmt: skip
    x = jnp.asarray(reference["x"].transpose(0, 2, 3, 1), jnp.float32)
    ours = jax.jit(loaded.denoise)(x, jnp.asarray(reference["sigma"], jnp.float32))
    theirs = reference["D"].transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()
    with pytest.raises(ValueError, match="holds a run already: use a new work directory"):
        import_teacher(config(), tmp_path / "teacher", weights, "edm")
    with pytest.raises(ValueError, match="has SHA-256 .*, not abc"):
        import_teacher(config(), tmp_path / "b", weights, "edm", sha256="abc")
    with pytest.raises(ValueError, match="does not fit the model config"):
        import_teacher(config(num_blocks=1), tmp_path / "b", weights, "edm")
    assert not (tmp_path / "b" / "config.json").exists()


class Built(Exception):
    """The network that an import would have read."""


def test_the_format_edm_sets_the_noise_feature(tmp_path, monkeypatch):
    def read(file, net, *rest):
        raise Built(net.noise_feature)

    monkeypatch.setattr(teachers, "read_weights", lambda *a, **k: Weights({}, "w.pt", "00"))
    monkeypatch.setattr(teachers, "read_network", read)
    for form, given, found in (("edm", {}, "edm"), ("guided_diffusion", {}, "openai")):
        with pytest.raises(Built, match=found):
            import_teacher(config(family="adm", **given), tmp_path, "w.pt", form)
    with pytest.raises(ValueError, match="--config.model.noise_feature=edm, not 'openai'"):
        wrong = config(family="adm", noise_feature="openai")
        import_teacher(wrong, tmp_path, "w.pt", "edm")


def test_learned_variances_need_a_process_of_predicted_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "read_weights", lambda *a, **k: Weights({}, "w.pt", "00"))
    origin = {"learned_variance": "left out"}
    monkeypatch.setattr(teachers, "read_network", lambda *a: (None, None, origin))
    wrong = config()
    for process, prediction in (("edm", "x0"), ("linear", "x0"), ("cosine", "v")):
        wrong.diffusion.update(process=process, prediction=prediction, sigma_min=0.02)
        with pytest.raises(ValueError, match="--config.diffusion.prediction=eps"):
            import_teacher(wrong, tmp_path, "w.pt", "edm")
    wrong.diffusion.prediction = "eps"
    monkeypatch.setattr(teachers.checkpoint, "Checkpoints", lambda workdir: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # past the check
        import_teacher(wrong, tmp_path, "w.pt", "edm")
