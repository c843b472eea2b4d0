"""How far the Python tokenisation moves caption scores from the published, Java one.

    python benchmarks/tokenizer_agreement.py --dataset_name my_photos --split validation --output_dir outputs/agreement

Each picture's first human caption is scored against its others, and so is a spoilt copy of it (every third word from
another picture's caption), once on what `PTBTokenizer` of CoreNLP 3.4.1 makes of them and once on what our
`ptb_tokenize` does. Needs Java. Writes `tokenizer_agreement.json` and a Markdown row.
"""

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from benchmarks.results import benchmark_parser, run_facts, save_results
from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.training.data import load_split, resolve_columns


def java_tokenize(captions: list[str]) -> list[str]:
    """All captions through one run of the original."""
    found = PTBTokenizer().tokenize({index: [{"caption": caption}] for index, caption in enumerate(captions)})
    return [found[index][0] for index in range(len(captions))]


def scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU, ROUGE-L and CIDEr, times 100, of captions that are tokenised already."""
    candidates = {index: [caption] for index, caption in enumerate(predictions)}
    truths = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(truths, candidates, verbose=0)
    found = {f"bleu_{n}": 100 * value for n, value in enumerate(bleu, start=1)}
    found["rouge_l"] = 100 * float(Rouge().compute_score(truths, candidates)[0])
    found["cider"] = 100 * float(Cider().compute_score(truths, candidates)[0])
    return found


def spoil(caption: str, other: str) -> str:
    """Every third word replaced by the other caption's."""
    words, others = caption.split(), other.split()
    return " ".join(others[i % len(others)] if i % 3 == 2 else word for i, word in enumerate(words))


def main() -> None:
    parser = benchmark_parser(__doc__, "tokenizer_agreement")
    parser.add_argument("--dataset_name", required=True, help="data set with several captions a picture")
    parser.add_argument("--split", default="validation", help="its split")
    parser.add_argument("--caption_column", help="column of the captions; found by its name if not given")
    args = parser.parse_args()

    dataset = load_split(args.dataset_name, args.split)
    groups = dataset[resolve_columns(dataset, caption_column=args.caption_column).caption]
    # As they come: cleaning would hide what a tokenizer has to cope with.
    groups = [list(group) for group in groups if len(group) > 1]
    everyone = [caption for group in groups for caption in group]
    spoilt = [spoil(group[0], groups[index - 1][0]) for index, group in enumerate(groups)]
    tokenised = {
        "java": java_tokenize(everyone + spoilt),
        "python": [ptb_tokenize(caption) for caption in everyone + spoilt],
    }
    same = sum(a == b for a, b in zip(*tokenised.values()))
    results = {"captions": len(everyone) + len(spoilt), "identical_percent": 100 * same / len(tokenised["java"])}
    for name in ("human", "spoilt"):
        found = {}
        for kind, tokens in tokenised.items():
            ends = [0]
            for group in groups:
                ends.append(ends[-1] + len(group))
            per_picture = [tokens[start:end] for start, end in zip(ends, ends[1:])]
            predictions = [group[0] for group in per_picture] if name == "human" else tokens[len(everyone) :]
            found[kind] = scores(predictions, [group[1:] for group in per_picture])
        moved = {metric: found["python"][metric] - found["java"][metric] for metric in found["java"]}
        results[name] = {**found, "moved": moved}
    results["largest_move"] = max(
        abs(value) for name in ("human", "spoilt") for value in results[name]["moved"].values()
    )

    row = (
        f"| {results['captions']:,} | {results['identical_percent']:.2f} % "
        f"| {results['human']['java']['cider']:.2f} | {results['human']['python']['cider']:.2f} "
        f"| {results['human']['java']['bleu_4']:.2f} | {results['human']['python']['bleu_4']:.2f} "
        f"| {results['largest_move']:.3f} |"
    )
    heads = (
        "captions",
        "tokenised alike",
        "CIDEr, Java",
        "CIDEr, Python",
        "BLEU-4, Java",
        "BLEU-4, Python",
        "largest move",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", row]
    save_results(args.output_dir, "tokenizer_agreement", {**run_facts(), **results}, lines)


if __name__ == "__main__":
    main()
