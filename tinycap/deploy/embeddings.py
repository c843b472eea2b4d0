"""Files of image embeddings and the images' names."""

import base64
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from tinycap.commands import replacing, write_text
from tinycap.deploy.captioners import ImageResult
from tinycap.deploy.outputs import Output, RowFile, check_file, json_line


class EmbeddingRows:
    """Rows of embeddings, float32 in base64, with the name of the model."""

    def __init__(self, model: str):
        self.model = model

    def line(self, result: ImageResult, kind: str) -> str:
        row = {"image": result.image, "model": self.model}
        if result.error is not None:
            return json_line({**row, "error": result.error})
        embedding = np.asarray(result.embedding, np.float32).tobytes()
        return json_line({**row, "embedding": base64.b64encode(embedding).decode("ascii")})

    def missing(self, row: dict) -> str:
        is_same = row.get("model") == self.model and ("embedding" in row or "error" in row)
        return "" if is_same else f"embeddings by {self.model}"


class EmbeddingFile(Output):
    """A file of embeddings: `.safetensors` (tensor `image_embeds`; `ids`, a JSON list, in its metadata) or `.npy`.

    A run collects rows in `<name>.partial.jsonl`, from which the next run with the same `model` resumes. Raises
    `ValueError` where the extension is another one, or the file exists.
    """

    def __init__(self, path: str | Path, model: str, overwrite: bool):
        self.path, self.images = Path(os.path.realpath(path)), ()
        if self.path.suffix not in (".safetensors", ".npy"):
            raise ValueError(f"--output: expected a name that ends in .safetensors or .npy, got {path}")
        check_file(self.path)
        self.rows = RowFile(f"{self.path}.partial.jsonl", EmbeddingRows(model), is_temporary=True)
        if self.path.exists() and not overwrite and not self.rows.path.exists():
            raise ValueError(f"--output: {path} is there already; pass --overwrite to write over it")

    def start(self, images: Sequence[str], overwrite: bool) -> set[str]:
        self.images = images
        return self.rows.start(images, overwrite)

    def append(self, results: Iterable[ImageResult]) -> list[tuple[str, str]]:
        return self.rows.append(results)

    def close(self, finished: bool) -> None:
        is_written = False
        try:
            if finished:
                self._write()
                is_written = True
        finally:
            self.rows.close(is_written)

    def _write(self) -> None:
        """Writes the embeddings of this run's images in their order, atomically."""
        found = {row["image"]: row["embedding"] for _, row in self.rows.rows() if "embedding" in row}
        ids = [image for image in self.images if image in found]
        if not ids:
            return
        table = np.stack([np.frombuffer(base64.b64decode(found[image]), np.float32) for image in ids])
        with replacing(self.path) as aside:
            if self.path.suffix == ".npy":
                np.save(aside, table)
                write_text(self.path.with_suffix(".ids.json"), json.dumps(ids) + "\n")
            else:
                aside.write_bytes(save({"image_embeds": table}, {"ids": json.dumps(ids)}))
