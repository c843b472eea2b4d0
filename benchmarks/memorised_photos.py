"""How much nearer to its teacher a student is on the photos it was trained on than on others.

    python benchmarks/memorised_photos.py --model_name_or_path . --teacher_name_or_path outputs/flickr8k-teacher \\
        --teacher_feature projected --dataset_name flickr8k --output_dir outputs/memorised_photos

The mean cosine distance between both embeddings, for photos of the training and of the validation split: as they are
evaluated, in crops that no training has drawn, in tighter ones, and two in one. Where even new crops of training photos
are nearer than validation photos, the student knows the photos and not only the crops: more crops won't help it, other
pictures will. Writes JSON and a Markdown table.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import DataLoader
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from benchmarks.results import run_facts, save_results
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.data import (
    Augmentation,
    CaptionCollator,
    CaptionDataset,
    SkippedRows,
    decode_dataset,
    load_splits,
    resolve_columns,
)
from tinycap.training.teacher import FEATURES, Teacher
from tinycap.training.tokenizer import load_tokenizer


PICTURES = {
    "whole photos": Augmentation(),
    "crops of at least half": Augmentation(0.5, True, 0.2),
    "crops of at least 15 %": Augmentation(0.15, True, 0.2),
    "two photos in one (mixup)": Augmentation(0.5, True, 0.2, mixup=1.0),
}
# No training in the documents has drawn crops by it.
SEED = 1_000_003


@torch.inference_mode()
def mean_distance(
    model, teacher: Teacher, dataset: CaptionDataset, collator: CaptionCollator, batch_size: int
) -> float:
    """Mean of 1 - cos between the student's and the teacher's embeddings of the data set's pictures."""
    distances = []
    for batch in DataLoader(dataset, batch_size, collate_fn=collator):
        pixel_values = batch["pixel_values"]
        embeds = model.get_image_features(pixel_values).pooler_output
        distances.append(1 - torch.cosine_similarity(embeds, teacher(pixel_values), dim=-1))
    return torch.cat(distances).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_name_or_path", default=".", help="a TinyCap repository")
    parser.add_argument("--teacher_name_or_path", required=True, help="the teacher that it learnt from")
    parser.add_argument("--teacher_feature", choices=FEATURES, default="pooled", help="as it was trained with")
    parser.add_argument("--dataset_name", required=True, help="what it was trained on, with a split to validate on")
    parser.add_argument("--num_photos", type=int, default=500, help="of each split")
    parser.add_argument("--batch_size", type=int, default=50, help="pictures embedded together")
    parser.add_argument("--output_dir", default="outputs/memorised_photos", help="where the results go")
    args = parser.parse_args()
    model = TinyCapForConditionalGeneration.from_pretrained(args.model_name_or_path).eval()
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    statistics = processor.image_mean, processor.image_std
    teacher = Teacher.from_pretrained(args.teacher_name_or_path, args.teacher_feature, *statistics)
    collator = CaptionCollator(load_tokenizer(args.model_name_or_path), 32, *statistics)
    image_size = model.config.vision_config.image_size
    limits = {"max_train_samples": args.num_photos, "max_eval_samples": args.num_photos}
    found = {name: {} for name in PICTURES}
    for split, rows in zip(("training", "validation"), load_splits(args.dataset_name, **limits)):
        decoded = decode_dataset(rows, resolve_columns(rows), image_size, SkippedRows(), split)
        for name, augmentation in PICTURES.items():
            dataset = CaptionDataset(decoded, image_size, augmentation, 1, SEED)
            found[name][split] = mean_distance(model, teacher, dataset, collator, args.batch_size)
    lines = ["| pictures | training photos | validation photos |", "|---|---|---|"]
    lines += [f"| {name} | {row['training']:.3f} | {row['validation']:.3f} |" for name, row in found.items()]
    results = {**run_facts(), "num_photos": args.num_photos, "cosine_distance": found}
    save_results(args.output_dir, "memorised_photos", results, lines)


if __name__ == "__main__":
    main()
