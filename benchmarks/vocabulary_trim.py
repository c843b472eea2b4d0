"""What `tinycap trim-vocab` makes of a model with GPT-2's number of tokens: sizes, speed, and whether captions stay.

    python benchmarks/vocabulary_trim.py --dataset_name my_photos --output_dir outputs/vocabulary_trim

GPT-2's own tokenizer is a download; this one is made of the data set's captions and Python's own sources, 50,257 tokens
by the same algorithm. The model is a given captioner moved to that vocabulary (see `moved_embeddings`), its decoder
then trained on the captions for a while. Writes the model, the trimmed one, JSON and a Markdown table.
"""

import argparse
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.results import run_facts, save_results
from tinycap.configuration_tinycap import TinyCapConfig
from tinycap.deploy.trim_vocab import encode_photos, load_corpus, trim_repository
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration
from tinycap.training.data import clean_captions, load_split, resolve_columns
from tinycap.training.optimization import create_optimizer
from tinycap.training.repository import create_generation_config, create_image_processor, save_repository
from tinycap.training.tokenizer import encode_captions, train_tokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True, help="captioned photos with a training split")
    parser.add_argument("--model_name_or_path", default=".", help="the captioner to begin with")
    parser.add_argument("--split", default="validation", help="split whose photos must be captioned as before")
    parser.add_argument("--vocab_size", type=int, default=50257, help="tokens of the big vocabulary")
    parser.add_argument("--num_photos", type=int, default=2000, help="training photos")
    parser.add_argument("--max_samples", type=int, help="photos of the split, all if not given")
    parser.add_argument("--steps", type=int, default=150, help="training steps of 32 photos with a caption each")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of these steps")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    parser.add_argument("--output_dir", default="outputs/vocabulary_trim", help="where everything goes")
    return parser.parse_args()


def python_sources(megabytes: int = 60) -> Iterator[str]:
    """Texts with more words than captions have: Python's own sources."""
    left = megabytes * 1_000_000
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        left -= len(text)
        if left < 0:
            return
        yield text


def moved_embeddings(
    table: torch.Tensor, small: PreTrainedTokenizerFast, big: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """(len(big), width): what a long training with the big vocabulary would come near to.

    A token that the texts use gets the row of the same token, or the mean of the rows of those that spell it. All
    others are drawn round the rows of tokens that the texts don't use with the small vocabulary either (bytes of other
    alphabets): these were in every step's softmax and never the answer.
    """
    used_small, used_big = ({id for ids in encode_captions(one, texts, 99) for id in ids} for one in (small, big))
    unused = sorted(set(range(len(small))) - used_small - set(small.all_special_ids))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(big), table.shape[1], generator=generator) * table[unused].std(dim=0) + table[unused].mean(0)
    small_vocab = small.get_vocab()
    for token, number in big.get_vocab().items():
        if token in small_vocab and (number in used_big or token in small.all_special_tokens):
            rows[number] = table[small_vocab[token]]
        elif number in used_big:
            pieces = [piece.id for piece in small.backend_tokenizer.model.tokenize(token)]
            rows[number] = table[pieces].mean(dim=0)
    return rows


def build_big_model(args: argparse.Namespace) -> Path:
    """A captioner with the big vocabulary, as a repository in the output folder."""
    folder = Path(args.output_dir) / "big"
    small = TinyCapForConditionalGeneration.from_pretrained(args.model_name_or_path)
    small_tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model_name_or_path)
    rows = load_split(args.dataset_name, "train")
    columns = resolve_columns(rows)
    captions = [clean_captions(value) for value in rows.select_columns([columns.caption])[columns.caption]]
    texts = [text for group in captions for text in group]
    length = small.config.text_config.max_position_embeddings
    tokenizer = train_tokenizer([*texts, *python_sources()], args.vocab_size, length)
    if len(tokenizer) != args.vocab_size:
        raise ValueError(f"expected {args.vocab_size} tokens, the texts gave {len(tokenizer)}")

    content = small.config.to_dict()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    content["text_config"].update(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, **ids)
    content.update(decoder_start_token_id=tokenizer.bos_token_id, **ids)
    model = TinyCapForConditionalGeneration(TinyCapConfig(**content))
    state = small.state_dict()
    table = moved_embeddings(state["decoder.embed_tokens.weight"], small_tokenizer, tokenizer, texts)
    state.update({"decoder.embed_tokens.weight": table, "lm_head.weight": table})
    model.load_state_dict(state)

    image_processor = create_image_processor(small.config.vision_config.image_size)
    _, photos = load_corpus(args.dataset_name, "train", max_samples=args.num_photos)
    encoded, unreadable = encode_photos(model.eval(), image_processor, photos, 32)
    if unreadable:
        raise ValueError(f"expected training photos that can be read, got {unreadable} that can't")
    train_decoder(model, tokenizer, encoded, captions, args)
    model.generation_config = create_generation_config(
        tokenizer, small.generation_config.max_new_tokens, small.generation_config.num_beams
    )
    save_repository(folder, model.eval(), tokenizer, image_processor)
    return folder


def train_decoder(model, tokenizer, encoded: list, captions: list[list[str]], args: argparse.Namespace) -> None:
    """Some steps on the photos' captions, their embeddings as they are."""
    model.vision_model.requires_grad_(False)
    model.train()
    optimizer = create_optimizer(model, args.learning_rate, 0.01)
    draw = random.Random(args.seed)
    for step in range(args.steps):
        batch = draw.randrange(len(encoded))
        photos = captions[32 * batch : 32 * batch + len(encoded[batch].image_embeds)]
        ids = encode_captions(tokenizer, [draw.choice(group) for group in photos], 32)
        labels = torch.full((len(ids), max(map(len, ids))), -100)
        for row, caption in enumerate(ids):
            labels[row, : len(caption)] = torch.tensor(caption)
        loss = model(encoder_outputs=encoded[batch], labels=labels, skip_logits=True).loss
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - step / args.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step + 1 == args.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def table_of(report: dict) -> str:
    """The Markdown table of a report."""
    before, after = report["before"], report["after"]
    rows = [
        "| | before | after | ratio |",
        "|---|---|---|---|",
    ]
    labels = {
        "vocab_size": ("tokens", "{:,}"),
        "parameters": ("parameters", "{:,}"),
        "model.safetensors_bytes": ("`model.safetensors`, bytes", "{:,}"),
        "tokenizer.json_bytes": ("`tokenizer.json`, bytes", "{:,}"),
        "one_photo_ms": ("16 tokens of one photo, ms", "{:.1f}"),
        **{name: (f"16 tokens of a {name[:-3].replace('_', ' ')}, ms", "{:.1f}") for name in before if "batch" in name},
    }
    for name, (label, form) in labels.items():
        ratio = f"{after[name] / before[name]:.2f}"
        rows.append(f"| {label} | {form.format(before[name])} | {form.format(after[name])} | {ratio} |")
    for beams, number in report["captions_checked"].items():
        same = number - report["captions_that_differ"][beams]
        rows.append(
            f"| captions of {beams} beam{'s' * (beams != '1')} that are the same | | {same:,} of {number:,} "
            f"({report['distinct_captions'][beams]:,} distinct) | |"
        )
    rows.append(f"| captions of people tokenised the same | | {report['texts_tokenised_as_before']:,} | |")
    return "\n".join(rows) + "\n"


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    big = build_big_model(args)
    texts, photos = load_corpus(args.dataset_name, args.split, ["train"], args.max_samples)
    report = trim_repository(str(big), Path(args.output_dir) / "trimmed", texts, photos)
    results = {
        **report,
        "arguments": vars(args),
        "seconds": round(time.perf_counter() - started),
        **run_facts(),
    }
    save_results(args.output_dir, "vocabulary_trim", results, table_of(report).splitlines())


if __name__ == "__main__":
    main()
