"""Search and zero-shot classification, scored by human captions."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_repository_model
from transformers.modeling_outputs import BaseModelOutput

from tinycap.evaluation import retrieval
from tinycap.evaluation.failures import CATEGORIES
from tinycap.evaluation.metrics import retrieval_recall
from tinycap.modeling_tinycap import TinyCapForConditionalGeneration


def test_recall_counts_the_right_one_among_the_nearest():
    images = torch.eye(4)
    texts = torch.eye(4).repeat_interleave(2, dim=0)
    assert set(retrieval_recall(images, texts).values()) == {100.0}
    swapped = texts[[2, 3, 0, 1, 4, 5, 6, 7]]
    found = retrieval_recall(images, swapped, ks=(1,))
    assert found == {"image_to_text_recall_at_1": 50.0, "text_to_image_recall_at_1": 50.0}


@pytest.fixture(scope="module")
def results(text_repository, photos, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("retrieval")
    flags = ["--model_name_or_path", str(text_repository), "--dataset_name", photos, "--output_dir", str(out)]
    results = retrieval.main([*flags, "--rerank", "4", "--batch_size", "5"])
    assert json.loads((out / "retrieval.json").read_text()) == results
    return results


def test_every_caption_searches_among_all_images(results):
    assert (results["num_images"], results["captions_per_image"]) == (6, 2)
    recall = results["recall"]["student"]
    assert 0 <= recall["text_to_image_recall_at_1"] <= recall["text_to_image_recall_at_5"] < 100
    assert recall["text_to_image_recall_at_10"] == 100, "of six images"
    assert "teacher" not in results["recall"]


def test_the_likelihoods_weight_is_chosen_on_training_images(results):
    reranking = results["reranking"]
    # Of 24, one of which is broken.
    assert reranking["num_training_images"] == 23 and reranking["weight"] in retrieval.WEIGHTS
    assert reranking["reranked"]["recall_at_10"] == reranking["cosine"]["recall_at_10"], "the same four images"


def test_the_likelihood_of_a_caption_is_that_of_the_captioners_loss(tokenizer):
    model = tiny_repository_model(tokenizer)
    embeds = torch.nn.functional.normalize(torch.randn(5, 14), dim=1)
    ids = [5, 9, 7, tokenizer.eos_token_id]
    found = retrieval.caption_log_likelihoods(model, embeds, ids)
    for row in range(5):
        encoded = BaseModelOutput(last_hidden_state=embeds[row : row + 1, None])
        loss = model(encoder_outputs=encoded, labels=torch.tensor([ids])).caption_loss
        assert found[row].item() == pytest.approx(-4 * loss.item(), rel=1e-4)


def test_a_likely_caption_brings_its_image_to_the_front(text_repository, tokenizer, monkeypatch):
    model = TinyCapForConditionalGeneration.from_pretrained(text_repository).eval()
    embeds = torch.nn.functional.normalize(torch.randn(4, 14, generator=torch.Generator().manual_seed(0)), dim=1)

    texts = ["a brown dog", "two men", "a red coat", "a woman reads"]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    def told(model, images, ids):
        return -(images - embeds[encoded.index(ids[:-1])]).norm(dim=1)

    monkeypatch.setattr(retrieval, "caption_log_likelihoods", told)
    found = retrieval.Candidates(model, tokenizer, embeds, texts, 4, batch_size=3)
    assert set(found.ranks(0.0).tolist()) != {1.0}
    assert found.ranks(100.0).tolist() == [1.0] * 4
    assert found.recall(100.0) == {"recall_at_1": 100, "recall_at_5": 100, "recall_at_10": 100}
    few = retrieval.Candidates(model, tokenizer, embeds, texts, 1, batch_size=3)
    assert torch.isinf(few.ranks(100.0)).sum() == (found.ranks(0.0) > 1).sum(), "those beyond the candidates stay lost"


def test_categories_are_found_by_their_names_or_by_captions():
    names = list(CATEGORIES)
    dogs, snow = names.index("dogs"), names.index("snow")
    references = [["a dog", "a dog runs"], ["a dog in snow", "the dog in the snow"], ["snow", "white snow"], ["x", "y"]]
    captions = ["a dog", "a tree", "a dog", "a dog"]
    scores = np.zeros((4, len(names)))
    scores[:, dogs], scores[:, snow] = [0.9, 0.8, 0.1, 0.2], [0.0, 0.9, 0.5, 0.7]
    found = retrieval.score_categories(scores, captions, references)
    rows = {row["category"]: row for row in found["categories"]}
    assert set(rows) == {"dogs", "snow"}
    assert rows["dogs"]["images"] == 2 and rows["dogs"]["share"] == 50 and rows["dogs"]["average_precision"] == 100
    assert rows["dogs"]["named_in"] == 3
    assert rows["dogs"]["caption_precision"] == pytest.approx(100 / 3)
    assert rows["dogs"]["precision"] == pytest.approx(200 / 3), "of the three nearest images"
    assert rows["snow"]["caption_precision"] is None
    assert rows["snow"]["average_precision"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    # Dogs, snow, snow; the fourth image has no category.
    assert found["num_images"] == 3 and found["top_1"] == 100
    assert found["chance"] == pytest.approx(100 * 4 / 3 / len(names))


def test_what_can_not_be_scored_is_named(repository, photos, tmp_path, capsys):
    flags = ["--model_name_or_path", str(repository), "--dataset_name", photos, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="expected a text encoder, got none"):
        retrieval.main(flags)
    for more, words in ((["--teacher_images"], "needs --teacher_name_or_path"), (["--rerank", "-1"], "expected 0 or")):
        with pytest.raises(SystemExit):
            retrieval.main([*flags, *more])
        assert words in capsys.readouterr().err
