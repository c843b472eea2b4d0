"""Where a folder of tables is broken: the file, row and column that a library's error leaves unsaid.

Looks only once something has failed, so that it may take its time.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def find_table_fault(folder: str | Path) -> str | None:
    """The first fault of the folder's parquet and JSON-lines files, in words; `None` where none is found."""
    first_schema = None
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".jsonl":
            fault = _json_lines_fault(path)
        elif path.suffix == ".parquet":
            fault, schema = _parquet_fault(path)
            if fault is None and first_schema is not None:
                fault = _schema_fault(schema, *first_schema)
            first_schema = first_schema or (schema, path)
        else:
            continue
        if fault is not None:
            return f"{path}: {fault}"
    return None


def _json_lines_fault(path: Path) -> str | None:
    first_kinds: dict[str, tuple[str, int]] = {}
    rows = 0
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            rows += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                return f"line {number}: not JSON: {error}"
            if not isinstance(row, dict):
                return f"line {number}: expected an object with a value for each column, got {type(row).__name__}"
            for column, value in row.items():
                if _has_lone_surrogate(value):
                    return f"line {number}, column {column!r}: text that is no Unicode (a lone surrogate)"
                kind = _kind(value)
                known, where = first_kinds.setdefault(column, (kind, number)) if kind else (kind, number)
                if kind != known:
                    return f"line {number}, column {column!r}: expected {known}, as in line {where}, got {kind}"
    return None if rows else "no rows"


def _kind(value: Any) -> str | None:
    """What a JSON value is called; `None` for null and for an empty list, which go with everything."""
    if isinstance(value, list):
        kinds = sorted({kind for entry in value if (kind := _kind(entry))})
        return f"a list ({' and '.join(kinds)})" if kinds else None
    names = {bool: "boolean", int: "number", float: "number", str: "string", dict: "object"}
    return names.get(type(value))


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _parquet_fault(path: Path) -> tuple[str | None, pyarrow.Schema | None]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        return f"not a whole parquet file: {error}", None
    if file.metadata.num_rows == 0:
        return "no rows", file.schema_arrow
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        for column in file.schema_arrow.names:
            try:
                file.read_row_group(group, columns=[column])
            except (pyarrow.ArrowException, OSError) as error:
                return f"rows {start} to {end - 1}, column {column!r}: {error}", file.schema_arrow
        start = end
    return None, file.schema_arrow


def _schema_fault(schema: pyarrow.Schema, first: pyarrow.Schema, first_path: Path) -> str | None:
    for name in first.names:
        if name not in schema.names:
            return f"expected a column {name!r}, as in {first_path.name}, got columns {schema.names}"
        if schema.field(name).type != first.field(name).type:
            return (
                f"column {name!r}: expected {first.field(name).type}, as in {first_path.name}, "
                f"got {schema.field(name).type}"
            )
    return None
