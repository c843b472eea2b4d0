"""How far the Python tokenisation moves caption scores from those with the published, Java one.

    python benchmarks/tokenizer_agreement.py --dataset_name my_images --split validation --output_dir outputs/agreement

Each image's first human caption is scored against its others, once tokenised by `PTBTokenizer` of CoreNLP 3.4.1 and
once by `ptb_tokenize`. Needs Java. Writes JSON and a Markdown row.
"""

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from benchmarks.results import benchmark_parser, markdown_table, save_results
from tinycap.evaluation.caption_metrics.caption_metrics import score_captions
from tinycap.evaluation.caption_metrics.ptb_tokenizer import ptb_tokenize
from tinycap.training.data import load_split, resolve_columns


def java_tokenize(captions: list[str]) -> list[str]:
    tokenized = PTBTokenizer().tokenize({index: [{"caption": caption}] for index, caption in enumerate(captions)})
    return [tokenized[index][0] for index in range(len(captions))]


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
    captions = [caption for group in groups for caption in group]
    java = dict(zip(captions, java_tokenize(captions)))
    same = 100 * sum(java[caption] == ptb_tokenize(caption) for caption in captions) / len(captions)
    predictions, references = [group[0] for group in groups], [group[1:] for group in groups]
    scores = {
        name: score_captions(predictions, references, tokenize)
        for name, tokenize in (("java", java.__getitem__), ("python", ptb_tokenize))
    }
    largest_move = max(abs(scores["python"][name] - value) for name, value in scores["java"].items())
    results = {"captions": len(captions), "identical_percent": same, "scores": scores, "largest_move": largest_move}

    header, row = ["captions", "tokenised alike"], [f"{len(captions):,}", f"{same:.2f} %"]
    for name, title in (("cider", "CIDEr"), ("bleu_4", "BLEU-4")):
        header += [f"{title}, Java", f"{title}, Python"]
        row += [f"{found[name]:.2f}" for found in scores.values()]
    table = markdown_table([*header, "largest move"], [[*row, f"{largest_move:.3f}"]])
    save_results(args.output_dir, "tokenizer_agreement", results, table)


if __name__ == "__main__":
    main()
