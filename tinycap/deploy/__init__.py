"""Deployment: the command line, ONNX without PyTorch, vocabulary trimming."""

import os


# Disables onnxruntime's telemetry, which connects to its vendor and writes a device id to the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
