"""Finds the images of a command (files, folders, patterns, addresses, lists) and opens them in batches."""

import glob
import itertools
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tinycap.processing_tinycap import IMAGE_ENDINGS, load_image


OTHER, HIDDEN, LINKS = "file(s) of other kinds", "hidden", "linked folder(s), not followed"
FOLDERS, UNREADABLE = "folder(s) that match a pattern", "folder(s) that can't be read"
# Names shown of each kind of entry that is left out.
MAX_NAMED = 5


class LeftOut(defaultdict):
    """Entries of searched folders that aren't captioned, by kind: paths, or the extensions of other files.

    Links to folders may form loops or lead to the same images. Unreadable folders are failures.
    """

    def __init__(self):
        super().__init__(list)

    def __str__(self) -> str:
        """One line; empty if nothing was left out."""
        parts = []
        for kind in filter(self.get, (OTHER, HIDDEN, LINKS, FOLDERS, UNREADABLE)):
            names = sorted(set(self[kind])) if kind == OTHER else self[kind]
            text = ", ".join([*names[:MAX_NAMED], *(["..."] if len(names) > MAX_NAMED else [])])
            shown = {OTHER: f" ({text})", HIDDEN: ""}.get(kind, f": {text}")
            parts.append(f"{len(self[kind])} {kind}{shown}")
        return f"left out: {'; '.join(parts)}" if parts else ""


def list_images(inputs: Iterable[str], left_out: LeftOut | None = None, from_list: bool = False) -> list[str]:
    """The images of a command, each once, in the order given; folders and patterns in the order of their names.

    Args:
        inputs: files, folders (searched recursively without hidden and linked ones), patterns with `*`, `?`, `[...]` or
            `**`, `http(s)://` URLs; `-` is a list on standard input, one entry a line. An existing path is not a
            pattern, nor is the existing folder that a pattern starts with. Missing files are kept, as unreadable ones.
        left_out: collects the entries of folders that aren't images.
        from_list: the inputs are the lines of a list; a folder or pattern without images is kept too.

    Raises:
        ValueError: a pattern or folder has no images; names it.
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


def read_lines(path: str, errors: str = "strict") -> list[str]:
    """The non-blank lines of a file in UTF-8, or UTF-16 with a byte order mark; `ValueError` if it can't be read."""
    try:
        with open(path, "rb") as file:
            return _lines(file.read(), errors)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


def _lines(content: bytes | str, errors: str = "surrogateescape") -> list[str]:
    if isinstance(content, bytes):
        # PowerShell writes UTF-16, Notepad a byte order mark before UTF-8.
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        content = content.decode("utf-16") if is_utf16 else content.decode("utf-8-sig", errors)
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
                left_out[FOLDERS].append(path)


def _match(pattern: str) -> list[str]:
    """The paths that a pattern matches, sorted. Brackets that match nothing as a pattern are literal."""
    parts = pattern.split(os.sep)
    heads = (os.sep.join(parts[:number]) for number in range(len(parts) - 1, 0, -1))
    head = next(filter(os.path.isdir, heads), "")
    rest = pattern[len(head) :]
    paths = glob.glob(glob.escape(head) + rest, recursive=True)
    return sorted(paths or glob.glob(glob.escape(head) + rest.replace("[", "[[]"), recursive=True))


def _walk(folder: str, left_out: LeftOut) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        left_out[UNREADABLE].append(f"{error.filename} ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=refuse):
        left_out[HIDDEN] += [name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out[LINKS] += filter(os.path.islink, (os.path.join(here, name) for name in folders))
        for name in sorted(name for name in files if not name.startswith(".")):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield os.path.join(here, name)
            else:
                left_out[OTHER].append(os.path.splitext(name)[1].lower() or "no ending")


def read_ahead(read: Callable, images: Iterable, num_workers: int, ahead: int) -> Iterator:
    """Maps `read` over images in order, by threads that are at most `ahead` images early; by none with 0 workers."""
    if num_workers == 0:
        yield from map(read, images)
        return
    with ThreadPoolExecutor(num_workers) as threads:
        waiting = deque()
        for image in images:
            waiting.append(threads.submit(read, image))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def run_batches(
    run: Callable[[list], Iterable], images: Sequence[Any], batch_size: int, num_workers: int = 0
) -> Iterator[tuple[Any, Any]]:
    """Yields each image with its result of `run`, or with its error if it can't be read.

    `run` maps the readable images of a batch, opened, to their results; `num_workers` threads open images ahead.
    """

    def read(image: Any) -> Any:
        try:
            return load_image(image)
        except (ValueError, TypeError) as error:
            return error

    opened = read_ahead(read, images, num_workers, 2 * batch_size)
    for start in range(0, len(images), batch_size):
        batch = list(itertools.islice(opened, batch_size))
        readable = [image for image in batch if not isinstance(image, Exception)]
        results = iter(run(readable) if readable else ())
        for name, image in zip(images[start : start + batch_size], batch):
            yield name, image if isinstance(image, Exception) else next(results)
