"""TinyCap where it is used: command line, ONNX without PyTorch, smaller vocabularies. One subject a file."""

import os


# Without this, set before its import, onnxruntime reports to its vendor and writes a device id into the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
