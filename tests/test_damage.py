"""Damaged files: every reader ends with a result or one ValueError, in bounded time and memory.

Thousands of copies of small files of every format that the program reads, damaged by chance
(tests/mutations.py). A reader that raises anything else, hangs, or allocates what a header only
claims, fails here with the seed of the copy.
"""

import io
import json
import struct
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

from cheapscale.cascade.pivot import read_pivots
from cheapscale.data.listing import read_labels
from cheapscale.data.pairs import PairStore
from cheapscale.data.source import decode
from cheapscale.data.sources import open_source
from cheapscale.evaluation.image_sets import file_images
from cheapscale.evaluation.statistics import Identity, load_statistics, save_statistics
from cheapscale.features.weights import read_weights
from cheapscale.pagoda.loss_networks import read_table
from cheapscale.teacher.experts import VERSION, is_set, read_manifest
from cheapscale.training import checkpoint
from configs import fields, scenes
from tests.mutations import bounded, mutate

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
WEIGHTS = {"conv.weight": np.ones((4, 3), np.float32), "conv.bias": np.zeros(4, np.float16)}


def picture(form, **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form, **options)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def packed(names):
    """A zip without compression and with right checksums of {name: content}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# PyTorch's pickle of {"conv.weight": a float32 tensor [4, 3]}, protocol 2, as torch.save writes it.
PICKLE = (
    b"\x80\x02}q\x00X\x0b\x00\x00\x00conv.weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02(("
    b"X\x07\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05"
    b"X\x03\x00\x00\x00cpuq\x06K\x0ctq\x07QK\x00K\x04K\x03\x86q\x08K\x03K\x01\x86q\x09\x89"
    b"ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0ds."
)
NUMBERS = np.arange(12, dtype="<f4").tobytes()


def torch_zip(pickle=PICKLE):
    return packed({"a/data.pkl": pickle, "a/byteorder": b"little", "a/data/0": NUMBERS,
                   "a/version": b"3\n"})  # fmt: skip


def torch_legacy():
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    protocol = b"\x80\x02M\xe9\x03."
    machine = b"\x80\x02}q\x00X\x0d\x00\x00\x00little_endianq\x01\x88s."
    tensor = PICKLE.replace(b"K\x0ctq\x07Q", b"K\x0cNtq\x07Q")  # no view of the storage
    keys = b"\x80\x02]q\x00X\x01\x00\x00\x000q\x01a."
    return magic + protocol + machine + tensor + keys + struct.pack("<q", 12) + NUMBERS


def statistics(tmp_path):
    identity = Identity("data", "test", 8, 6, "net", "0" * 64)
    path = tmp_path / "statistics.npz"
    save_statistics(path, np.random.default_rng(0).normal(size=(6, 3)), identity)
    return path.read_bytes()


def read_picture(path):
    decode(path, str(path), 8, allow_upscale=True)


PICTURES = [
    picture(form, **options)
    for form, options in (
        ("PNG", {}), ("JPEG", {}), ("GIF", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {"progressive": True}),
    )
]  # fmt: skip
SET = npz(images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3), ids=np.arange(3))
SAFE = safetensors.numpy.save(WEIGHTS)
FORMATS = [PICTURES[0], SET, SAFE, torch_zip(), torch_legacy(), b'{"labels": [["a.png", 1]]}']
# name: (suffix, whole files, reader, number of damaged copies)
READERS = {
    "pictures": (".img", PICTURES, read_picture, 1600),
    "sets of images": (".npz", [SET], lambda path: file_images(str(path), 0, 2), 800),
    "pivots": (".npz", [SET], lambda path: read_pivots(str(path), np.arange(2)), 600),
    "class tables": (".npy", [npy(np.ones((3, 2))), npz(a=np.ones((3, 2)))], read_table, 400),
    "safetensors": (".safetensors", [SAFE], read_weights, 800),
    "weights.npz": (".npz", [npz(**WEIGHTS)], read_weights, 600),
    "PyTorch's zip": (".pt", [torch_zip()], read_weights, 800),
    "PyTorch's legacy": (".pth", [torch_legacy()], read_weights, 800),
}


def check(read, damaged, number, seed=0):
    """read(damaged(rng)) for every number, which has to end in a result or a ValueError."""
    refused = 0
    with bounded() as begin, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for n in range(number):
            content = damaged(np.random.default_rng((seed, n)))
            begin()
            try:
                read(content)
            except (ValueError, FileNotFoundError) as error:
                assert str(error), n
                refused += 1
            except Exception as error:
                raise AssertionError(f"copy {n} raises {error!r}") from error
    assert refused > number // 10  # the damage reaches the reader


def in_file(path, read):
    def write_and_read(content):
        path.unlink(missing_ok=True)  # a reader may still map the last one
        path.write_bytes(content)
        read(path)

    return write_and_read


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_a_result_or_a_value_error(name, tmp_path):
    suffix, whole, read, number = READERS[name]
    path = tmp_path / f"file{suffix}"
    for content in whole:
        in_file(path, read)(content)  # undamaged, it is read

    def damaged(rng):
        return mutate(rng, whole[rng.integers(len(whole))], FORMATS)

    check(in_file(path, read), damaged, number)


@pytest.mark.parametrize("name", ["arrays", "pickles"])
def test_damage_behind_right_checksums(name, tmp_path):
    """A zip refuses most damage by its checksums; here they are those of the damaged content."""
    header = npy(WEIGHTS["conv.weight"])

    def damaged(rng):
        if name == "pickles":
            return torch_zip(mutate(rng, PICKLE, FORMATS))
        return packed({"a.npy": mutate(rng, header, FORMATS), "b.npy": header})

    path = tmp_path / ("file.pt" if name == "pickles" else "file.npz")
    check(in_file(path, read_weights), damaged, 600)


def test_damaged_statistics(tmp_path):
    whole = statistics(tmp_path)
    path = tmp_path / "file.npz"
    check(in_file(path, load_statistics), lambda rng: mutate(rng, whole, FORMATS), 400)
    parts = {name: npy(array) for name, array in np.load(io.BytesIO(whole)).items()}

    def damaged(rng):
        name = list(parts)[rng.integers(len(parts))]
        return packed({f"{n}.npy": c for n, c in parts.items()} | {
            f"{name}.npy": mutate(rng, parts[name], FORMATS)})  # fmt: skip

    check(in_file(path, load_statistics), damaged, 200)


def test_damaged_json_documents(tmp_path):
    """dataset.json, the manifests of pairs and of experts, and the config and meta of a run."""
    manifest = {"teacher": "t", "sigma_max": 80.0, "num_images": 2, "orientations": 1,
                "shape": [2, 2, 3], "dtype": "float32", "per_shard": 2, "source": {}}  # fmt: skip
    PairStore.create(tmp_path, manifest).write_shard(
        0, np.ones((2, 2, 2, 3), np.float32), np.zeros(2, int)
    )
    pairs = (tmp_path / "manifest.json").read_bytes()
    experts = {"version": VERSION, "edges": [0, 2, 4], "boundaries": [1.0], "identity": "i",
               "teacher": "t", "ledger": {}, "base": "b"}  # fmt: skip
    config = {"stage": "pretrain", "seed": 0, "optim": {"lr": 1e-3}}
    labels = {"labels": [["a/1.png", 6], ["a/2.png", 0]]}
    meta = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    documents = (
        (tmp_path / "dataset.json", json.dumps(labels).encode(), lambda _: read_labels(tmp_path)),
        (tmp_path / "manifest.json", pairs, lambda _: PairStore.open(tmp_path).record(0, 0)),
        (tmp_path / "manifest.json", json.dumps(experts).encode(),
         lambda _: (is_set(tmp_path), read_manifest(tmp_path))),
        (tmp_path / "config.json", json.dumps(config).encode(),
         lambda _: checkpoint.claim_workdir(tmp_path, config)),
        (meta, json.dumps({"networks": {"net": {}}}).encode(),
         lambda _: checkpoint.read_meta(tmp_path)),
    )  # fmt: skip
    for path, whole, read in documents:
        in_file(path, read)(whole)
        check(in_file(path, read), lambda rng, whole=whole: mutate(rng, whole, FORMATS), 400)


def protobuf(number, content):
    return bytes([number << 3 | 2, len(content)]) + content


def test_damaged_array_records(tmp_path):
    """A prepared TFDS set of three pictures, written without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    split = {"name": "test", "numBytes": "9", "shardLengths": ["3"],
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}  # fmt: skip
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    kind = "tensorflow_datasets.core.features."
    shape = {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["12", "9", "3"]}}
    features = {"image": {"image": shape, "pythonClassName": f"{kind}image_feature.Image"}}
    (folder / "features.json").write_text(json.dumps({
        "featuresDict": {"features": features},
        "pythonClassName": f"{kind}features_dict.FeaturesDict",
    }))  # fmt: skip
    small = io.BytesIO()
    Image.fromarray(PIXELS[:2, :2]).save(small, "PNG")
    value = protobuf(1, protobuf(1, small.getvalue()))
    example = protobuf(1, protobuf(1, protobuf(1, b"image") + protobuf(2, value)))
    path = folder / "tiny-test.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(3):
        writer.write(example)
    writer.close()
    whole = path.read_bytes()
    settings = {"resolution": 2, "data_dir": str(tmp_path), "allow_upscale": True}

    def read(_):
        source = open_source("tiny", "test", **settings)
        return source[1]

    assert read(path)["image"].shape == (2, 2, 3)
    check(in_file(path, read), lambda rng: mutate(rng, whole, FORMATS), 200)


def test_damaged_words_and_fields():
    words = b"stage=grow,resolution=16,optim.lr=1e-4,grow.widths=(16,8),features.paths.x=a,jump"

    def parse(content):
        fields.check(scenes.get_config(content.decode("latin1")))

    check(parse, lambda rng: mutate(rng, words, FORMATS), 400)
    plain = fields.defaults("grow").to_dict()
    values = (None, True, -1, 2**70, float("nan"), float("inf"), "", "x" * 1000, (), ("a", 1), [[]],
              {}, {"a": {"b": 1}}, b"x", 1e308)  # fmt: skip

    def damaged(rng):
        config = ConfigDict(plain, type_safe=False)
        for _ in range(rng.integers(1, 3)):
            place = config
            names = list(fields.fields("grow"))
            *sections, last = names[rng.integers(len(names))].split(".")
            for section in sections:
                place = place[section] if isinstance(place, ConfigDict) else ConfigDict()
            if isinstance(place, ConfigDict):
                place[last if rng.random() < 0.9 else "any"] = values[rng.integers(len(values))]
        return config

    check(fields.check, damaged, 400)
