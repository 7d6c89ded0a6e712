"""A folder of image files as a source, without preparation."""

import functools
import json
import os
import pathlib
import re

import numpy as np
from absl import logging
from PIL import Image

from cheapscale.data.content import content_hash, in_threads
from cheapscale.data.listing import ARCHIVES, below, class_names, counted, list_images, nfc
from cheapscale.data.resize import TOO_SMALL, open_rgb
from cheapscale.data.source import UNREADABLE, Source, decode, shown, split_name

CAPTIONS = "captions.jsonl"
CORRUPT = "repair or remove it, or set --config.data.options.skip_corrupt=True"


class FolderSource(Source):
    """Image files; `listing` says which are read and what their classes are.

    The split is a sub-folder of data_dir; the split "all" reads data_dir itself. train_split: the
    split whose classes give the numbers in every split; without it a split numbers its own.
    Captions are those of the text file beside an image (a.txt of a.png), one in each line, and
    those of captions.jsonl in data_dir or the split's folder (see `read_captions`). recaptioned:
    how often one that a vision model wrote is drawn, where an image has both kinds.
    named_by_files: an image without another caption has its file's name: red_apple-02.png is "red
    apple", as in Debian's open clip-art (package openclipart-png).
    skip_corrupt: leave out images that do not decode, and list them in `skipped`. probe: read every
    header at the start, so that a bad file raises an error before training.
    """

    def __init__(
        self,
        split: str,
        resolution: int,
        *,
        data_dir: str | None = None,
        allow_upscale: bool = False,
        skip_corrupt: bool = False,
        probe: bool = True,
        train_split: str = "train",
        recaptioned: float = 0.5,
        named_by_files: bool = False,
        **options,
    ):
        root = _split_folder(data_dir, split_name(split))
        labelled = not options.get("unlabelled")
        found = list_images(root, labelled=labelled)
        train = root.parent / train_split if split_name(split) != "all" else root
        names = _numbering(root, list(found.classes), train) if labelled else []
        numbers = {name: number for number, name in enumerate(names)}
        # Image number `rank` of n gets the position (rank + 0.5) / n. Sorting all classes by it
        # interleaves them in proportion to their sizes, so that a slice is balanced.
        place = [
            ((rank + 0.5) / len(paths), k, path, numbers.get(name, 0))
            for k, (name, paths) in enumerate(found.classes.items())
            for rank, path in enumerate(paths)
        ]
        pairs = [(path, label) for _, _, path, label in sorted(place)]
        self.skipped: tuple[str, ...] = ()
        if skip_corrupt:
            whole = in_threads(_decodes, [path for path, _ in pairs])
            self.skipped = tuple(str(path) for (path, _), ok in zip(pairs, whole) if not ok)
            pairs = [pair for pair, ok in zip(pairs, whole) if ok]
        self._files, self._labels = zip(*pairs) if pairs else ((), ())
        sides = in_threads(_shorter_side, self._files) if probe else []
        for path, side in zip(self._files, sides):
            if side < resolution and not allow_upscale:
                raise ValueError(
                    f"{path} has only {side} pixels along its shorter side, fewer than resolution "
                    f"{resolution}: remove it, {TOO_SMALL}"
                )
        self._upscale = allow_upscale
        self._root, self._recaptioned, self._named = root, recaptioned, named_by_files
        content = content_hash(self._files, [below(path, root) for path in self._files])
        super().__init__(
            "folder",
            split,
            resolution,
            length=len(self._files),
            class_names=names,
            identity=["folder", content, self._labels],
            **options,
        )
        _say(
            f"{root}: {len(self._files)} images of {len(names) or 'no'} classes"
            + (f", shorter sides {min(sides)} to {max(sides)} px" if sides else "")
            + f"; the split {split} holds {len(self)}"
            + (f"; left out: {text}" if (text := counted(found.left_out)) else "")
            + (f"; unreadable: {len(self.skipped)}" if self.skipped else "")
            + (f"; without images, so no class: {shown(found.empty)}" if found.empty else "")
        )

    @property
    def root(self) -> pathlib.Path:
        """The folder of the split, whose captions.jsonl names files below it."""
        return self._root

    def path(self, i: int) -> pathlib.Path:
        """The file of image i."""
        return self._files[self._index(i)]

    @functools.cached_property
    def _listed(self) -> dict[str, tuple[list[str], list[str]]]:
        """{path below the split's folder: (captions, recaptions)} of both captions.jsonl."""
        above = read_captions(self._root.parent / CAPTIONS, f"{self._root.name}/")
        return above | read_captions(self._root / CAPTIONS)

    def _kinds(self, index: int) -> tuple[list[str], list[str]]:
        """(captions, recaptions) of one image."""
        path = self._files[index]
        own, again = self._listed.get(below(path, self._root), ([], []))
        text = path.with_suffix(".txt")
        lines = text.read_text("utf-8", "replace").splitlines() if text.is_file() else []
        raw = [*filter(None, map(str.strip, lines)), *own]
        return raw or [*filter(None, [caption_of(path)] * self._named)], again

    def _captions(self, index: int) -> list[str]:
        return sum(self._kinds(index), [])

    def _drawn_from(self, index: int, rng: np.random.Generator) -> list[str]:
        raw, again = self._kinds(index)
        return again if again and (not raw or rng.random() < self._recaptioned) else raw

    def _load(self, index: int) -> np.ndarray:
        path = self._files[index]
        options = {"allow_upscale": self._upscale, "fix": CORRUPT}
        return decode(path, str(path), self.resolution, **options)

    def _label(self, index: int) -> int:
        return self._labels[index]


def caption_of(path: pathlib.Path) -> str:
    """The words of a file's name, without a number at its end; "" if it has none."""
    words = re.sub(r"[\W_]+", " ", nfc(path.stem)).strip()
    return re.sub(r"(^|(?<= ))[\d ]+$", "", words).strip()


def read_captions(file: pathlib.Path, prefix: str = "") -> dict[str, tuple[list[str], list[str]]]:
    """{path: (captions, recaptions)} of the lines {"file_name": path, "text": caption}; in that of
    a recaption the key "model" names what wrote it. {} without the file.

    prefix: read the paths that begin with it, without it. Raises ValueError for another line, but a
    last one that is cut, as after a full disk, is left out.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = nfc(row["file_name"]), " ".join(row["text"].split())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f'line {number} of {file} is no {{"file_name": "a.png", "text": "..."}} '
                f"({error!r:.80}): repair or remove it"
            ) from error
        if name.startswith(prefix) and text:
            kinds = found.setdefault(name.removeprefix(prefix), ([], []))
            kinds["model" in row].append(text)
    return found


def _split_folder(data_dir: str | None, split: str) -> pathlib.Path:
    if data_dir is None:
        raise ValueError(
            "no folder of images is named: give --config.data.data_dir=DIR, or --data_dir=DIR in "
            "launch.evaluate"
        )
    root = pathlib.Path(os.path.expanduser(data_dir))
    if not root.is_dir():
        archive = root.is_file() and root.suffix.lower() in ARCHIVES
        raise ValueError(
            f"data.data_dir {root} is "
            + (
                "an archive: unpack it, and name the folder"
                if archive
                else "not a folder: name one"
            )
        )
    if split == "all":
        return root
    if (root / split).is_dir():
        return root / split
    held = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise ValueError(
        f"{root} has no split {split!r}: its sub-folders are {shown(held) or 'none'}, and split "
        "'all' reads the whole folder: give --config.data.split=all, or in launch.evaluate "
        "--split='all[90%:]' --train_split='all[:90%]'"
    )


def _numbering(root: pathlib.Path, own: list[str], train: pathlib.Path) -> list[str]:
    """The names of all classes in the order of their numbers; `own` are those below `root`.

    A split that lacks a class would number the others differently, so `train`, the folder of the
    training images, gives the numbers if it exists. Raises ValueError for a class that it lacks.
    """
    if own == [""]:
        return []
    names = class_names(train if train.is_dir() else root) or class_names(root)
    if unknown := sorted(set(own) - set(names)):
        raise ValueError(
            f"{root} has the class {shown(unknown)}, which the training images in {train} do not "
            "have: rename it to one of theirs, or move it away"
        )
    return names


def _shorter_side(path: pathlib.Path) -> int:
    """Pixels, from the header; the same in every orientation. ValueError for no image."""
    try:
        with Image.open(path) as image:
            return min(image.size)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a readable image ({error}): {CORRUPT}") from error


def _decodes(path: pathlib.Path) -> bool:
    """Whether the whole image decodes: a truncated file still has a valid header."""
    try:
        open_rgb(path)
    except UNREADABLE as error:
        _say(f"skipping {path}: {error}")
        return False
    return True


@functools.lru_cache(1000)
def _say(text: str) -> None:
    """Log a text once, although a run opens the same images several times."""
    logging.info("%s", text)
