import json

import pytest
import torch
import torch.nn.functional as F
from tiny import draw_picture

from tinycap.evaluation.captioning import caption_dataset, load_captioner
from tinycap.training.data import load_images
from tinycap.training.recover_teacher import fit_head, main, ridge_regression
from tinycap.training.teacher import Teacher


def test_a_lost_head_is_found_again_in_embeddings_that_it_made():
    rng = torch.Generator().manual_seed(0)
    features = 3 + torch.randn(200, 11, generator=rng, dtype=torch.float64) * torch.linspace(0.1, 5, 11)
    weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((7, 11), (7,)))
    found = ridge_regression(features, features @ weight.t() + bias, penalty=0.0)
    torch.testing.assert_close(found[0], weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], bias, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("noise, chosen", [(0.0, 0.01), (20.0, 1.0)])
def test_noisy_embeddings_get_the_larger_penalty(noise, chosen):
    rng = torch.Generator().manual_seed(1)
    features = torch.randn(300, 150, generator=rng)
    targets = features @ torch.randn(150, 9, generator=rng) + noise * torch.randn(300, 9, generator=rng)
    weight, bias, results = fit_head(features, targets, seed=0)
    assert weight.shape == (9, 150) and bias.shape == (9,) and results["penalty"] == chosen


@pytest.mark.slow
def test_the_fitted_teacher_is_near_the_student_where_it_was_fitted(repository, classifier, resnet, photos, tmp_path):
    output_dir = tmp_path / "out"
    argv = ["--model_name_or_path", str(repository), "--dataset_name", photos, "--output_dir", str(output_dir)]
    results = main([*argv, "--image_model_name_or_path", resnet, classifier, "--batch_size", "7"])
    assert (results["num_images"], results["num_skipped"]) == (23, 1)
    assert json.loads((output_dir / "eval_results.json").read_text()) == results
    model, processor = load_captioner(str(repository))
    image_processor = processor.image_processor
    statistics = (image_processor.image_mean, image_processor.image_std)
    teacher = Teacher.from_pretrained(str(output_dir), "projected", *statistics)
    found = caption_dataset(model, processor, *load_images(photos, "train")[:1], teacher=teacher, max_new_tokens=1)
    spread = 1 - F.cosine_similarity(found.image_embeds, found.image_embeds.mean(0, keepdim=True)).mean()
    assert 1 - F.cosine_similarity(found.image_embeds, found.teacher_embeds).mean() < spread / 2
    with pytest.raises(ValueError, match="expected an empty folder"):
        main([*argv, "--image_model_name_or_path", resnet])


def test_one_tower_and_images_without_captions_will_do(repository, resnet, tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        draw_picture(index).save(tmp_path / "images" / f"{index}.png")
    argv = ["--model_name_or_path", str(repository), "--dataset_name", str(tmp_path / "images")]
    argv += ["--output_dir", str(tmp_path / "out"), "--image_model_name_or_path", resnet]
    assert main(argv)["num_images"] == 3
    assert Teacher.from_pretrained(str(tmp_path / "out"), "projected").embed_dim == 14
