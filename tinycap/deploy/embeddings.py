"""Image embeddings in a file, with the image that each is of."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tinycap.deploy.outputs import path_aside


class EmbeddingFile:
    """A file of embeddings: `.safetensors` (tensor `image_embeds`; `ids`, a JSON list, in its metadata) or `.npy`.

    Raises:
        ValueError: its ending is neither, or its folder isn't there or can't be written to; names it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix not in (".safetensors", ".npy"):
            raise ValueError(f"--output: expected a name that ends in .safetensors or .npy, got {path}")
        if not os.access(self.path.absolute().parent, os.W_OK):
            raise ValueError(f"--output: expected a folder that can be written to, got {self.path.absolute().parent}")

    @property
    def ids_path(self) -> Path:
        """Where the ids of a `.npy` file are."""
        return self.path.with_suffix(".ids.json")

    def write(self, ids: list[str], embeds: list[np.ndarray]) -> None:
        """Writes N ids and N arrays (D,), aside and renamed."""
        table = np.stack(embeds).astype(np.float32)
        aside = path_aside(self.path)
        if self.path.suffix == ".npy":
            np.save(aside, table)
            aside_ids = aside.with_suffix(".ids.json")
            aside_ids.write_text(json.dumps(ids) + "\n", encoding="utf-8")
            os.replace(aside_ids, self.ids_path)
        else:
            save_file({"image_embeds": table}, aside, metadata={"ids": json.dumps(ids)})
            # safetensors writes files that only their owner can read.
            aside.chmod(0o644)
        os.replace(aside, self.path)
