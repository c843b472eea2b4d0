"""The probability that a caption is right, from the model's own log-probability of it.

`confidence.json` beside the weights holds a logistic regression. `python -m tinycap.evaluation.confidence` fits it on
captioned images, and defines "right". Standard library only: the ONNX captioner runs without PyTorch.
"""

import math
import os
import reprlib

from .checks_tinycap import read_json


CONFIDENCE_NAME = "confidence.json"
# Inputs of the regression; the names of the coefficients in `confidence.json`.
FEATURES = ("mean_log_prob", "num_tokens")
HOW_TO_CALIBRATE = "python -m tinycap.evaluation.confidence calibrates a model on captioned images and writes it"


def caption_features(log_prob: float, num_tokens: int) -> dict[str, float]:
    """The regression's inputs, from the summed log-probabilities (nats) of a caption's tokens, end token included."""
    if num_tokens < 1 or math.isnan(log_prob):
        raise ValueError(f"expected a log_prob, and num_tokens of at least 1, got {log_prob} and {num_tokens}")
    return {"mean_log_prob": log_prob / num_tokens, "num_tokens": float(num_tokens)}


class ConfidenceCalibration:
    """From a caption's log-probability to the probability that the caption is right.

    Args:
        content: of `confidence.json`: `calibrations`, a list with `num_beams`, `intercept` and `coefficients` (one for
            each of `FEATURES`), one entry for each way of decoding.
        name: the file's name in errors.

    Raises:
        ValueError: a part is missing or isn't a finite number; names it.
    """

    def __init__(self, content: dict, name: str = CONFIDENCE_NAME):
        entries = content.get("calibrations") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{name}: expected an object with a list of calibrations, got {reprlib.repr(content)}")
        self.by_num_beams = {}
        for index, entry in enumerate(entries):
            place = f"{name}: calibrations[{index}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("coefficients"), dict):
                raise ValueError(f"{place}: expected an object with coefficients, got {reprlib.repr(entry)}")
            numbers = {"intercept": entry.get("intercept"), **{key: entry["coefficients"].get(key) for key in FEATURES}}
            # No fitted value reaches 1e100; a longer integer would overflow a float.
            wrong = {k: v for k, v in numbers.items() if type(v) not in (int, float) or not -1e100 < v < 1e100}
            if wrong:
                raise ValueError(f"{place}: expected a finite number for each of {', '.join(wrong)}, got {wrong}")
            num_beams = entry.get("num_beams")
            if type(num_beams) is not int or num_beams < 1 or num_beams in self.by_num_beams:
                raise ValueError(f"{place}: expected another num_beams of at least 1, got {num_beams!r}")
            self.by_num_beams[num_beams] = entry

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "ConfidenceCalibration":
        """Reads `confidence.json`, given itself or its folder; `ValueError` names one that is missing or malformed."""
        path = os.path.join(path, CONFIDENCE_NAME) if os.path.isdir(path) else os.fspath(path)
        if not os.path.lexists(path):
            raise ValueError(f"{path}: no such file; {HOW_TO_CALIBRATE}")
        return cls(read_json(path), path)

    def __call__(self, log_prob: float, num_tokens: int, num_beams: int = 1) -> float:
        """See `caption_features`; the calibration for the nearest number of beams is used."""
        entry = self.by_num_beams[min(self.by_num_beams, key=lambda beams: (abs(beams - num_beams), beams))]
        features = caption_features(log_prob, num_tokens)
        logit = entry["intercept"] + sum(entry["coefficients"][name] * features[name] for name in FEATURES)
        # Without overflow.
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
