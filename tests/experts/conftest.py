"""Fixtures: one tiny teacher, and one set of experts assessed and fine-tuned from it."""

import pytest

from cheapscale.experts import assess, prune
from cheapscale.teacher import experts
from cheapscale.training import jobs, loop
from tests.teacher.toy_teacher import configured, save_teacher


def assessed(config, workdir):
    """Run stage=assess; returns its summary."""
    return jobs.run(assess.build(config), str(workdir), config.to_dict(), name="assess")


def fine_tuned(config, folder):
    """Run stage=prune in the set's folder of the group; returns its summary."""
    return loop.train(
        prune.build(config),
        experts.group_folder(folder, config.prune.group),
        config.to_dict(),
        name="prune",
        seed=config.seed,
        total_steps=config.total_steps,
        log_every=1,
        save_every=config.save_every,
    )


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The work directory of a tiny teacher."""
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def toy_set(teacher, tmp_path_factory):
    """(folder, summaries of the groups) of two experts by the greedy search, k = 0.6."""
    folder = tmp_path_factory.mktemp("set") / "set"
    assessed(configured("assess", teacher, folder, k=0.6), folder / "assess")
    tuned = [
        fine_tuned(configured("prune", teacher, folder, group=g, base_target=0.5), folder)
        for g in range(2)
    ]
    return folder, tuned
