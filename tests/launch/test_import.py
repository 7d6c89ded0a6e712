"""A file of EDM's weights becomes a teacher with the outputs of EDM's network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.interop.teachers import import_teacher
from cheapscale.teacher.load import load_teacher
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
    np.savez(weights, **state)
    summary = import_teacher(config(), tmp_path / "teacher", weights, "edm")
    loaded = load_teacher(tmp_path / "teacher")
    assert loaded.step == 0 and loaded.meta["imported"]["sha256"] == summary["sha256"]
    x = jnp.asarray(reference["x"].transpose(0, 2, 3, 1), jnp.float32)
    ours = jax.jit(loaded.denoise)(x, jnp.asarray(reference["sigma"], jnp.float32))
    theirs = reference["D"].transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()
    with pytest.raises(ValueError, match="holds a run already: use a new work directory"):
        import_teacher(config(), tmp_path / "teacher", weights, "edm")
    with pytest.raises(ValueError, match="has SHA-256 .* but abc was asked for"):
        import_teacher(config(), tmp_path / "b", weights, "edm", sha256="abc")
    with pytest.raises(ValueError, match="does not fit the model config"):
        import_teacher(config(num_blocks=1), tmp_path / "b", weights, "edm")
    assert not (tmp_path / "b" / "config.json").exists()
