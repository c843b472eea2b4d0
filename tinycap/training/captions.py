"""Captions in the forms that datasets have, as clean text."""

import ast
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator


# Keys of the text in lists of objects such as COCO's [{"raw": ...}].
TEXT_KEYS = ("raw", "caption", "text", "sentence")
# Control characters steer terminals, and lone surrogates can't be encoded.
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
QUOTED = r"""[uU]?(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""


def clean_captions(value: str | list | dict | None) -> list[str]:
    """The usable captions of one caption, one a line, a list, such a list written as text (JSON, Python's or NumPy's),
    or a list of objects such as COCO's `{"raw": ...}`.

    Control characters and whitespace are folded, spaces before closing punctuation and captions without a visible
    character left out. Raises `ValueError` where no caption is left.
    """
    captions = usable_captions([value])
    if not captions:
        raise ValueError(f"expected a caption or a list of captions, got {str(value)[:80]!r} ({type(value).__name__})")
    return captions


def usable_captions(values: Iterable) -> list[str]:
    """The cleaned captions of several values as `clean_captions` takes them; may be empty."""
    texts = (" ".join(UNWRITABLE.sub(" ", text).split()) for text in _texts(list(values)))
    captions = [re.sub(r"\s+([.,;:!?])", r"\1", text) for text in texts]
    # Zero-width spaces and direction marks alone are no caption.
    return [text for text in captions if any(unicodedata.category(letter)[0] not in "CZ" for letter in text)]


def _texts(value) -> Iterator[str]:
    if isinstance(value, str):
        listed = _parse_list(value.strip())
        yield from re.split(r"[\r\n]+", value) if listed is None else listed
    elif isinstance(value, dict):
        yield from _texts(text_of(value))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)


def text_of(entry: dict):
    """The text of an object such as COCO's `{"raw": ...}`; `None` where it has none."""
    return next((entry[key] for key in TEXT_KEYS if key in entry), None)


def _parse_list(text: str) -> list[str] | None:
    """The strings (or texts of the objects) of a list that was written as text; `None` for any other text."""
    if (text[:1], text[-1:]) not in (("[", "]"), ("(", ")")):
        return None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        try:
            if re.fullmatch(rf"(?:[\[\](),\s]|None|{QUOTED})*", text):
                # Not the list as a whole: NumPy writes no commas, and Python would join adjacent strings.
                entries = [ast.literal_eval(entry) for entry in re.findall(QUOTED, text)]
            elif text.startswith("[{"):
                entries = ast.literal_eval(text)
            else:
                return None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    entries = [text_of(entry) if isinstance(entry, dict) else entry for entry in entries]
    texts = [entry for entry in entries if entry]
    return texts if texts and all(isinstance(entry, (str, type(None))) for entry in entries) else None
