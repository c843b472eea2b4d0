"""TinyCap where it is used: command line, ONNX without PyTorch, smaller vocabularies. One subject a file."""
