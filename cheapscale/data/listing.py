"""What the structure of a folder means: its images and their classes.

    DIR/<class>/**/*.png                sub-folders are the classes, however deep their files are
    DIR/dataset.json beside DIR/**/*.png    the label file of EDM's and StyleGAN's dataset_tool
    DIR/*.png                           no classes

The label file may lie beside a split's folder too, with names such as "train/00000/img0.png".
Links are followed. A class holds every file once, however many links reach it, so loops end. What
programs leave behind (names that begin with a dot, and `LITTER`) is not read, nor is a folder of
results of this project. Names are compared in Unicode's form NFC, as file systems store accents in
different forms. Names that are all numbers are in the order of these.
"""

import collections
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from PIL import Image

from cheapscale.data.source import UNREADABLE, shown

IMAGE_SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .ppm .pgm .pnm .avif".split()
)
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
LITTER = ("__macosx", "@eadir", "lost+found", "#recycle", "$recycle.bin")
RESULTS = ("sample.json", "evaluate.json", "pipeline.json", "writer.json")  # of launch, and a lock
SPLITS = set("train training val valid validation test testing dev eval".split())
WRAPPERS = {"images", "image", "imgs", "data", "pictures"}
LABEL_FILE = "dataset.json"
READ_BEFORE = "links to folders or files read before"
MOST_CLASSES = 100_000
INSTEAD = "or set --config.data.options.unlabelled=True"


class Listing(NamedTuple):
    """classes: {name: sorted files} in the order of their numbers; {"": files} without classes.
    empty: sub-folders without an image. left_out: {what: number} of what is not read."""

    classes: dict[str, list[pathlib.Path]]
    empty: list[str]
    left_out: collections.Counter


def list_images(root: pathlib.Path, *, labelled: bool = True) -> Listing:
    """The images below a folder; ValueError if there are none, or if their classes are not clear.

    labelled: without it the label file is not read, and sub-folders only give the order.
    """
    found, left_out = collections.defaultdict(list), collections.Counter()
    here, loose = os.path.realpath(root), set()
    for entry, is_folder in _entries(root, left_out):
        path = pathlib.Path(entry.path)
        if is_folder:
            found[nfc(path.name)] += _walk(path, {here}, left_out)
        elif _first(entry, here, loose, left_out):
            found[""].append(path)
    classes = {name: sorted(found[name], key=_parts) for name in in_order(found) if found[name]}
    empty = sorted(name for name in found if name and not found[name])
    if not classes:
        archive = any(left_out[suffix] for suffix in ARCHIVES)
        raise ValueError(
            f"no images under {root} ({counted(left_out) or 'it is empty'}): "
            + ("unpack its archive first" if archive else f"give {', '.join(IMAGE_SUFFIXES)} files")
        )
    labels = read_labels(root) if labelled else None
    if labels is not None:
        files = sum(classes.values(), [])
        left_out[".json"] -= (root / LABEL_FILE).is_file()
        left_out[f"labels of missing files in {LABEL_FILE}"] += len(labels) - len(files)
        return Listing(_by_label(root, files, labels), empty, left_out)
    if labelled and "" in classes and len(classes) > 1:
        raise ValueError(
            f"{root} mixes images ({classes[''][0].name} ...) with class folders "
            f"({list(classes)[1]} ...): move the images into a class folder, {INSTEAD}"
        )
    if labelled:
        _refuse_layout(root, list(classes))
    return Listing(classes, empty, left_out)


def class_names(root: pathlib.Path) -> list[str]:
    """The classes of a folder in the order of their numbers, read from its names alone."""
    labels = read_labels(root)
    if labels is not None:
        found = [int(label) for label in list_images(root).classes if label]
        return [str(label) for label in range(max(found, default=-1) + 1)]
    unused = collections.Counter()
    return in_order(
        {
            nfc(entry.name)
            for entry, is_folder in _entries(root, unused)
            if is_folder and any(True for _ in _walk(entry, {os.path.realpath(root)}, unused))
        }
    )


def read_labels(root: pathlib.Path) -> dict[str, int] | None:
    """{path below root: label} of dataset.json in `root`, or beside it with names that begin with
    that of `root`; {} if it says that there are no labels, None if there is no such file.
    ValueError if the labels are not numbers of classes."""
    own = _labels_in(root / LABEL_FILE)
    return own if own is not None else _labels_in(root.parent / LABEL_FILE, f"{root.name}/") or None


def _labels_in(file: pathlib.Path, prefix: str = "") -> dict[str, int] | None:
    """The labels in a file of the names that begin with `prefix`, which is removed."""
    if file.is_dir() and not prefix:
        raise ValueError(f"{file} is a folder, not a label file: rename it, {INSTEAD}")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or "labels" not in content:
            if isinstance(content, dict) and any(map(_has_image_suffix, content)):
                raise ValueError("its names are not in a list of labels")
            return None  # another program's file
        pairs = [(nfc(name).replace("\\", "/"), label) for name, label in content["labels"] or ()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if prefix:
            return None  # a file beside the split's folder may be about something else
        raise ValueError(
            f'{file} is no label file, {{"labels": [["a/1.png", 6], ...]}} ({error}): repair or '
            f"remove it, {INSTEAD}"
        ) from error
    labels: dict[str, int] = {}
    for whole_name, label in pairs:
        if not whole_name.startswith(nfc(prefix)):
            continue
        name = whole_name.removeprefix(nfc(prefix))
        if labels.setdefault(name, label) != label:
            raise ValueError(
                f"{file} gives {name} the labels {str(labels[name])[:40]} and {str(label)[:40]}: "
                f"remove one, {INSTEAD}"
            )
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            raise ValueError(
                f"{file} gives {name} the label {str(label)[:40]}, which is no number of a class "
                f"from 0 to {MOST_CLASSES - 1}: repair or remove the file, {INSTEAD}"
            )
    return labels


def in_order(names: Iterable[str]) -> list[str]:
    """The names of classes in the order of their numbers: sorted, as numbers if all are."""
    if all(name.isascii() and name.isdigit() for name in names if name):
        return sorted(names, key=lambda name: (int(name or -1), name))
    return sorted(names)


def _refuse_layout(root: pathlib.Path, names: list[str]) -> None:
    """ValueError for sub-folders that are splits, or that only hold the class folders."""
    lower = {name.lower() for name in names}
    if lower <= SPLITS:
        raise ValueError(
            f"{root} has the folders {shown(names)}, which are splits and no classes: rename them "
            "to train and val, or name them by --config.data.split and --config.data.eval_split"
        )
    if len(lower) == 1 and lower <= WRAPPERS:
        raise ValueError(
            f"{root} has only the folder {names[0]}, which would be its one class: move what it "
            f"holds to {root}, {INSTEAD}"
        )


def counted(left_out: Mapping[str, int]) -> str:
    """The counts as a text: "3 .txt, 1 hidden"."""
    return shown([f"{number} {what}" for what, number in sorted(left_out.items()) if number > 0])


def below(path: pathlib.Path, root: pathlib.Path) -> str:
    """The path of a file below a folder, the same on every system."""
    return nfc(path.relative_to(root).as_posix())


def nfc(name: str) -> str:
    """A name with composed accents."""
    return unicodedata.normalize("NFC", name)


def _parts(path: pathlib.Path) -> list[str]:
    return nfc(str(path)).split(os.sep)


def _by_label(
    root: pathlib.Path, files: list[pathlib.Path], labels: dict[str, int]
) -> dict[str, list[pathlib.Path]]:
    """{label: files} in the order of the numbers; {"": files} without labels."""
    if not labels:
        return {"": sorted(files, key=_parts)}
    absent = [name for path in files if (name := below(path, root)) not in labels]
    if absent:
        raise ValueError(
            f"{root / LABEL_FILE} has no label for {len(absent)} images ({shown(absent, 3)}): add "
            f"them, or move them away, {INSTEAD}"
        )
    found = collections.defaultdict(list)
    for path in sorted(files, key=_parts):
        found[labels[below(path, root)]].append(path)
    return {str(label): found[label] for label in sorted(found)}


def _walk(
    folder: os.PathLike, seen: set[str], left_out: collections.Counter
) -> Iterator[pathlib.Path]:
    """The images below a folder. seen: real paths that are not read again; they are added to."""
    here = os.path.realpath(folder)
    if here in seen:
        left_out[READ_BEFORE] += 1
        return
    seen.add(here)
    for entry, is_folder in _entries(folder, left_out):
        if is_folder:
            yield from _walk(entry, seen, left_out)
        elif _first(entry, here, seen, left_out):
            yield pathlib.Path(entry.path)


def _first(entry: os.DirEntry, here: str, seen: set[str], left_out: collections.Counter) -> bool:
    """Whether a file in the real folder `here` is not in `seen`, to which it is added."""
    real = os.path.realpath(entry) if entry.is_symlink() else os.path.join(here, entry.name)
    if real in seen:
        left_out[READ_BEFORE] += 1
        return False
    seen.add(real)
    return True


def _entries(
    folder: os.PathLike[str], left_out: collections.Counter
) -> Iterator[tuple[os.DirEntry, bool]]:
    """(entry, whether it is a folder) of the sub-folders and images in a folder, by name."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        # os.path follows links without an error in a link to itself, unlike entry.is_dir().
        is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
        if entry.name.startswith(".") or entry.name.lower() in LITTER:
            left_out[entry.name if is_folder else "hidden files"] += 1
        elif is_folder and _holds_results(entry):
            left_out["work directories"] += 1
        elif is_folder or _is_image(entry, left_out):
            yield entry, is_folder


def _holds_results(folder: os.PathLike) -> bool:
    """Whether a folder is the work directory of a command, whose pictures are previews."""

    def holds(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    return (holds("config.json") and holds("checkpoints")) or any(map(holds, RESULTS))


def _is_image(entry: os.DirEntry, left_out: collections.Counter) -> bool:
    """Whether a file's suffix is that of an image; one without a suffix is opened to see."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if not (os.path.isfile(entry) if entry.is_symlink() else entry.is_file()):
        left_out["broken links" if entry.is_symlink() else "special files"] += 1
        return False
    known = _has_image_suffix(entry.name) if suffix else _opens(entry.path)
    if not known:
        left_out[suffix or "without a suffix"] += 1
    return known


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _opens(path: str) -> bool:
    try:
        with Image.open(path):
            return True
    except UNREADABLE:
        return False
