"""How far the Python tokenisation moves caption scores from those with the published, Java one.

    python benchmarks/tokenizer_agreement.py --dataset_name my_images --split validation --output_dir outputs/agreement

Each image's first human caption is scored against its others, and so is a corrupted copy of it (every third word from
another image's caption), once tokenised by `PTBTokenizer` of CoreNLP 3.4.1 and once by `ptb_tokenize`. Needs Java.
Writes JSON and a Markdown row.
"""

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.training.data import load_split, resolve_columns


def java_tokenize(captions: list[str]) -> list[str]:
    tokenized = PTBTokenizer().tokenize({index: [{"caption": caption}] for index, caption in enumerate(captions)})
    return [tokenized[index][0] for index in range(len(captions))]


def scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU, ROUGE-L and CIDEr, times 100, of tokenised captions."""
    candidates = {index: [caption] for index, caption in enumerate(predictions)}
    truths = dict(enumerate(references))
    bleu, _ = Bleu(4).compute_score(truths, candidates, verbose=0)
    values = {f"bleu_{n}": 100 * value for n, value in enumerate(bleu, start=1)}
    values["rouge_l"] = 100 * float(Rouge().compute_score(truths, candidates)[0])
    values["cider"] = 100 * float(Cider().compute_score(truths, candidates)[0])
    return values


def corrupt(caption: str, other: str) -> str:
    """Every third word replaced by the other caption's."""
    words, others = caption.split(), other.split()
    return " ".join(others[i % len(others)] if i % 3 == 2 else word for i, word in enumerate(words))


def main() -> None:
    parser = benchmark_parser(__doc__, "tokenizer_agreement")
    parser.add_argument("--dataset_name", required=True, help="images with several captions each")
    parser.add_argument("--split", default="validation", help="its split")
    parser.add_argument("--caption_column", help="column of the captions; found by its name if not given")
    args = parser.parse_args()

    dataset = load_split(args.dataset_name, args.split)
    groups = dataset[resolve_columns(dataset, caption_column=args.caption_column).caption]
    # Uncleaned: cleaning would hide what a tokenizer has to handle.
    groups = [list(group) for group in groups if len(group) > 1]
    corrupted = [corrupt(group[0], groups[index - 1][0]) for index, group in enumerate(groups)]
    captions = [caption for group in groups for caption in group] + corrupted
    tokenized = {"java": java_tokenize(captions), "python": list(map(ptb_tokenize, captions))}
    same = 100 * sum(map(str.__eq__, *tokenized.values())) / len(captions)
    results = {"captions": len(captions), "identical_percent": same, "human": {}, "spoilt": {}}
    for kind, texts in tokenized.items():
        tokens = iter(texts)
        split = [[next(tokens) for _ in group] for group in groups]
        references = [group[1:] for group in split]
        results["human"][kind] = scores([group[0] for group in split], references)
        results["spoilt"][kind] = scores(list(tokens), references)
    for found in (results["human"], results["spoilt"]):
        found["moved"] = {name: found["python"][name] - found["java"][name] for name in found["java"]}
    moved = [value for name in ("human", "spoilt") for value in results[name]["moved"].values()]
    results["largest_move"] = max(map(abs, moved))

    header, row = ["captions", "tokenised alike"], [f"{len(captions):,}", f"{same:.2f} %"]
    for name, title in (("cider", "CIDEr"), ("bleu_4", "BLEU-4")):
        header += [f"{title}, Java", f"{title}, Python"]
        row += [f"{results['human'][kind][name]:.2f}" for kind in tokenized]
    header, row = [*header, "largest move"], [*row, f"{results['largest_move']:.3f}"]
    save_results(args.output_dir, "tokenizer_agreement", results, markdown_table(header, [row]))


if __name__ == "__main__":
    main()
