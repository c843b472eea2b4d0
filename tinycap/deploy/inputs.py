"""Resolves the images of a command: files, folders, patterns, addresses, lists."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tinycap.processing_tinycap import IMAGE_ENDINGS


# Names given of each kind of what is left out.
MAX_NAMED = 5


@dataclass
class LeftOut:
    """What lies in the searched folders and isn't taken.

    Args:
        endings: number of files by their ending, where that isn't an image's.
        hidden: number of files and folders whose name begins with a dot.
        links: linked folders; not followed, since they may lead in a circle or to images that are there already.
        folders: folders that match a pattern.
        unreadable: folders that can't be read, with the reason; unlike the others, a failure.
    """

    endings: Counter = field(default_factory=Counter)
    hidden: int = 0
    links: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line; empty where nothing was left out."""
        parts = []
        if self.endings:
            parts.append(f"{self.endings.total()} file(s) of other kinds ({_names(sorted(self.endings))})")
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        for paths, what in (
            (self.links, "linked folder(s), not followed"),
            (self.folders, "folder(s) that match a pattern"),
            (self.unreadable, "folder(s) that can't be read"),
        ):
            if paths:
                parts.append(f"{len(paths)} {what}: {_names(paths)}")
        return f"left out: {'; '.join(parts)}" if parts else ""


def _names(names: list[str]) -> str:
    return ", ".join([*names[:MAX_NAMED], *(["..."] if len(names) > MAX_NAMED else [])])


def list_images(inputs: Iterable[str], left_out: LeftOut | None = None, from_list: bool = False) -> list[str]:
    """The images of a command, each once, in the order given; folders and patterns in the order of their names.

    Args:
        inputs: files, folders (searched with all folders below them, hidden and linked ones left out), patterns with
            `*`, `?`, `[...]` or `**`, `http(s)://` addresses; `-` stands for a list on the standard input, one a line.
            A path that exists is never a pattern, nor is an existing folder at the head of one.
        left_out: collects what folders hold beyond images.
        from_list: the inputs are the lines of a list: a folder or pattern without images is a bad file among others.

    Returns:
        Paths and addresses. A file that doesn't exist is among them: it is a bad file, not a bad command.

    Raises:
        ValueError: a pattern or folder holds no image; names it.
    """
    left_out = LeftOut() if left_out is None else left_out
    images: dict[str, None] = {}
    for entry in inputs:
        if entry == "-" and not from_list:
            images |= dict.fromkeys(_lines(getattr(sys.stdin, "buffer", sys.stdin).read()))
            continue
        paths = dict.fromkeys(_expand(entry, left_out))
        if not paths and not from_list and (os.path.isdir(entry) or "*" in entry or "?" in entry):
            kind = "folder" if os.path.isdir(entry) else "pattern"
            reason = f"{entry}: expected images in this {kind}, got none"
            raise ValueError(f"{reason}; {left_out}" if str(left_out) else reason)
        images |= paths or {entry: None}
    return list(images)


def read_list(path: str) -> list[str]:
    """The entries of a list of images, one a line, as `list_images` takes them; UTF-8, or UTF-16 with its mark.

    Raises:
        ValueError: the file can't be read; names it.
    """
    try:
        with open(path, "rb") as file:
            return _lines(file.read())
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot read the list of images: {getattr(error, 'strerror', error)}") from None


def _lines(content: bytes | str) -> list[str]:
    if isinstance(content, bytes):
        # What PowerShell writes, and what Notepad puts before UTF-8.
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        content = content.decode("utf-16") if is_utf16 else content.decode("utf-8-sig", "surrogateescape")
    return [line for line in (line.rstrip("\r") for line in content.split("\n")) if line.strip()]


def _expand(entry: str, left_out: LeftOut) -> Iterator[str]:
    if entry.startswith(("http://", "https://")) or os.path.isfile(entry):
        yield entry
    elif os.path.isdir(entry):
        yield from _walk(entry, left_out)
    elif glob.has_magic(entry):
        for path in _match(entry):
            if not os.path.isdir(path):
                yield path
            elif "**" not in entry:
                left_out.folders.append(path)


def _match(pattern: str) -> list[str]:
    """The paths that a pattern matches, sorted. Brackets that match nothing as a pattern stand for themselves."""
    parts = pattern.split(os.sep)
    heads = (os.sep.join(parts[:number]) for number in range(len(parts) - 1, 0, -1))
    head = next(filter(os.path.isdir, heads), "")
    rest = pattern[len(head) :]
    paths = glob.glob(glob.escape(head) + rest, recursive=True)
    return sorted(paths or glob.glob(glob.escape(head) + rest.replace("[", "[[]"), recursive=True))


def _walk(folder: str, left_out: LeftOut) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        left_out.unreadable.append(f"{error.filename} ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=refuse):
        left_out.hidden += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out.links += [path for path in (os.path.join(here, name) for name in folders) if os.path.islink(path)]
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_ENDINGS):
                yield os.path.join(here, name)
            else:
                left_out.endings[os.path.splitext(name)[1].lower() or "no ending"] += 1
