"""TinyCap's package: training, evaluation, deployment; the model's own files are reached through it too.

The model files lie at the root of the repository, beside this folder, because `trust_remote_code` looks for them there.
In a clone the root becomes part of this package's path, so that `tinycap.modeling_tinycap` is the root's file; `.pyi`
stubs say so to editors and type checkers. In a wheel the same files, and the checkpoint, lie in this folder.
"""

from pathlib import Path


__version__ = "0.1.0"
_PACKAGE = Path(__file__).resolve().parent

# The model repository: model files, training scripts and the released checkpoint.
REPOSITORY = _PACKAGE.parent if (_PACKAGE.parent / "modeling_tinycap.py").is_file() else _PACKAGE

if REPOSITORY != _PACKAGE:
    __path__.append(str(REPOSITORY))
