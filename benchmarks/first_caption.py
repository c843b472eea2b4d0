"""One cold process, from its start to its first caption: CPU seconds and peak memory, as JSON on the last line.

    python benchmarks/first_caption.py onnx exported photo.jpg
    python benchmarks/first_caption.py pytorch . photo.jpg
    python benchmarks/first_caption.py peer folder "GIT-base"

`caption_latency.py` runs it. Nothing is imported before the captioner of its kind asks for it.
"""

import json
import os
import sys
from pathlib import Path


def caption_by_onnx(folder: str, photo: str, quantized: bool) -> None:
    from tinycap.deploy.onnx_captioner import OnnxCaptioner

    captioner = OnnxCaptioner.from_pretrained(folder, quantized=quantized, num_threads=1)
    assert captioner(photo)[0][0].text
    assert "torch" not in sys.modules


def caption_by_pipeline(folder: str, photo: str) -> None:
    import torch

    from tinycap.deploy.captioners import CaptionOptions, TorchCaptioner

    torch.set_num_threads(1)
    assert TorchCaptioner(CaptionOptions(folder)).pipeline(photo)[0]["generated_text"]


def caption_by_peer(folder: str, name: str) -> None:
    """Pixel values are given and no tokenizer is loaded: what is measured flatters the peers."""
    import torch
    from peers import PEERS, caption

    torch.set_num_threads(1)
    peer = PEERS[name]
    caption(peer.model_class.from_pretrained(folder).eval(), peer.inputs(1), 16)


def main() -> None:
    kind, folder, argument = sys.argv[1:]
    if kind == "peer":
        caption_by_peer(folder, argument)
    elif kind == "pytorch":
        caption_by_pipeline(folder, argument)
    else:
        caption_by_onnx(folder, argument, quantized=kind == "onnx_int8")
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    times = os.times()
    print(json.dumps({"cpu_seconds": times.user + times.system, "peak_memory_mb": peak / 1024}))


if __name__ == "__main__":
    main()
