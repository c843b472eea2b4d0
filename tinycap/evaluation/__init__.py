"""How good the captions are: metrics, fidelity to the teacher, reports. One subject a file."""
