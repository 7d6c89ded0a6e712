"""A folder of image files as a source, without preparation."""

import collections
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging
from PIL import Image

from cheapscale.data.digest import digest
from cheapscale.data.resize import to_rgb
from cheapscale.data.source import TOO_SMALL, UNREADABLE, Source, decode, split_name

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderSource(Source):
    """Image files. Sub-folders are the classes in sorted order; a flat folder is unlabelled.

    The split is a sub-folder of data_dir; the split "all" reads data_dir itself.
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
        **options,
    ):
        root = _split_folder(data_dir, split_name(split))
        by_class = _image_files(root)
        classes = tuple(name for name in by_class if name)
        # Image number `rank` of n gets the position (rank + 0.5) / n. Sorting all classes by it
        # interleaves them in proportion to their sizes, so that a slice is balanced.
        place = [
            ((rank + 0.5) / len(paths), k, path)
            for k, paths in enumerate(by_class.values())
            for rank, path in enumerate(paths)
        ]
        pairs = [(path, k) for _, k, path in sorted(place)]
        self.skipped: tuple[str, ...] = ()
        if skip_corrupt:
            whole = [_decodes(path) for path, _ in pairs]
            self.skipped = tuple(str(path) for (path, _), ok in zip(pairs, whole) if not ok)
            pairs = [pair for pair, ok in zip(pairs, whole) if ok]
        self._files, self._labels = zip(*pairs) if pairs else ((), ())
        if probe:
            for path, (height, width) in zip(self._files, _sizes(self._files)):
                if min(height, width) < resolution and not allow_upscale:
                    raise ValueError(
                        f"{path} is {height}x{width}, smaller than resolution {resolution}: "
                        f"remove it, {TOO_SMALL}"
                    )
        self._upscale = allow_upscale
        listing = [[str(path.relative_to(root)), path.stat().st_size] for path in self._files]
        super().__init__(
            "folder",
            split,
            resolution,
            length=len(self._files),
            class_names=classes,
            identity=["folder", digest(listing)],
            **options,
        )

    def path(self, i: int) -> pathlib.Path:
        """The file of image i."""
        return self._files[self._index(i)]

    def _load(self, index: int) -> np.ndarray:
        path = self._files[index]
        return decode(path, str(path), self.resolution, allow_upscale=self._upscale)

    def _label(self, index: int) -> int:
        return self._labels[index]


def _split_folder(data_dir: str | None, split: str) -> pathlib.Path:
    if data_dir is None:
        raise ValueError("an image folder needs data.data_dir: the folder that holds the images")
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"data.data_dir {root} is not a folder")
    if split == "all":
        return root
    if (root / split).is_dir():
        return root / split
    raise ValueError(
        f"{root} has no split {split!r}: its sub-folders are "
        f"{', '.join(_sub_folders(root)) or 'none'}, and split 'all' reads the whole folder"
    )


def _sub_folders(root: pathlib.Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _image_files(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """{class: sorted files}, classes sorted; {"": files} for a folder without class folders."""
    by_class = collections.defaultdict(list)
    for folder, _, names in os.walk(root):
        inside = pathlib.Path(folder).relative_to(root).parts
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES):
                by_class[inside[0] if inside else ""].append(pathlib.Path(folder, name))
    if not by_class:
        raise ValueError(f"no image files ({', '.join(IMAGE_SUFFIXES)}) under {root}")
    found = {name: sorted(by_class[name]) for name in sorted(by_class)}
    if "" in found and len(found) > 1:
        raise ValueError(
            f"{root} mixes images ({found[''][0].name} ...) with class folders "
            f"({list(found)[1]} ...): move the images into a class folder"
        )
    return found


def _sizes(files: Sequence[pathlib.Path]) -> list[tuple[int, int]]:
    """(height, width) of each image, from the headers; ValueError for a file that is no image."""

    def size(path: pathlib.Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except UNREADABLE as error:
            raise ValueError(
                f"{path} is not a readable image ({error}): repair or remove it, or set "
                "data.options.skip_corrupt=True"
            ) from error

    with ThreadPoolExecutor(16) as pool:  # threads overlap the waits for the disk
        return list(pool.map(size, files))


def _decodes(path: pathlib.Path) -> bool:
    """Whether the whole image decodes: a truncated file still has a valid header."""
    try:
        with Image.open(path) as image:
            to_rgb(image)
    except UNREADABLE as error:
        logging.warning("skipping %s: %s", path, error)
        return False
    return True
