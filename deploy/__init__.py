"""TinyCap where it is used: export to ONNX, and a captioner without PyTorch. One subject a file."""
