"""Plots: a contact sheet of images with their captions, the curves of a training run, and reliability."""

import json
import logging
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from tinycap.commands import replacing


logger = logging.getLogger(__name__)

# Inches: the side of an image on a contact sheet, the gap beside it, and the height of the text below it.
SIDE, GAP, TEXT_HEIGHT = 2.3, 0.2, 0.95
# Metrics differ in size: those whose name contains a key share a panel with its title.
PANELS = {
    **{"loss": "loss", "reward": "CIDEr of the samples / 100", "cider": "validation CIDEr"},
    **{"accuracy": "validation accuracy", "rate": "learning rate"},
}


def _subplots(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of so many inches, and its axes row by row."""
    # Imported here: training imports this file long before it plots. Without pyplot, no window system is used.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=options).ravel()


def _save(figure, path: str | Path, tight: bool = False) -> None:
    """Writes a PNG atomically; see `replacing`."""
    if tight:
        figure.tight_layout()
    with replacing(path) as aside, warnings.catch_warnings():
        # One warning a letter; `_font_families` has given one for all.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(aside, dpi=110)


def _font_families(texts: Sequence[str]) -> list[str]:
    """DejaVu Sans and, for letters that it lacks, installed fonts; logs a warning of letters that no font has."""
    from matplotlib import font_manager, get_cachedir

    missing = {ord(letter) for text in texts for letter in text if letter.isprintable()}
    families = {}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        # Placeholders for every letter, and TeX's fonts, whose letters lie at other code points.
        if not missing or font.name.startswith(("Last Resort", "cm")):
            continue
        covered = missing & font_manager.get_font(font.fname).get_charmap().keys()
        if covered:
            families[font.name] = True
            missing -= covered
    if missing:
        letters = "".join(map(chr, sorted(missing)[:20]))
        hint = "install one, such as Noto Sans of their script, and delete the font list in"
        logger.warning("no installed font has the letters %s: boxes are drawn; %s %s", letters, hint, get_cachedir())
    return list(families) or ["DejaVu Sans"]


def _wrap(text: str, width: int, max_lines: int) -> str:
    """The first lines of `text`, at most `width` letters each, or half as many where they are twice as wide."""
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
        width //= 2
    return "\n".join(textwrap.wrap(text, width)[:max_lines])


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    path: str | Path,
    references: Sequence[str] | None = None,
    columns: int = 4,
    title: str | None = None,
) -> None:
    """Draws images in rows of `columns`, each with the model's caption under it and a human one in grey, to a PNG.

    Raises `ValueError` where captions or references are more or fewer than the images, or there are none.
    """
    if not images or len(images) != len(captions) or (references is not None and len(references) != len(images)):
        raise ValueError(
            f"expected a caption for each of at least one image, got {len(images)} images, {len(captions)} captions"
            + ("" if references is None else f" and {len(references)} references")
        )
    references = references or [""] * len(images)
    style = {"va": "top", "parse_math": False, "fontfamily": _font_families([*captions, *references])}
    rows, head = -(-len(images) // columns), 0.4 if title else 0.1
    width, height = columns * (SIDE + GAP) + GAP, rows * (SIDE + TEXT_HEIGHT) + head
    margins = {"left": GAP / width, "right": 1 - GAP / width, "top": 1 - head / height, "bottom": TEXT_HEIGHT / height}
    gaps = {"wspace": GAP / SIDE, "hspace": TEXT_HEIGHT / SIDE}
    figure, cells = _subplots(width, height, rows, columns, **margins, **gaps)
    if title:
        figure.text(GAP / width, 1 - 0.26 / height, title, fontsize=11, weight="bold")
    for cell in cells:
        cell.axis("off")
    for cell, image, caption, reference in zip(cells, images, captions, references):
        # Text is placed in pixels of the image, downwards from its upper left corner.
        cell.imshow(ImageOps.fit(image.convert("RGB"), (256, 256)))
        text = _wrap(caption or "(no caption)", 38, max_lines=3)
        lines = text.count("\n") + 1
        cell.text(0, 262, text, fontsize=8, **style)
        cell.text(0, 267 + 16 * lines, _wrap(reference, 44, 5 - lines), color="0.5", fontsize=7, **style)
    _save(figure, path)


def plot_curves(metrics: str | Path | Sequence[str | Path], path: str | Path) -> None:
    """Draws every loss, the learning rate and the validation scores of a `metrics.jsonl` against the step, to a PNG.

    The logs of several runs, each continued from the one before, are drawn one after the other, with a line between.
    Raises `ValueError` where a file has no rows, or none a finite value.
    """
    series, start, starts = {}, 0, []
    for log in [metrics] if isinstance(metrics, (str, Path)) else metrics:
        rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise ValueError(f"{log}: expected rows of metrics, got none")
        for row in rows:
            for name in row.keys() - {"step", "epoch", "elapsed_seconds"}:
                if isinstance(row[name], (int, float)) and math.isfinite(row[name]):
                    series.setdefault(name, []).append((start + row["step"], row[name]))
        start += rows[-1]["step"]
        starts.append(start)
    panels = {title: [name for name in sorted(series) if key in name] for key, title in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        raise ValueError(f"{metrics}: expected rows of finite metrics, got none")
    figure, all_axes = _subplots(4.2 * len(panels), 3.4, columns=len(panels))
    for axes, (title, names) in zip(all_axes, panels.items()):
        for name in names:
            points, label = series[name], name.replace("_", " ")
            if len(points) == 1:
                # A single dot needs its value beside it.
                label += f": {points[0][1]:.3g}"
            axes.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None, markersize=3)
        for start in starts[:-1]:
            axes.axvline(start, color="0.6", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step", title=title)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    _save(figure, path, tight=True)


def plot_reliability(bins: dict[str, list[dict[str, float]]], path: str | Path) -> None:
    """Draws the share of right captions against their confidence, with one binomial standard error, to a PNG.

    `bins`: for each line of the plot, see `tinycap.evaluation.confidence.reliability`.
    """
    figure, [axes] = _subplots(4.6, 4.4)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1, label="perfect")
    for name, bins_of_name in bins.items():
        confidence, share = ([bin[key] for bin in bins_of_name] for key in ("confidence", "share"))
        errors = [(bin["share"] * (1 - bin["share"]) / bin["count"]) ** 0.5 for bin in bins_of_name]
        axes.errorbar(confidence, share, yerr=errors, marker="o", markersize=4, capsize=2, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share of right captions")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path, tight=True)
