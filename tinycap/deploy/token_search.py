"""Beam search over any function from tokens to logits, in numpy; greedy search with one beam.

Results equal those of `GenerationMixin` (transformers 5.24), including the order of ties; the tests compare them.
"""

from collections.abc import Callable, Sequence

import numpy as np


# Log-probability of excluded candidates: transformers' value, which stays finite in sums.
NEVER = np.float32(-1.0e9)

# step(tokens, rows) -> logits. `rows` (N,) first reorders the rows of the cache, unless it is `None`; `tokens` (N, L)
# are those since the last call; `logits` (N, vocab_size) are float32.
Step = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., vocab_size) -> the same, log-probabilities."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def beam_search(
    step: Step,
    prompt: np.ndarray,
    eos_token_ids: list[int],
    max_new_tokens: int,
    num_beams: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    suppress_tokens: Sequence[int] = (),
) -> tuple[list[list[list[int]]], np.ndarray]:
    """Keeps the `num_beams` best beginnings of each caption; returns the R best finished ones, best first.

    Args:
        step: is called with B * num_beams rows, the beams of an image adjacent.
        prompt: (B, L), the start token and the beginning of the captions.
        num_return_sequences: R, at most `num_beams`.
        length_penalty: finished captions are compared by log-probability / length ** length_penalty.
        early_stopping: `True` ends with the first `num_beams` finished captions, `False` when the running ones are no
            longer better at their present length, `"never"` when they can't become better. With one beam always `True`.
        suppress_tokens: ids that are never generated.

    Returns:
        (B, R) lists of token ids, without the prompt, with the end token if there is one; (B, R) float32, the sums of
        their log-probabilities.
    """
    early_stopping, suppress_tokens = True if num_beams == 1 else early_stopping, list(suppress_tokens)
    batch, beams_to_keep = len(prompt), max(2, 1 + len(eos_token_ids)) * num_beams
    is_top = np.arange(beams_to_keep) < num_beams
    rows, end_tokens = np.arange(batch)[:, None], np.array(eos_token_ids, np.int64)
    running = np.zeros((batch, num_beams, max_new_tokens), np.int64)
    # In the first step all beams are equal, so that only the first one is used.
    running_scores = np.full((batch, num_beams), NEVER)
    running_scores[:, 0] = 0.0
    # The best finished sequences of each image: tokens, lengths, scores, log-probabilities, whether there is one.
    shape = (batch, num_beams)
    finished = [np.zeros_like(running), np.zeros(shape, np.int64), np.full(shape, NEVER), np.full(shape, NEVER)]
    finished.append(np.zeros(shape, bool))
    can_improve = np.ones((batch, 1), bool)
    tokens, order = np.repeat(prompt, num_beams, axis=0), None

    for length in range(1, max_new_tokens + 1):
        log_probs = log_softmax(step(tokens, order)).reshape(batch, num_beams, -1)
        vocab_size = log_probs.shape[-1]
        log_probs[..., suppress_tokens] = -np.inf
        candidates = (log_probs + running_scores[:, :, None]).reshape(batch, -1)
        top = _top_k(candidates, beams_to_keep)
        sums, beams = candidates[rows, top], top // vocab_size
        sequences = running[rows, beams]
        sequences[:, :, length - 1] = top % vocab_size
        ended = (sequences[:, :, length - 1, None] == end_tokens).any(axis=-1) | (length == max_new_tokens)

        # The running beams of the next step.
        open_scores = sums + ended * NEVER
        kept = _top_k(open_scores, num_beams)
        running, running_scores = sequences[rows, kept], open_scores[rows, kept]
        order = (beams[rows, kept] + rows * num_beams).flatten() if num_beams > 1 else None
        tokens = running[:, :, length - 1].reshape(-1, 1)

        # Candidates after the first `num_beams` only serve to keep enough beams running.
        just_ended = ended & is_top
        if just_ended.any():
            is_full = finished[-1].all(axis=1, keepdims=True) & (early_stopping is True)
            excluded = is_full.astype(np.float32) + ~can_improve + ~just_ended
            scores = sums / np.float32(length**length_penalty) + excluded * NEVER
            new = (sequences, np.full_like(top, length), scores, sums, just_ended)
            merged = [np.concatenate(pair, axis=1) for pair in zip(finished, new)]
            best = _top_k(merged[2], num_beams)
            finished = [part[rows, best] for part in merged]
        _, _, finished_scores, _, is_finished = finished
        if is_finished.any():
            final_length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
            attainable = running_scores[:, :1] / np.float32(final_length**length_penalty)
            worst = np.where(is_finished, finished_scores.min(axis=1, keepdims=True), NEVER)
            can_improve &= (attainable > worst).any(axis=1, keepdims=True)
            if not can_improve.any() or ended.all() or (early_stopping is True and is_finished.all()):
                break

    tokens, lengths, _, log_probs, _ = (part[:, :num_return_sequences] for part in finished)
    captions = [[row[:length].tolist() for row, length in zip(*image)] for image in zip(tokens, lengths)]
    return captions, log_probs


def _top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` largest values of each row, descending; ties in the order of positions."""
    if values.shape[1] <= 4 * k:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    rows = np.arange(len(values))[:, None]
    # Sorted, so that ties are in the order of positions.
    part = np.sort(np.argpartition(values, -k, axis=1)[:, -k:], axis=1)
    return part[rows, np.argsort(-values[rows, part], axis=1, kind="stable")]
