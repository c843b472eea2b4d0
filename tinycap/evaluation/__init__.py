"""How good the captions are: metrics, comparison with the teacher, reports."""

import importlib.util


for _package in ("accelerate", "datasets", "evaluate", "matplotlib", "pycocoevalcap", "sklearn"):
    if importlib.util.find_spec(_package) is None:
        raise ImportError(f"tinycap.evaluation needs {_package}: pip install 'tinycap[evaluation]'")
