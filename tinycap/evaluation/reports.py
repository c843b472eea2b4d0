"""Plots: a contact sheet of images with their captions, and the curves of a training run."""

import json
import logging
import math
import os
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps


logger = logging.getLogger(__name__)

# Sides of an image and of its cell, in inches at `DPI`.
PICTURE, TEXT_HEIGHT, DPI = 2.3, 0.95, 110
# Losses differ in size: each of these prefixes gets a panel of its own.
PANELS = (
    ("loss", "loss"),
    ("reward", "CIDEr of the samples / 100"),
    ("cider", "validation CIDEr"),
    ("accuracy", "validation accuracy"),
    ("rate", "learning rate"),
)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("reports need matplotlib: pip install 'tinycap[evaluation]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _font_families(texts: Sequence[str]) -> list[str]:
    """DejaVu Sans and, for letters that it lacks, installed fonts; logs a warning of letters that no font has."""
    from matplotlib import font_manager, get_cachedir

    missing = {ord(letter) for text in texts for letter in text if letter.isprintable()}
    families = []
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        # Placeholders for every letter, and TeX's fonts, whose letters lie at other code points.
        if not missing or font.name.startswith(("Last Resort", "cm")):
            continue
        covered = missing & font_manager.get_font(font.fname).get_charmap().keys()
        if covered:
            families.append(font.name)
            missing -= covered
    if missing:
        logger.warning(
            "no installed font has the letters %s: they are drawn as boxes; install one, such as Noto Sans of their "
            "script, and delete the font list in %s",
            "".join(map(chr, sorted(missing)[:20])),
            get_cachedir(),
        )
    return list(dict.fromkeys(families)) or ["DejaVu Sans"]


def _wrap(text: str, width: int, max_lines: int) -> str:
    """The first lines of `text`, at most `width` letters each, or half as many where they are twice as wide."""
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in text):
        width //= 2
    return "\n".join(textwrap.wrap(text, width)[:max_lines])


def _save(figure, path: str | Path) -> None:
    # Aside and renamed, so that no reader sees half a file.
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    with warnings.catch_warnings():
        # One warning a letter; `_font_families` has given one for all.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(aside, dpi=DPI)
    os.replace(aside, path)
    _pyplot().close(figure)


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    path: str | Path,
    references: Sequence[str] | None = None,
    columns: int = 4,
    title: str | None = None,
) -> None:
    """Draws images in rows, each with the model's caption under it and a human one in grey, to a PNG.

    Args:
        images: the images; captions: the model's, one for each.
        path: the PNG to write.
        references: a human caption for each, or `None`.
        columns: images in a row.
        title: over everything.

    Raises:
        ValueError: there are more or fewer captions than images, or none.
        ImportError: matplotlib isn't installed.
    """
    if not images or len(images) != len(captions) or (references is not None and len(references) != len(images)):
        raise ValueError(
            f"expected a caption for each of at least one image, got {len(images)} images, {len(captions)} captions"
            + ("" if references is None else f" and {len(references)} references")
        )
    pyplot = _pyplot()
    families = _font_families([*captions, *(references or ())])
    rows = -(-len(images) // columns)
    head = 0.4 if title else 0.1
    figure = pyplot.figure(figsize=(columns * (PICTURE + 0.2) + 0.2, rows * (PICTURE + TEXT_HEIGHT) + head))
    width, height = figure.get_size_inches()
    if title:
        figure.text(0.2 / width, 1 - 0.26 / height, title, fontsize=11, weight="bold")
    for index, (image, caption) in enumerate(zip(images, captions)):
        row, column = divmod(index, columns)
        left, top = 0.2 + column * (PICTURE + 0.2), head + row * (PICTURE + TEXT_HEIGHT)
        axes = figure.add_axes((left / width, 1 - (top + PICTURE) / height, PICTURE / width, PICTURE / height))
        axes.imshow(ImageOps.fit(image.convert("RGB"), (256, 256)))
        axes.axis("off")
        text = _wrap(caption or "(no caption)", 38, max_lines=3)
        lines = text.count("\n") + 1
        below = {"va": "top", "fontsize": 8, "parse_math": False, "fontfamily": families}
        figure.text(left / width, 1 - (top + PICTURE + 0.06) / height, text, **below)
        if references is not None:
            offset = PICTURE + 0.1 + 0.145 * lines
            text = _wrap(references[index], 44, max_lines=5 - lines)
            figure.text(left / width, 1 - (top + offset) / height, text, color="0.5", **{**below, "fontsize": 7})
    _save(figure, path)


def plot_curves(metrics: str | Path | Sequence[str | Path], path: str | Path) -> None:
    """Draws every loss, the learning rate and the validation scores of a `metrics.jsonl` against the step, to a PNG.

    Args:
        metrics: the log of a run; of several runs, each continued from the one before, one after the other, with a line
            where a new one begins.
        path: the PNG to write.

    Raises:
        ValueError: a file has no rows, or none a finite value.
        ImportError: matplotlib isn't installed.
    """
    rows, starts = [], []
    for log in [metrics] if isinstance(metrics, (str, Path)) else metrics:
        stage = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
        if not stage:
            raise ValueError(f"{log}: expected rows of metrics, got none")
        starts.append(rows[-1]["step"] if rows else 0)
        rows += [{**row, "step": row["step"] + starts[-1]} for row in stage]
    pyplot = _pyplot()
    series = {}
    for row in rows:
        for name in row.keys() - {"step", "epoch", "elapsed_seconds"}:
            if isinstance(row[name], (int, float)) and math.isfinite(row[name]):
                series.setdefault(name, []).append((row["step"], row[name]))
    panels = [(label, [name for name in sorted(series) if key in name]) for key, label in PANELS]
    panels = [(label, found) for label, found in panels if found]
    if not panels:
        raise ValueError(f"{metrics}: expected rows of finite metrics, got none")
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axes, (label, found) in zip(all_axes[0], panels):
        for name in found:
            points, text = series[name], name.replace("_", " ")
            if len(points) == 1:
                # A single dot needs its value beside it.
                text += f": {points[0][1]:.3g}"
            axes.plot(*zip(*points), label=text, marker="o" if len(points) < 20 else None, markersize=3)
        for start in starts[1:]:
            axes.axvline(start, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def plot_bars(values: dict[str, float], path: str | Path, label: str) -> None:
    """Draws one horizontal bar for each named value, with its number, to a PNG.

    Args:
        values: from top to bottom.
        label: what the bars measure.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.45 * len(values)))
    bars = axes.barh(list(values), list(values.values()), color="0.45")
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    figure.tight_layout()
    _save(figure, path)


def plot_reliability(bins: dict[str, list[dict[str, float]]], path: str | Path) -> None:
    """Draws the share of right captions against their confidence, a line for each name, to a PNG.

    Args:
        bins: for each name its bins, with `confidence`, `share` and `count` (see `tinycap.evaluation.confidence`); bars
            are one binomial standard error.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(4.6, 4.4))
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1, label="perfect")
    for name, found in bins.items():
        confidence, share = [bin["confidence"] for bin in found], [bin["share"] for bin in found]
        errors = [(bin["share"] * (1 - bin["share"]) / bin["count"]) ** 0.5 for bin in found]
        axes.errorbar(confidence, share, yerr=errors, marker="o", markersize=4, capsize=2, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share of right captions")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)


def plot_groups(labels: Sequence[str], panels: dict[str, list[list[float]]], axis: str, path: str | Path) -> None:
    """Draws groups of metrics to a PNG: each value a dot, a line through the means, one panel for each kind.

    Args:
        labels: of the groups, along the x axis.
        panels: by title, each group's values; an empty group is left out.
        axis: what the x axis is.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for panel, (title, groups) in zip(axes[0], panels.items()):
        points = [(position, group) for position, group in enumerate(groups) if group]
        panel.plot([position for position, _ in points], [sum(group) / len(group) for _, group in points])
        for position, group in points:
            panel.scatter([position] * len(group), group, color="C1", zorder=3)
        panel.set_xticks(range(len(labels)), labels)
        panel.set_xlabel(axis)
        panel.set_title(title)
    figure.tight_layout()
    _save(figure, path)
