"""Makes the repository root importable as the package `tinycap` without installing it.

The root is also the model repository that Hub users download, so its files cannot move into a `tinycap/`
folder. A module that has a `__path__` is a package to Python's import system; this one's path is the root.
The wheel does not contain this file: there the same files lie in a real `tinycap/` folder.
"""

import os


__path__ = [os.path.dirname(os.path.abspath(__file__))]
