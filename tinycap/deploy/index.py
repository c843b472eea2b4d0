"""An index of image embeddings on disk: the images nearest to a text or an image, and near duplicates.

An index is a folder of two files. `index.sqlite` lists the images: size and time of change, the row of the embedding,
and the caption once it was shown. `embeddings-N.f32` holds the rows, float32 of unit norm, and is memory-mapped. A row
is written before the table names it and is never overwritten: the index is whole at whatever moment a run is killed.

Of a large index, a query reads `embeddings-N.coarse.npy` first, the embeddings' leading principal components, and then
the whole embeddings of the best by these.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinycap.commands import replacing, writing
from tinycap.deploy.captioners import ImageResult


TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE images (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, changed INTEGER NOT NULL, row INTEGER UNIQUE, caption TEXT, error TEXT
) WITHOUT ROWID;
"""
# Raised when the tables change: an index of another version is made anew.
VERSION = "1"
# Share of rows without an image from which on the embeddings are written anew.
MAX_DEAD = 0.25
# Images that are compared with all others at a time, for duplicates.
BLOCK = 1024
# Rows from which on, and new ones for which, the principal components are computed; how many of these; how many rows
# are compared as a whole.
MANY_ROWS, NEW_ROWS, COMPONENTS, SHORTLIST = 200_000, 100_000, 128, 4000


@dataclass(frozen=True)
class Match:
    """An image of the index with its cosine similarity to the query."""

    path: str
    score: float


class ImageIndex:
    """Opens the index in `folder`, or begins one.

    Args:
        folder: the index's own folder.
        model: what tells the checkpoint from others; embeddings of two of them can't be compared.
        root: folder that the images' paths are kept relative to, where they lie in it, so that both can be moved.

    Raises:
        ValueError: it was made with another checkpoint, or is damaged; `OutputError` if it can't be written.
    """

    def __init__(self, folder: str | Path, model: str, root: str | Path):
        self.folder, self.root, self.shown_root = Path(folder), os.path.abspath(root), root
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._reading():
            # The journal lets others read while one writes.
            self.table = sqlite3.connect(self.folder / "index.sqlite", isolation_level=None, timeout=30)
            if not self.table.execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'").fetchone():
                self._begin(model)
            facts = dict(self.table.execute("SELECT name, value FROM facts"))
        for name, value in {"version": VERSION, "model": model}.items():
            if facts.get(name) != value:
                found = f"index {self.folder}: expected {name} {value}, got {facts.get(name)}"
                raise ValueError(f"{found}; delete it or name another --index")
        # Of an embedding; 0 before the first one.
        self.width = int(facts["width"])
        self.embeddings_path = self.folder / facts["embeddings"]
        self.num_rows = int(facts["rows"])
        size = self.embeddings_path.stat().st_size if self.embeddings_path.is_file() else 0
        if size < self.num_rows * 4 * self.width:
            raise self._damaged(f"{self.embeddings_path.name} has {size} bytes")

    def _damaged(self, reason: object) -> ValueError:
        return ValueError(f"index {self.folder}: damaged ({reason}); delete it, and it is made anew")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            # A full disk, a folder that may not be written to, another process that writes.
            with writing(self.folder):
                raise OSError(0, str(error)) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _begin(self, model: str) -> None:
        facts = {"version": VERSION, "model": model, "width": "0", "rows": "0", "embeddings": "embeddings-0.f32"}
        with self._transaction():
            for statement in TABLES.split(";")[:-1]:
                self.table.execute(statement)
            self.table.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reading():
            self.table.execute("BEGIN IMMEDIATE")
            # Commits, or rolls back after an error.
            with self.table:
                yield

    def _update(self, **facts: str | int) -> None:
        for name, value in facts.items():
            self.table.execute("UPDATE facts SET value = ? WHERE name = ?", [str(value), name])

    def __len__(self) -> int:
        """Images with an embedding."""
        with self._reading():
            return self.table.execute("SELECT COUNT(row) FROM images").fetchone()[0]

    # --- what is on disk ---

    def _key(self, path: str) -> bytes:
        path = os.path.abspath(path)
        is_inside = os.path.commonpath([path, self.root]) == self.root if path[:1] == self.root[:1] else False
        # As bytes: a name may be invalid UTF-8.
        return os.fsencode(os.path.relpath(path, self.root) if is_inside else path)

    def _path(self, key: bytes) -> str:
        return os.path.normpath(os.path.join(self.shown_root, os.fsdecode(key)))

    def changes(self, paths: Iterable[str]) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Compares the index with `paths`, all images that it is to hold.

        Returns:
            Size and time of change of the new and changed ones, by path; the indexed ones that aren't there any more.
        """
        with self._reading():
            rows = self.table.execute("SELECT path, size, changed FROM images").fetchall()
        known, pending = {key: tuple(facts) for key, *facts in rows}, {}
        for path in paths:
            try:
                status = os.stat(path)
            except OSError:
                # Gone since the folder was listed; it leaves the index below.
                continue
            facts = (status.st_size, status.st_mtime_ns)
            if known.pop(self._key(path), None) != facts:
                pending[path] = facts
        changed = {self._key(path) for path in pending}
        return pending, [self._path(key) for key in known if key not in changed]

    def remove(self, paths: Iterable[str]) -> None:
        with self._transaction():
            self.table.executemany("DELETE FROM images WHERE path = ?", ((self._key(path),) for path in paths))

    def add(self, results: Iterable[ImageResult], facts: dict[str, tuple[int, int]]) -> tuple[()]:
        """Adds images, or replaces changed ones, all of `results` or none; as an output's `append`, none fails alone.

        Args:
            results: with an embedding, or the error of an unreadable image, which is remembered until it changes.
            facts: their size and time of change, from before they were read; see `changes`.
        """
        results = list(results)
        embeddings = [result.embedding for result in results if result.error is None]
        width = len(embeddings[0]) if embeddings else self.width
        first = row = self.num_rows
        with writing(self.embeddings_path), open(self.embeddings_path, "r+b" if first else "wb") as file:
            file.seek(4 * width * first)
            file.write(np.asarray(embeddings, np.float32).tobytes())
        rows = []
        for result in results:
            rows.append((self._key(result.image), *facts[result.image], None if result.error else row, result.error))
            row += result.error is None
        with self._transaction():
            command = "INSERT OR REPLACE INTO images (path, size, changed, row, error) VALUES (?, ?, ?, ?, ?)"
            self.table.executemany(command, rows)
            self._update(width=width, rows=row)
        self.num_rows, self.width = row, width
        return ()

    def compact(self) -> None:
        """Writes the embeddings anew, without the rows of images that have left, if these are many."""
        if len(self) == 0 or self.num_rows - len(self) <= MAX_DEAD * self.num_rows:
            return
        with self._reading():
            rows = self.table.execute("SELECT path, row FROM images WHERE row IS NOT NULL ORDER BY row").fetchall()
        old, number = self.embeddings_path, int(self.embeddings_path.stem.rpartition("-")[2]) + 1
        new, matrix = self.folder / f"embeddings-{number}.f32", self.matrix()
        with writing(new), open(new, "wb") as file:
            for start in range(0, len(rows), BLOCK):
                file.write(matrix[[row for _, row in rows[start : start + BLOCK]]].tobytes())
        with self._transaction():
            # In two steps, since rows are unique.
            self.table.execute("UPDATE images SET row = -1 - row WHERE row IS NOT NULL")
            pairs = ((number, path) for number, (path, _) in enumerate(rows))
            self.table.executemany("UPDATE images SET row = ? WHERE path = ?", pairs)
            self._update(embeddings=new.name, rows=len(rows))
        self.embeddings_path, self.num_rows = new, len(rows)
        del matrix
        for path in self.folder.glob(f"{old.stem}.*"):
            with contextlib.suppress(OSError):
                # Windows keeps it while another process reads it.
                path.unlink()

    def summarize(self) -> None:
        """Computes the principal components of a large index, unless nearly all rows have them."""
        done = 0 if (found := self._coarse()) is None else len(found[1])
        if self.num_rows < MANY_ROWS or self.num_rows - done < NEW_ROWS:
            return
        matrix = self.matrix()
        sample = matrix[:: max(1, self.num_rows // MANY_ROWS)]
        # Of the second moments, uncentred: scores are dot products.
        basis = np.linalg.eigh(sample.T @ sample)[1][:, : -COMPONENTS - 1 : -1].astype(np.float32)
        with replacing(self.embeddings_path.with_suffix(".coarse.npy")) as aside:
            rows = np.lib.format.open_memmap(aside, "w+", np.float32, (self.num_rows + self.width, basis.shape[1]))
            # The basis, then a row for each of the matrix's.
            rows[: self.width] = basis
            for start in range(0, self.num_rows, BLOCK):
                rows[self.width + start : self.width + start + BLOCK] = matrix[start : start + BLOCK] @ basis
            rows.flush()
            del rows

    def _coarse(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The principal axes (width, components) and the components of the first rows; `None` if there are none."""
        path = self.embeddings_path.with_suffix(".coarse.npy")
        if not path.is_file():
            return None
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error
        return rows[: self.width], rows[self.width :]

    # --- queries ---

    def matrix(self) -> np.ndarray:
        """(rows, width), memory-mapped; rows of images that have left are among them."""
        return np.memmap(self.embeddings_path, np.float32, "r", shape=(self.num_rows, self.width))

    def _images(self, rows: Iterable[int]) -> dict[int, str]:
        """The paths of those rows that have an image."""
        found = {}
        with self._reading():
            for row in rows:
                if (
                    key := self.table.execute("SELECT path FROM images WHERE row = ?", [int(row)]).fetchone()
                ) is not None:
                    found[row] = self._path(key[0])
        return found

    def search(self, embedding: np.ndarray, number: int, without: str | None = None) -> list[Match]:
        """The `number` images nearest to an embedding (width,), best first.

        Args:
            without: an image that is left out, since it is the query.
        """
        if self.num_rows == 0:
            return []
        query, matrix = np.asarray(embedding, np.float32), self.matrix()
        rows, coarse = np.arange(self.num_rows), self._coarse()
        if coarse is None:
            scores = matrix @ query
        else:
            basis, components = coarse
            shortlist = min(len(components), max(SHORTLIST, 40 * number))
            best = np.argpartition(-(components @ (query @ basis)), shortlist - 1)[:shortlist]
            rows = np.concatenate([best, rows[len(components) :]])
            scores = matrix[rows] @ query
        order = np.argsort(-scores, kind="stable")
        matches, skipped = [], None if without is None else os.path.abspath(without)
        # More than asked for, since there are rows without an image, and the query.
        for start in range(0, len(order), 2 * number):
            several = order[start : start + 2 * number]
            images = self._images(rows[several])
            found = ((images.get(row), score) for row, score in zip(rows[several], scores[several]))
            matches += [
                Match(path, float(score))
                for path, score in found
                if path is not None and os.path.abspath(path) != skipped
            ]
            if len(matches) >= number:
                break
        return matches[:number]

    def duplicates(self, threshold: float) -> list[list[str]]:
        """Groups of images that are linked by cosines of at least `threshold`; the largest groups first."""
        with self._reading():
            rows = dict(self.table.execute("SELECT row, path FROM images WHERE row IS NOT NULL ORDER BY path"))
        order, matrix = sorted(rows), self.matrix() if rows else None
        group = {row: row for row in order}

        def find(row: int) -> int:
            while group[row] != row:
                group[row] = row = group[group[row]]
            return row

        for start in range(0, len(order), BLOCK):
            block = matrix[order[start : start + BLOCK]]
            for other in range(start, len(order), BLOCK):
                near = block @ matrix[order[other : other + BLOCK]].T >= threshold
                for left, right in zip(*np.nonzero(near)):
                    group[find(order[other + right])] = find(order[start + left])
        groups: dict[int, list[str]] = {}
        for row, key in rows.items():
            groups.setdefault(find(row), []).append(self._path(key))
        return sorted((paths for paths in groups.values() if len(paths) > 1), key=lambda paths: (-len(paths), paths))

    # --- captions, written when they are first shown ---

    def captions(self, paths: Iterable[str]) -> dict[str, str]:
        """The known captions, by path."""
        found = {}
        with self._reading():
            for path in paths:
                row = self.table.execute("SELECT caption FROM images WHERE path = ?", [self._key(path)]).fetchone()
                if row is not None and row[0] is not None:
                    found[path] = row[0]
        return found

    def add_captions(self, captions: dict[str, str]) -> None:
        with self._transaction():
            rows = ((caption, self._key(path)) for path, caption in captions.items())
            self.table.executemany("UPDATE images SET caption = ? WHERE path = ?", rows)

    def close(self) -> None:
        self.table.close()
