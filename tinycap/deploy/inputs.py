"""Which images are meant: files, folders, patterns, addresses, lists."""

import glob
import os
from collections.abc import Iterable, Iterator
from typing import TextIO


# What a folder is searched for; a file that is named itself is taken whatever it is called.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".tga", ".ico"),
)


def list_images(inputs: Iterable[str], standard_input: TextIO | None = None) -> list[str]:
    """The images that are meant, each once, in the order given; folders and patterns in the order of their names.

    Args:
        inputs: files, folders (searched with all folders below them, hidden ones left out), patterns with `*`, `?`,
            `[...]` or `**`, `http(s)://` addresses; `-` stands for a list on the standard input, one a line.
        standard_input: where `-` reads; `None` makes `-` an error.

    Returns:
        Paths and addresses. A file that doesn't exist is among them: it is a bad file, not a bad command.

    Raises:
        ValueError: a pattern or folder holds no image, or there is no standard input to read; names it.
    """
    return list(dict.fromkeys(image for entry in inputs for image in _expand(entry, standard_input)))


def read_list(path: str) -> list[str]:
    """The entries of a list of images, one a line, as `list_images` takes them.

    Raises:
        ValueError: the file can't be read; names it.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return list(_lines(file))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the list of images: {error.strerror}") from None


def _lines(file: TextIO) -> Iterator[str]:
    return (line for line in (line.rstrip("\r\n") for line in file) if line)


def _expand(entry: str, standard_input: TextIO | None) -> Iterator[str]:
    if entry == "-":
        if standard_input is None:
            raise ValueError("-: several processes can't share one standard input; give the list with --input-list")
        yield from _lines(standard_input)
    elif entry.startswith(("http://", "https://")) or os.path.isfile(entry):
        yield entry
    elif os.path.isdir(entry):
        yield from _some(_walk(entry), entry, "folder")
    elif glob.has_magic(entry):
        found = (path for path in sorted(glob.glob(entry, recursive=True)) if not os.path.isdir(path))
        yield from _some(found, entry, "pattern")
    else:
        yield entry


def _some(images: Iterator[str], entry: str, kind: str) -> Iterator[str]:
    empty = True
    for image in images:
        empty = False
        yield image
    if empty:
        raise ValueError(f"{entry}: expected images in this {kind}, got none")


def _walk(folder: str) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("."):
                yield os.path.join(here, name)
