"""The rows that can't be used: counted, listed in a file, and an error if they are too many."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any


@dataclass
class SkippedRows:
    """Counts the rows that are left out and lists them in a file.

    Args:
        path: JSON lines; `None` to count only.
        on_bad_row: "skip", or "error" to stop at the first one.
        max_share: share of bad rows above which the dataset is refused.
    """

    path: Path | None = None
    on_bad_row: str = "skip"
    max_share: float = 0.10
    reasons: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    written: set[str] | None = None

    @property
    def count(self) -> int:
        return sum(map(len, self.reasons.values()))

    def add(self, split: str, row: int | None, image_id: str, reason: str) -> None:
        """Counts one row; `row` is its number in the table it was read from, `None` in a stream.

        A line that the file holds already, from an earlier epoch or the resumed run, is not written again.
        """
        if self.on_bad_row == "error":
            raise ValueError(f"split {split}, row {row}, id {image_id}: {reason}")
        self.reasons[split].append(reason)
        if self.path is None:
            return
        if self.written is None:
            self.written = set(self.path.read_text("utf-8").split("\n")) if self.path.exists() else set()
        line = {"split": split, "row": row, "image_id": image_id, "reason": reason}
        line = json.dumps(line, ensure_ascii=False)
        if line not in self.written:
            self.written.add(line)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def check(self, split: str, total: int) -> None:
        """Raises `ValueError` if more than `max_share` of the split's `total` rows so far were bad."""
        bad = self.reasons[split]
        if len(bad) > self.max_share * total:
            raise ValueError(
                f"split {split}: expected at most {self.max_share:.0%} bad rows, got {len(bad)} of {total}, first: "
                f"{bad[0]}" + (f"; they are listed in {self.path}" if self.path else "")
            )


def refuse_remote_images(rows: Any, columns: Any) -> None:
    """Raises `ValueError` if all of the first 100 undecoded rows name images that their `Columns` don't allow: before
    the others are read one by one."""

    def is_refused(row: dict) -> bool:
        try:
            columns.image_of(row)
        except ValueError:
            return True
        return False

    if len(rows) and all(map(is_refused, islice(rows, 100))):
        seen = min(len(rows), 10_000)
        refused = sum(map(is_refused, islice(rows, seen)))
        raise ValueError(
            f"image_column: expected bytes or files below {columns.root}, got URLs or files elsewhere in {refused:,} "
            f"of the first {seen:,} rows (of {len(rows):,}); --allow_remote_images opens them"
        )
