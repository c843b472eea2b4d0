"""`tinycap search`: the images of a folder nearest to words or to an image, and near duplicates."""

import argparse
import base64
import csv
import html
import io
import json
import os
import string
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np

from tinycap.commands import say, write_text, writing
from tinycap.deploy.captioners import Captioner
from tinycap.deploy.index import ImageIndex, Match
from tinycap.deploy.inputs import LeftOut, list_images
from tinycap.deploy.outputs import lock, write_results
from tinycap.processing_tinycap import load_image


# Beside the folder: photos becomes photos.tinycap-index.
INDEX_ENDING = ".tinycap-index"
# Pixels of a thumbnail's longer side.
THUMBNAIL = 320
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 1.5rem }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.5rem; padding: 0 }}
li {{ list-style: none; overflow-wrap: anywhere }}
img {{ max-width: 100%; max-height: 15rem; border-radius: 4px }}
small {{ opacity: .7; display: block }}
</style>
<h1>{title}</h1>
<ol>
{items}
</ol>
</html>
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file that this process alone writes to; see `outputs.lock`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    held = lock(path)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(held.name)
        held.close()


def index_folder(args: argparse.Namespace) -> tuple[Path, str]:
    """The index's folder and the root of its images; `ValueError` where neither is given."""
    if args.index is None and not (len(args.images) == 1 and os.path.isdir(args.images[0])):
        given = " ".join(map(str, args.images[:3]))
        raise ValueError(f"expected one existing folder of images, or --index FOLDER to search others, got {given}")
    root = args.images[0] if len(args.images) == 1 and os.path.isdir(args.images[0]) else os.curdir
    return Path(args.index or f"{os.path.abspath(root)}{INDEX_ENDING}"), root


def refresh(args: argparse.Namespace, index: ImageIndex, captioner: Captioner) -> tuple[list, LeftOut]:
    """Embeds what is new or has changed and removes what has left; returns the unreadable images and their errors."""
    left_out = LeftOut()
    pending, gone = index.changes(list_images(args.images, left_out))
    if gone:
        index.remove(gone)
    results, append = captioner.embed_for_texts(list(pending)), partial(index.add, facts=pending)
    bad, *_ = write_results(args, results, len(pending), append, "Indexing")
    index.compact()
    index.summarize()
    if not args.quiet and (pending or gone):
        say(args.prog, f"{index.folder}: {len(pending) - len(bad)} images added, {len(gone)} left, {len(index)} in all")
    return bad, left_out


def caption_matches(index: ImageIndex, captioner: Captioner, matches: Iterable[Match]) -> dict[str, str]:
    """Captions by path, from the index or written now and kept there."""
    paths = [match.path for match in matches]
    captions = index.captions(paths)
    missing = [path for path in paths if path not in captions]
    new = {result.image: result.captions[0] for result in captioner(missing) if result.error is None}
    index.add_captions(new)
    return captions | new


def thumbnail(path: str) -> str:
    """A data URL; empty for an image that can't be read any more."""
    try:
        image = load_image(path)
    except ValueError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def page(title: str, rows: list[dict]) -> str:
    """One HTML file with thumbnails, which fetches nothing."""
    items = []
    for row in rows:
        caption, name = (html.escape(printable(row.get(name) or ""), quote=True) for name in ("caption", "image"))
        note = " · ".join(f"{row[name]}" for name in ("score", "group") if name in row)
        items.append(f'<li><img src="{thumbnail(row["image"])}" alt="{caption}"><div>{caption}</div>')
        items.append(f"<small>{note} {name}</small></li>")
    return PAGE.format(title=html.escape(printable(title), quote=True), items="\n".join(items))


def printable(text: str) -> str:
    """Names that aren't UTF-8 with replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def render(rows: list[dict], kind: str, title: str) -> str:
    """The rows as `text`, `json`, `tsv` or `html`."""
    if kind == "html":
        return page(title, rows)
    if kind == "json":
        return json.dumps(rows, indent=2) + "\n"
    lines = io.StringIO()
    if kind == "tsv":
        writer = csv.DictWriter(lines, list(rows[0]) if rows else ["score", "image"], dialect="excel-tab")
        writer.writeheader()
        writer.writerows({name: printable(f"{value}") for name, value in row.items()} for row in rows)
        return lines.getvalue()
    # Control characters in file names steer terminals.
    for row in rows:
        cells = (printable(f"{value}") for value in row.values())
        print(
            "  ".join("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cell) for cell in cells),
            file=lines,
        )
    return lines.getvalue()


def embed_query(args: argparse.Namespace, captioner: Captioner) -> np.ndarray | None:
    """The embedding of the words or of the image; `None` for duplicates. Raises `ValueError` where it can't be had."""
    if args.duplicates:
        return None
    if args.like is None:
        # Capitals in the middle of a caption are rare, and their tokens hardly trained.
        query = args.query.lower()
        embeds = captioner.embed_texts([query])
        num_tokens = len(captioner.tokens(query))
        # One is the start token.
        if num_tokens >= captioner.max_text_length:
            raise ValueError(f"query: expected fewer than {captioner.max_text_length} tokens, got {num_tokens}")
        words = [word.strip(string.punctuation) for word in query.split()]
        unknown = [word for word in words if len(captioner.tokens(f" {word}")) > 1]
        if unknown and not args.quiet:
            said = f"{len(unknown)} of {len(words)} words are hardly known, so that scores mean little: "
            say(args.prog, said + ", ".join(unknown))
        return embeds[0]
    result = next(captioner.embed_for_texts([args.like]))
    if result.error is not None:
        raise ValueError(f"--like {args.like}: {result.error}")
    return result.embedding


def find(args: argparse.Namespace, index: ImageIndex, captioner: Captioner, query: np.ndarray | None) -> list[dict]:
    """The result's rows."""
    if query is None:
        groups = index.duplicates(args.threshold)[: args.number]
        return [{"group": number, "image": path} for number, group in enumerate(groups, 1) for path in group]
    matches = index.search(query, args.number, without=args.like)
    rows = [{"score": round(match.score, 3), "image": match.path} for match in matches]
    if args.captions:
        captions = caption_matches(index, captioner, matches)
        rows = [{**row, "caption": captions.get(row["image"], "")} for row in rows]
    return rows


def search(args: argparse.Namespace, captioner: Captioner) -> tuple[list, LeftOut]:
    """Refreshes the index, answers the query and writes the answer; returns what couldn't be read."""
    folder, root = index_folder(args)
    table, bad, left_out = folder / "index.sqlite", [], LeftOut()
    if not (args.refresh or table.is_file()):
        raise ValueError(f"--no-refresh: expected an index in {folder}, got none")
    # Before hours of indexing, which a query that can't be embedded would end.
    query = embed_query(args, captioner)
    # Rows are numbered by the process that writes.
    with locked(table) if args.refresh else nullcontext():
        for path in (*folder.glob("index.sqlite*"), *folder.glob("embeddings-*.*")) if args.overwrite else ():
            with writing(path):
                path.unlink()
        index = ImageIndex(folder, captioner.fingerprint(), root)
        with closing(index):
            if args.refresh:
                bad, left_out = refresh(args, index, captioner)
            rows = find(args, index, captioner, query)
            if args.duplicates and not rows and not args.quiet:
                say(args.prog, f"no two of {len(index)} images have a cosine of {args.threshold} or more")
    text = render(rows, args.format, args.query or (f"Like {args.like}" if args.like else "Near duplicates"))
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_text(args.output, text)
    return bad, left_out
