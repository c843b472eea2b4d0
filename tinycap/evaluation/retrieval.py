"""Scores a captioner with a text encoder as a search engine, and as a classifier without training.

    python -m tinycap.evaluation.retrieval --model_name_or_path . --dataset_name my_photos --rerank 100

Writes `retrieval.json`: R@1, R@5 and R@10 (%) of the images by their human captions, and of the captions by their
images; with `--teacher_name_or_path` also those of the teacher's texts, with `--teacher_images` of its images too; with
`--rerank 100` those of the first 100 images sorted again, with the caption's likelihood; how well the names of
categories find their images, by the English word lists of `tinycap.evaluation --failures`.
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import average_precision_score
from transformers.modeling_outputs import BaseModelOutput

from tinycap.commands import run_command, writing
from tinycap.evaluation import captioning
from tinycap.evaluation.failures import CATEGORIES, categories_of, parse_caption
from tinycap.evaluation.metrics import retrieval_recall
from tinycap.training.data import load_splits, resolve_columns, uncaptioned
from tinycap.training.logs import write_json
from tinycap.training.teacher import Teacher
from tinycap.training.text_encoder import TextTeacher
from tinycap.training.tokenizer import encode_captions


KS = (1, 5, 10)
# Of the log-likelihood (nats) beside the cosine, to choose from by the mean reciprocal rank of training images.
WEIGHTS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
# Training images to choose it on; each is searched for by one caption.
NUM_TRAINING = 500


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = captioning.create_parser("tinycap.evaluation.retrieval", __doc__.split("\n\n")[0], "outputs/retrieval")
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction, "default": False}
    add(
        "--teacher_name_or_path", help="also score this teacher's texts: a CLIP model, or an output of train_teacher.py"
    )
    add("--text_model_name_or_path", help="the sentence encoder that the latter was trained against")
    add("--teacher_images", **switch, help="also score the teacher's own images")
    add("--rerank", type=int, default=0, help="sort so many images again by the caption's likelihood; 0: don't")
    args = parser.parse_args(argv)
    if args.rerank < 0:
        parser.error(f"--rerank: expected 0 or more, got {args.rerank}")
    if args.rerank and args.split == "train":
        parser.error("--rerank: expected another --split than train, whose images choose the likelihood's weight")
    if args.teacher_images and args.teacher_name_or_path is None:
        parser.error("--teacher_images: needs --teacher_name_or_path")
    return args


@torch.inference_mode()
def embed_texts(model, tokenizer, texts: list[str], batch_size: int) -> torch.Tensor:
    """(N, D), unit norm, on the CPU."""
    limit, embeds = model.config.text_encoder_config.max_position_embeddings, []
    for start in range(0, len(texts), batch_size):
        chosen = texts[start : start + batch_size]
        inputs = tokenizer(chosen, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = inputs.to(model.device)
        embeds.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).text_embeds.float().cpu())
    return torch.cat(embeds)


@torch.inference_mode()
def caption_log_likelihoods(model, image_embeds: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    """log p(caption | image) in nats, (K,), of one caption's tokens, the end token included, and K images (K, D)."""
    labels = torch.tensor([token_ids], device=model.device).expand(len(image_embeds), -1)
    encoded = BaseModelOutput(last_hidden_state=image_embeds[:, None].to(model.device))
    inputs = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(encoder_outputs=encoded, decoder_input_ids=inputs, use_cache=False).logits.float()
    return logits.log_softmax(dim=-1).gather(2, labels.unsqueeze(-1)).sum(dim=(1, 2)).cpu()


class Candidates:
    """The first images that each image's first caption finds among all images, to be sorted again.

    Args:
        image_embeds: (N, D), the student's.
        captions: N, one for each image.
        number: of candidates, K.

    Attributes:
        cosines, log_likelihoods: (N, K).
        is_own: (N, K), whether it is the caption's own image.
    """

    def __init__(self, model, tokenizer, image_embeds: torch.Tensor, captions: list[str], number: int, batch_size: int):
        with torch.inference_mode():
            projected = model.project_for_texts(image_embeds.to(model.device)).cpu()
        texts = embed_texts(model, tokenizer, captions, batch_size)
        self.cosines, found = (texts @ projected.T).topk(min(number, len(captions)))
        self.is_own = found == torch.arange(len(captions))[:, None]
        encoded = encode_captions(tokenizer, captions, model.config.text_config.max_position_embeddings)
        rows = [caption_log_likelihoods(model, image_embeds[row], ids) for row, ids in zip(found, encoded)]
        self.log_likelihoods = torch.stack(rows)

    def ranks(self, weight: float) -> torch.Tensor:
        """(N,): the rank of the own image, from 1, by cosine + weight x log-likelihood; infinite if it isn't there."""
        order = (self.cosines + weight * self.log_likelihoods).argsort(dim=1, descending=True, stable=True)
        is_own = self.is_own.gather(1, order)
        return torch.where(is_own.any(dim=1), is_own.int().argmax(dim=1) + 1.0, torch.inf)

    def recall(self, weight: float) -> dict[str, float]:
        """Text to image, in %."""
        return {f"recall_at_{k}": 100 * (self.ranks(weight) <= k).double().mean().item() for k in KS}


def training_images(args: argparse.Namespace) -> tuple:
    """The first images of split "train" but those held out for validation, and their `Columns`."""
    columns = {name: getattr(args, name) for name in ("image_column", "caption_column", "allow_remote_images")}
    seed = captioning.hold_out_seed(args)
    dataset, _ = load_splits(args.dataset_name, args.dataset_config_name, seed=seed, **columns)
    dataset = dataset.select(range(min(NUM_TRAINING, len(dataset))))
    return dataset, resolve_columns(dataset, root=args.dataset_name, **columns)


def score_reranking(args: argparse.Namespace, model, processor, captioned, references, training: tuple) -> dict:
    """Recall of one caption an image before and after sorting the first `--rerank` images again.

    The likelihood's weight is chosen on `training_images`, whose embeddings get the config's `memory_noise`: the
    evaluated ones choose nothing.
    """
    dataset, columns = training
    options = {"columns": columns, "batch_size": args.batch_size, "skip": uncaptioned(dataset, columns)}
    # One token: only the embeddings are needed.
    known = captioning.caption_dataset(model, processor, dataset, num_beams=1, max_new_tokens=1, **options)
    captions = [group[0] for group in captioning.references_of(dataset, columns, known.rows)]
    sizes = (args.rerank, args.batch_size)
    # The student knows training images better than others: noise as in the decoder's training makes up for it.
    torch.manual_seed(args.seed or 0)
    noisy = model.add_noise(known.image_embeds[:, None])[:, 0]
    known = Candidates(model, processor.tokenizer, noisy, captions, *sizes)
    weight = max(WEIGHTS, key=lambda weight: (1 / known.ranks(weight)).mean().item())
    first = [group[0] for group in references]
    found = Candidates(model, processor.tokenizer, captioned.image_embeds, first, *sizes)
    results = {"num_candidates": args.rerank, "num_training_images": len(captions), "weight": weight}
    return results | {"cosine": found.recall(0.0), "reranked": found.recall(weight)}


def score_categories(scores: np.ndarray, captions: list[str], references: list[list[str]]) -> dict:
    """How well the names of categories find their images, in %, beside the captions' own words.

    Args:
        scores: (N, C), cosines of images and `CATEGORIES`.
        captions: N, the model's.
        references: the human captions of each image, more than half of which name its categories.

    Returns:
        `top_1`, how often the nearest category is one of the image's, of the images that have any, and `chance` of it;
        `categories`, a row for each that an image has: `images`, `share` (what chance finds), `average_precision`; of
        the images whose caption names the category (`named_in`) the share that are of it (`caption_precision`), and the
        same share of as many images of the highest score (`precision`).
    """
    model = [parse_caption(caption) for caption in captions]
    of_image = [categories_of([parse_caption(caption) for caption in group]) for group in references]
    members = np.array([[name in names for name in CATEGORIES] for names in of_image])
    any_of = members.any(axis=1)
    rows = []
    for index, name in enumerate(CATEGORIES):
        is_member, order = members[:, index], np.argsort(-scores[:, index], kind="stable")
        named = np.array([facts.is_about(name) for facts in model])
        if is_member.any():
            row = {"category": name, "images": int(is_member.sum()), "share": 100 * is_member.mean()}
            row["average_precision"] = 100 * average_precision_score(is_member, scores[:, index])
            row |= {"named_in": int(named.sum()), "caption_precision": None, "precision": None}
            if named.any():
                row["caption_precision"] = 100 * is_member[named].mean()
                row["precision"] = 100 * is_member[order[: named.sum()]].mean()
            rows.append({key: float(value) if isinstance(value, np.floating) else value for key, value in row.items()})
    right = members[np.arange(len(scores)), scores.argmax(axis=1)][any_of]
    results = {"top_1": 100 * float(right.mean()), "chance": 100 * float(members[any_of].mean())} if len(right) else {}
    return {**results, "num_images": int(any_of.sum()), "categories": rows}


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """The content of `retrieval.json`; raises `ValueError` where model, teacher or data don't fit."""
    model, processor, dataset, columns = captioning.load_model_and_data(args)
    if model.config.text_encoder_config is None:
        raise ValueError(f"--model_name_or_path {args.model_name_or_path}: expected a text encoder, got none")
    if args.rerank and model.config.memory != "embedding":
        raise ValueError(f"--rerank: expected a decoder on memory embedding, got memory {model.config.memory}")
    model.to(accelerator.device)
    texts_of_teacher = teacher = None
    if args.teacher_name_or_path is not None:
        source = (args.teacher_name_or_path, args.text_model_name_or_path)
        texts_of_teacher = TextTeacher(*source).to(accelerator.device)
        expected, width = model.config.text_encoder_config.projection_dim, texts_of_teacher(["a"]).shape[1]
        if width != expected:
            raise ValueError(f"--teacher_name_or_path: expected texts of the model's width {expected}, got {width}")
    if args.teacher_images:
        statistics = processor.image_processor.image_mean, processor.image_processor.image_std
        teacher = Teacher.from_pretrained(args.teacher_name_or_path, "projected", *statistics).to(accelerator.device)
        teacher.check_width(expected)
    training = training_images(args) if args.rerank else None
    options = {"columns": columns, "batch_size": args.batch_size, "skip": uncaptioned(dataset, columns)}
    options |= {"accelerator": accelerator, "teacher": teacher, "progress": True}
    captioned = captioning.caption_dataset(model, processor, dataset, **options)
    references = captioning.references_of(dataset, columns, captioned.rows)
    # As many for each image.
    number = min(map(len, references))
    texts = [caption for group in references for caption in group[:number]]
    with torch.inference_mode():
        images = model.project_for_texts(captioned.image_embeds.to(model.device)).cpu()
    recalls = {"student": retrieval_recall(images, embed_texts(model, processor.tokenizer, texts, args.batch_size), KS)}
    if texts_of_teacher is not None:
        size = args.batch_size
        embeds = [texts_of_teacher(texts[start : start + size]).cpu() for start in range(0, len(texts), size)]
        recalls["teachers_texts"] = retrieval_recall(images, torch.cat(embeds), KS)
        if teacher is not None:
            recalls["teacher"] = retrieval_recall(captioned.teacher_embeds, torch.cat(embeds), KS)
    results = {"num_images": len(captioned.rows), "num_skipped": len(captioned.skipped), "captions_per_image": number}
    results["recall"] = recalls
    if args.rerank:
        results["reranking"] = score_reranking(args, model, processor, captioned, references, training)
    names = embed_texts(model, processor.tokenizer, list(CATEGORIES), args.batch_size)
    results["zero_shot"] = score_categories((images @ names.T).numpy(), captioned.captions, references)
    # Without the path of a local folder, which means nothing on another machine.
    return {"dataset": Path(args.dataset_name).name, "split": args.split, **results}


def summary(results: dict) -> str:
    """The recalls as a table, for the terminal."""
    columns = [f"{way}_recall_at_{k}" for way in ("text_to_image", "image_to_text") for k in KS]
    lines = ["text to image, image to text: R@1, R@5, R@10 (%)"]
    for name, row in results["recall"].items():
        lines.append("  ".join(f"{row[column]:5.1f}" for column in columns) + f"  {name}")
    for name in ("cosine", "reranked"):
        if row := results.get("reranking", {}).get(name):
            lines.append("  ".join(f"{value:5.1f}" for value in row.values()) + f"  one caption an image, {name}")
    zero_shot = results["zero_shot"]
    if "top_1" in zero_shot:
        lines.append(f"nearest category right: {zero_shot['top_1']:.1f} % (chance {zero_shot['chance']:.1f} %)")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Runs the evaluation; returns what it writes to `retrieval.json`."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    accelerator = Accelerator()
    output_dir = Path(args.output_dir)
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    results = evaluate(args, accelerator)
    if accelerator.is_main_process:
        write_json(output_dir / "retrieval.json", results)
        print(summary(results))
    return results


if __name__ == "__main__":
    sys.exit(run_command("python -m tinycap.evaluation.retrieval", main))
