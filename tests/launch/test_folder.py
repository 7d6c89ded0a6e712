"""configs/folder.py on real photographs: the folder says the classes, and the stages run on it."""

import shutil

import pytest
import tensorflow_datasets as tfds

from cheapscale.data.pairs import PairStore
from cheapscale.data.sources import open_source
from cheapscale.teacher.data import check_teacher
from cheapscale.teacher.load import load
from launch import evaluate
from launch.pipeline import stage_configs
from launch.train import run

NUM = 40


def write_photographs(shared, folder):
    """Save photographs of clothes as DIR/<class>/<number>.jpg; returns the classes."""
    builder = tfds.builder_from_directory(shared / "data/tfds/clothing/1.0.0")
    skip = {"image": tfds.decode.SkipDecoding()}
    records, names = builder.as_data_source("train", decoders=skip), set()
    for i in range(NUM):
        record = records[i]
        name = builder.info.features["label"].names[record["label"]]
        (folder / name).mkdir(exist_ok=True, parents=True)
        (folder / name / f"{i}.jpg").write_bytes(record["image"])
        names.add(name)
    return sorted(names)


def test_the_stages_run_on_a_folder_of_photographs(shared, tmp_path):
    names = write_photographs(shared, tmp_path / "photos")
    arg = f"data_dir={tmp_path / 'photos'},base=8,top=32,levels=1"
    stages = [config.stage for _, config in stage_configs("configs/folder.py", arg, "runs")]
    assert stages == ["pretrain", "invert", "distill", "grow", "grow"]

    arg += ",total_steps=2,batch_size=8,invert.nodes=3,model.channels=8,model.group_size=4"
    for folder, config in stage_configs("configs/folder.py", arg, str(tmp_path / "runs"))[:2]:
        run(config, folder)
    store = PairStore.open(tmp_path / "runs" / "latents")
    assert len(store) == 2 * 36  # nine tenths of the photographs, and their mirror images
    assert store.manifest["source"]["class_names"] == names
    other_images_of_its_classes(tmp_path, names)


def other_images_of_its_classes(tmp_path, names):
    """The teacher finds the classes of other folders by the names in its checkpoint."""
    workdir, photos = tmp_path / "runs" / "pretrain", tmp_path / "photos"
    kept, other = (names[1], names[-1]), tmp_path / "other"
    for name in kept:
        shutil.copytree(photos / name, other / name)
    source = open_source("folder", "all", resolution=8, data_dir=str(other))
    assert set(source.labels()) == {0, 1}
    check_teacher(load(workdir), source)
    assert set(source.labels()) == {names.index(name) for name in kept}

    words = [f"--model={workdir}", f"--workdir={tmp_path / 'eval'}", f"--data_dir={other}"]
    flat = other / kept[0]
    with pytest.raises(SystemExit, match="classes, but no images are given whose labels"):
        evaluate.main([*words[:2], f"--data_dir={flat}", "--num=4"])
    (other / kept[0]).rename(other / "spoons")
    with pytest.raises(SystemExit, match="has the class spoons, which the model does not know"):
        evaluate.main([*words, "--num=4"])
