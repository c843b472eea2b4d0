"""The columns of a data set: which hold the images, their captions and their ids, and what a row has in them."""

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from tinycap.training.captions import clean_captions, text_of, usable_captions


logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset
# Usual names, the most usual first.
CAPTION_COLUMNS = tuple("captions caption text sentences txt sentence raw comment description alt_text".split())
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "photo")
ID_COLUMNS = ("image_id", "id", "filename", "file_name", "__key__")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of an image, its captions (`caption` and further ones) and its id, where there is one.

    Args:
        caption: `None` where the data set's images have no captions, or those it has aren't wanted.
        requires_captions: a row without a usable caption is an error.
        root: the data set (folder, or name on the Hub) that rows may name files of; `None` for rows of the caller's.
        follow_links: links below `root` may lead out of it: they are the user's.
        allow_remote_images: rows may name any file or URL.
    """

    image: str
    caption: str | None
    image_id: str | None = None
    more_captions: tuple[str, ...] = ()
    requires_captions: bool = True
    root: str | None = field(default=None, compare=False)
    follow_links: bool = field(default=False, compare=False)
    allow_remote_images: bool = field(default=False, compare=False)

    @property
    def captions(self) -> list[str]:
        return [] if self.caption is None else [self.caption, *self.more_captions]

    def captions_of(self, row: dict) -> list[str]:
        """The row's usable captions; with `requires_captions`, raises `ValueError` where there are none (see
        `clean_captions`)."""
        if not self.requires_captions:
            return usable_captions(row[name] for name in self.captions)
        return clean_captions([row[name] for name in self.captions] if self.more_captions else row[self.caption])

    def id_of(self, row: dict, number: int | str) -> str | int:
        """The row's id: the value of its id column, else its file's name, else `number`."""
        if self.image_id and row[self.image_id] is not None:
            return row[self.image_id]
        path = path_of(row[self.image])
        return number if path is None else os.path.basename(path) if os.path.isabs(path) else path

    def image_of(self, row: dict) -> str | bytes | Image.Image | None:
        """The row's image, for `load_image`: bytes, base64, or the path of a file below `root` or in the Hub's caches.

        Raises:
            ValueError: it is a URL or a file elsewhere, which the author of a data set must not choose to be opened.
        """
        source = row[self.image]
        if isinstance(source, dict):
            # Even empty bytes are the image: the path may name another.
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if self.root is None or not isinstance(source, str) or source.startswith("data:"):
            return source
        roots = (self.root, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        paths = [os.path.abspath(path) for path in (source, os.path.join(self.root, source))]
        # Others aren't even looked for: on Windows, a path may name another machine.
        if not self.allow_remote_images:
            paths = [path for path in paths if any(Path(path).is_relative_to(os.path.abspath(root)) for root in roots)]
        for path in filter(os.path.isfile, paths):
            is_own = any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) for root in roots)
            if is_own or self.follow_links or self.allow_remote_images:
                return path
        is_elsewhere = "://" in source or (os.path.isabs(source) and not paths)
        if not self.allow_remote_images and (is_elsewhere or any(map(os.path.lexists, (source, *paths)))):
            expected = f"bytes or a file below {self.root} (see --allow_remote_images)"
            raise ValueError(f"expected {expected}, got {source[:300]}")
        return source


def path_of(image: dict | str | bytes | None) -> str | None:
    """The path of an undecoded image; `None` where it has none."""
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) and 0 < len(path) < 4096 and not path.startswith("data:") else None


def resolve_columns(
    dataset: AnyDataset,
    image_column: str | None = None,
    caption_column: str | None = None,
    root: str | None = None,
    allow_remote_images: bool = False,
    captions: bool = True,
) -> Columns:
    """Finds the image, caption (also caption_0 ...) and id columns, by the given names or by the usual ones.

    `root` and `allow_remote_images`: see `Columns`. Of several candidates the most usual name is taken, with a warning.
    Without `captions`, none are looked for, and a caption column is ignored.

    Raises:
        ValueError: there is no such column, or it holds no text, or neither images nor bytes nor paths.
    """
    names = list(dataset.column_names or next(iter(dataset)))
    features = dataset.features or {}
    # The name of each column, and its number.
    parts = {name: re.fullmatch(r"(?s)(.*?)(?:[ _-]?(\d+))?", name.lower()).groups() for name in names}

    def named(usual: tuple[str, ...], numbered: bool = False) -> list[str]:
        found = [name for name, (word, number) in parts.items() if word in usual and bool(number) == numbered]
        return sorted(found, key=lambda name: int(parts[name][1]) if numbered else usual.index(parts[name][0]))

    def pick(flag: str, given: str | None, candidates: list[str], usual: tuple[str, ...]) -> str:
        if given is not None:
            candidates, usual = [name for name in names if name == given], (given,)
        if not candidates:
            raise ValueError(f"{flag}: expected a column named {' or '.join(usual)}, got columns {names}")
        if len(candidates) > 1:
            logger.warning("%s: took %r of the columns %s", flag, candidates[0], candidates)
        return candidates[0]

    caption, more = None, []
    if captions:
        candidates = named(CAPTION_COLUMNS) or named(CAPTION_COLUMNS, numbered=True)[:1]
        caption = pick("caption_column", caption_column, candidates, CAPTION_COLUMNS)
        numbered = named(parts[caption][:1], numbered=True)
        more = [] if caption_column else [name for name in numbered if name != caption]
        for name in (caption, *more):
            if name in features and not _holds_text(kind := features[name]):
                raise ValueError(f"caption_column: expected strings or lists of strings in {name!r}, got {kind}")
    usual = [name for name in named(IMAGE_COLUMNS) if name != caption]
    images = [name for name in usual if _holds_files(features.get(name))]
    images += [name for name in names if isinstance(features.get(name), datasets.Image) and name not in images]
    image = pick("image_column", image_column, images or usual, IMAGE_COLUMNS)
    kind = features.get(image)
    if not (kind is None or _is_value(kind, "string") or _holds_files(kind)):
        raise ValueError(f"image_column: expected images, bytes of image files or paths in {image!r}, got {kind}")
    image_id = next((name for name in ID_COLUMNS if name in names and name not in (caption, image)), None)
    follow_links = dataset.info.builder_name == "generator"  # By `read_folder`, which found the files.
    return Columns(image, caption, image_id, tuple(more), captions, root, follow_links, allow_remote_images)


def _is_value(kind: object, dtype: str) -> bool:
    return isinstance(kind, datasets.Value) and dtype in kind.dtype


def _holds_files(kind: object) -> bool:
    is_struct = isinstance(kind, dict) and not {"bytes", "path"}.isdisjoint(kind)
    return is_struct or isinstance(kind, datasets.Image) or _is_value(kind, "binary")


def _holds_text(kind: object, is_list: bool = False) -> bool:
    # Strings, lists of strings, or lists of objects with a text each.
    if isinstance(kind, dict):
        inner = text_of(kind)
        return _holds_text(inner) and (is_list or not isinstance(inner, datasets.Value))
    return _is_value(kind, "string") or (hasattr(kind, "feature") and _holds_text(kind.feature, is_list=True))
