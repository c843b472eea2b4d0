"""Fits a teacher to a student whose own is lost: pretrained image models with a head that gives its embeddings.

    python -m tinycap.training.recover_teacher --model_name_or_path . --dataset_name my_images \\
        --image_model_name_or_path efficientnet_lite0 efficientnet_lite2 --output_dir my_teacher

On the images that it was trained on, a student is near its teacher. A linear head on the features of the models that
the teacher was made of, or of others like them, is fitted to its embeddings there by ridge regression. The head can
distil the student further, or show what captions better embeddings would give: `train_distill.py` and
the evaluation take it with `--teacher_feature projected`. It has no texts.
"""

import argparse
import logging
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm

from tinycap.commands import first_line, run_command, writing
from tinycap.processing_tinycap import load_image, preprocess_images
from tinycap.training.arguments import ArgumentParser, check_sources
from tinycap.training.data import Columns, load_split, resolve_columns, undecoded
from tinycap.training.frozen_towers import FrozenTowers
from tinycap.training.logs import write_json
from tinycap.training.repository import load_repository
from tinycap.training.run_folder import check_output_dir, clear_output_dir
from tinycap.training.teacher import Teacher
from tinycap.training.towers import ImageTowers, PretrainedImageTower


logger = logging.getLogger(__name__)

# Penalties on the squared weights of standardised features, as shares of the number of images, to choose from.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Share of the images on which they are compared.
HELD_OUT = 0.1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    name = "python -m tinycap.training.recover_teacher"
    parser = ArgumentParser(prog=name, description=__doc__.split("\n\n")[0], **options)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the student, a TinyCap repository")
    add("--image_model_name_or_path", required=True, nargs="+", help="image classifiers; several: side by side")
    add("--dataset_name", required=True, help="images that the student was trained on, captioned or not")
    add("--dataset_config_name", help="configuration of the dataset, where it has several")
    add("--split", default="train", help="split of the dataset")
    add("--image_column", help="column of the images; found by its type if not given")
    add("--batch_size", type=int, default=32, help="images run through the models together")
    add("--seed", type=int, default=42, help="of the images that are held out to choose the penalty")
    add("--output_dir", required=True, help="folder for the teacher")
    add("--overwrite_output_dir", action="store_true", help="clear a folder that holds an earlier result")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch_size: expected 1 or more, got {args.batch_size}")
    return args


@torch.inference_mode()
def embed_images(
    student, image_processor, towers: ImageTowers, dataset: Dataset, columns: Columns, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Features (N, F) of headless towers side by side, the student's embeddings (N, D), and the unreadable images."""
    device, num_skipped, features, embeds = next(student.parameters()).device, 0, [], []
    statistics = (*towers.statistics, image_processor.image_mean, image_processor.image_std)
    teacher = Teacher(towers, "projected", *statistics).to(device)

    def readable():
        nonlocal num_skipped
        for index, row in enumerate(tqdm(undecoded(dataset.select_columns([columns.image])), desc="Embedding")):
            try:
                yield load_image(columns.image_of(row), name=f"of row {index}")
            except (ValueError, TypeError) as error:
                logger.warning("An image is left out: %s", first_line(error))
                num_skipped += 1

    images = readable()
    while batch := list(islice(images, batch_size)):
        pixels = preprocess_images(image_processor, batch).to(device)
        embeds.append(student.get_image_features(pixels).pooler_output.float().cpu())
        features.append(torch.cat(towers.outputs(teacher.own_pixels(pixels)), dim=1).float().cpu())
    if (number := sum(map(len, embeds))) < 3:
        raise ValueError(f"--dataset_name: expected at least 3 images that can be read, got {number}")
    return torch.cat(features), torch.cat(embeds), num_skipped


def ridge_regression(
    features: torch.Tensor, targets: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (D, F) and bias (D,) of the linear map from features (N, F) to targets (N, D).

    Args:
        penalty: on the squared weights of the standardised features, as a share of N.
    """
    mean, deviation, center = features.mean(0), features.std(0) + 1e-6, targets.mean(0)
    scaled = (features - mean) / deviation
    gram = scaled.t() @ scaled + penalty * len(scaled) * torch.eye(scaled.shape[1], dtype=scaled.dtype)
    weight = torch.linalg.solve(gram, scaled.t() @ (targets - center)).t() / deviation
    return weight, center - weight @ mean


def fit_head(features: torch.Tensor, targets: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """`ridge_regression` on all images with the penalty under which those held out are nearest to their targets; and
    that penalty and its mean cosine distance."""
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    number = max(1, int(HELD_OUT * len(rows)))
    held_out, rest = rows[:number], rows[number:]
    features, targets = features.double(), targets.double()
    distances = {}
    for penalty in PENALTIES:
        weight, bias = ridge_regression(features[rest], targets[rest], penalty)
        predicted = features[held_out] @ weight.t() + bias
        distances[penalty] = 1 - F.cosine_similarity(predicted, targets[held_out], dim=-1).mean().item()
    best = min(distances, key=distances.get)
    weight, bias = ridge_regression(features, targets, best)
    return weight.float(), bias.float(), {"penalty": best, "held_out_cosine_distance": distances[best]}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Writes the towers with the fitted head, and `eval_results.json`, whose content it returns.

    Raises `ValueError` where the student, the image models or the images can't be loaded.
    """
    args = parse_args(argv)
    check_output_dir(args)
    check_sources(args)
    student, _, image_processor = load_repository(args.model_name_or_path)
    width = student.config.vision_config.projection_dim
    towers = ImageTowers([PretrainedImageTower.from_pretrained(name, width) for name in args.image_model_name_or_path])
    model = FrozenTowers(towers, dropout=0.0).eval()
    dataset = load_split(args.dataset_name, args.split, args.dataset_config_name, all_images=True)
    columns = resolve_columns(dataset, args.image_column, captions=False, root=args.dataset_name)
    accelerator = Accelerator()
    sources = (student.eval().to(accelerator.device), image_processor, towers, dataset, columns, args.batch_size)
    features, embeds, num_skipped = embed_images(*sources)
    weight, bias, results = fit_head(features, embeds, args.seed)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    results = {"num_images": len(features), "num_skipped": num_skipped, **results}
    if accelerator.is_main_process:
        clear_output_dir(Path(args.output_dir))
        with writing(args.output_dir):
            model.save_pretrained(args.output_dir, model.state_dict())
            write_json(Path(args.output_dir) / "eval_results.json", results)
        print(", ".join(f"{name} {value:.4g}" for name, value in results.items()) + f": {args.output_dir}")
    return results


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.training.recover_teacher", main))
