"""Which saliency map tells what a caption rests on: patches are taken away by each map's order.

    python benchmarks/saliency_faithfulness.py --model_name_or_path . --dataset_name flickr8k --num_photos 96

A share of a photo's patches is painted over in the mean colour, those that a map calls most important or those that it
calls least important, and the fall of the caption's log-probability is read (the deletion test of Samek et al., 2017,
https://arxiv.org/abs/1509.06321). A good map makes the first fall large and the second small or negative. Writes
`saliency_faithfulness.json` and a Markdown table.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinycap.evaluation.captioning import tokens_of  # noqa: E402
from tinycap.evaluation.explanation import saliency, token_probabilities  # noqa: E402
from tinycap.processing_tinycap import load_image  # noqa: E402
from tinycap.training.data import load_split, resolve_columns  # noqa: E402
from tinycap.training.logs import write_json, write_text  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", required=True, help="a TinyCap repository")
    parser.add_argument("--dataset_name", required=True, help="Hub id, folder of parquet, or imagefolder")
    parser.add_argument("--split", default="validation", help="split to take photos from")
    parser.add_argument("--num_photos", type=int, default=96, help="the first so many photos")
    parser.add_argument("--share", type=float, default=0.2, help="share of the patches that is painted over")
    parser.add_argument("--output_dir", default="outputs/saliency_faithfulness", help="where the results go")
    return parser.parse_args(argv)


def gradient_times_pixel(model, pixel_values: torch.Tensor, tokens) -> torch.Tensor:
    """The gradient at the photo itself, times the photo: integrated gradients whose one point lies at its end."""
    return saliency(model, 2 * pixel_values, tokens, steps=1) / 2


@torch.inference_mode()
def attention_rollout(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Attention from `[CLS]` through all layers (Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928)."""
    attentions = model.get_encoder()(pixel_values, output_attentions=True, return_dict=True).attentions
    identity = torch.eye(attentions[0].shape[-1], device=pixel_values.device)
    rolled = identity.expand(len(pixel_values), -1, -1)
    for weights in attentions:
        rolled = (weights.mean(dim=1) + identity) / 2 @ rolled
    side = pixel_values.shape[-1] // model.config.vision_config.patch_size
    return rolled[:, 0, 1:].unflatten(1, (side, side))


def log_probabilities(model, pixel_values: torch.Tensor, tokens) -> torch.Tensor:
    """(N,) of whole captions."""
    found = token_probabilities(model, pixel_values, tokens, num_alternatives=1)
    return torch.tensor([sum(math.log(token.probability) for token in caption) for caption in found])


def fall(model, pixel_values: torch.Tensor, tokens, maps: torch.Tensor, share: float, largest: bool) -> float:
    """Mean fall of the captions' log-probability, in nats, when a share of the patches is painted over."""
    size, sides = pixel_values.shape[-2:], maps.shape[1:]
    order = maps.flatten(1).topk(round(share * sides.numel()), largest=largest).indices
    kept = torch.ones(len(maps), sides.numel()).scatter_(1, order, 0).view(-1, 1, *sides)
    # 0 is the mean colour.
    painted = pixel_values * F.interpolate(kept, size=size)
    return (log_probabilities(model, pixel_values, tokens) - log_probabilities(model, painted, tokens)).mean().item()


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse_args(argv)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(args.model_name_or_path, trust_remote_code=True)
    rows = load_split(args.dataset_name, args.split)
    rows = rows.select(range(min(args.num_photos, len(rows))))
    image_column = resolve_columns(rows, None, None).image
    images = [load_image(row[image_column]) for row in rows]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    tokens = tokens_of(model.generate(pixel_values, num_beams=1), model.generation_config)
    candidates = {
        **{
            f"integrated gradients, {steps} points": lambda steps=steps: saliency(model, pixel_values, tokens, steps)
            for steps in (2, 4, 8)
        },
        "gradient x pixel": lambda: gradient_times_pixel(model, pixel_values, tokens),
        "gradient x pixel, absolute": lambda: gradient_times_pixel(model, pixel_values, tokens).abs(),
        "attention rollout": lambda: attention_rollout(model, pixel_values),
        "random": lambda: torch.rand(len(images), *saliency(model, pixel_values[:1], tokens[:1], 1).shape[1:]),
    }
    found = []
    for name, make in candidates.items():
        started = time.process_time()
        maps = make()
        seconds = time.process_time() - started
        falls = [fall(model, pixel_values, tokens, maps, args.share, largest) for largest in (True, False)]
        row = {
            "map": name,
            "fall_of_most": falls[0],
            "fall_of_least": falls[1],
            "cpu_ms_a_photo": 1e3 * seconds / len(maps),
        }
        found.append(row)
        print(row, flush=True)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(
        output_dir / "saliency_faithfulness.json", {"num_photos": len(images), "share": args.share, "rows": found}
    )
    lines = ["| map | most important painted over | least important | CPU ms a photo |", "|---|---|---|---|"]
    lines += [
        f"| {row['map']} | {row['fall_of_most']:.2f} | {row['fall_of_least']:.2f} | {row['cpu_ms_a_photo']:.0f} |"
        for row in found
    ]
    write_text(output_dir / "saliency_faithfulness.md", "\n".join(lines) + "\n")
    return found


if __name__ == "__main__":
    main()
