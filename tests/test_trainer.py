"""The model with transformers' Trainer: the same objective, the same files."""

import pytest
import torch
from tiny import tiny_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


class Pairs(Dataset):
    """Twelve images, each of a colour that its caption names by a token."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        torch.manual_seed(index)
        return {
            "pixel_values": torch.full((3, 24, 24), index / 6 - 1) + 0.1 * torch.randn(3, 24, 24),
            "labels": torch.tensor([3 + index, 20, 2] if index % 2 else [3 + index, 2, -100]),
            "teacher_embeds": torch.nn.functional.one_hot(torch.tensor(index), 14).float(),
        }


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=3e-3,
        seed=0,
        per_device_train_batch_size=6,
        per_device_eval_batch_size=5,
        label_names=["labels"],
        **changes,
    )


@pytest.mark.slow
def test_trainer_learns_both_parts_of_the_objective_and_its_folder_loads(tmp_path):
    model = tiny_model()
    trainer = Trainer(model, arguments(tmp_path, num_train_epochs=40), train_dataset=Pairs(), eval_dataset=Pairs())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before
    pixels = torch.stack([row["pixel_values"] for row in map(Pairs().__getitem__, range(12))])
    sequences = model.generate(pixels, max_new_tokens=3)
    right = sum(sequences[index, 1].item() == 3 + index for index in range(12))
    assert right >= 6, "it names the colours"
    trainer.save_model(str(tmp_path / "saved"))
    assert {"model.safetensors", "modeling_tinycap.py", "pipeline_tinycap.py"} <= {
        path.name for path in (tmp_path / "saved").iterdir()
    }


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    weights = []
    for batch, accumulated in ((6, 1), (3, 2)):
        args = arguments(tmp_path / str(batch), max_steps=1, gradient_accumulation_steps=accumulated)
        args.per_device_train_batch_size = batch
        model = tiny_model()
        # With captions of equal length, the mean of means is the mean of all.
        rows = [{**Pairs()[index], "labels": torch.tensor([3 + index, 20, 2])} for index in range(6)]
        Trainer(model, args, train_dataset=rows).train()
        weights.append(model.vision_model.projection.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def test_predictions_are_logits_of_every_picture(tmp_path):
    output = Trainer(tiny_model(), arguments(tmp_path)).predict(Pairs())
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    assert logits.shape == (12, 3, 37)
    assert output.metrics["test_loss"] == pytest.approx(output.metrics["test_loss"])
