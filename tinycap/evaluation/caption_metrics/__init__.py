"""The caption metrics, both a package and a local `evaluate` module: `evaluate.load(<this folder>)`."""
