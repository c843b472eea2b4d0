"""Greedy and beam search over any function from tokens to logits, in numpy, as transformers 5.24 searches.

`GenerationMixin`'s `_sample` (without sampling) and `_beam_search` say what is right here, to the order of ties: the
tests hold these two to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


# Log-probability of what must not be chosen: transformers' own value, which stays finite when it is added to.
NEVER = np.float32(-1.0e9)

# step(tokens, rows) -> logits. `tokens` (N, L) are new since the last call; before them, the state's rows are replaced
# by those that `rows` (N,) names, or stay as they are where it is `None`. `logits` (N, vocab_size) are float32.
Step = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


@dataclass
class Sequences:
    """What a search found for B images, R for each, the best first.

    Args:
        tokens: (B, R) lists of token ids, with the end token where there is one, without the prompt.
        scores: (B, R), the sum of their log-probabilities.
    """

    tokens: list[list[list[int]]]
    scores: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., vocab_size) -> the same, log-probabilities."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def greedy_search(
    step: Step, prompt: np.ndarray, eos_token_ids: list[int], max_new_tokens: int, suppress_tokens: Sequence[int] = ()
) -> Sequences:
    """Takes the likeliest token until the end token or the limit.

    Args:
        prompt: (B, L), the start token and what else the captions begin with.
        suppress_tokens: ids that are never taken; they count in the probabilities of the others.
    """
    batch = len(prompt)
    found, scores = [[] for _ in range(batch)], np.zeros((batch, 1), np.float32)
    finished = np.zeros(batch, bool)
    tokens = prompt
    for _ in range(max_new_tokens):
        logits = step(tokens, None)
        log_probs = log_softmax(logits)
        allowed = logits.copy()
        allowed[:, list(suppress_tokens)] = -np.inf
        best = allowed.argmax(axis=-1)
        for row in np.flatnonzero(~finished):
            found[row].append(int(best[row]))
            scores[row] += log_probs[row, best[row]]
        finished |= np.isin(best, eos_token_ids)
        if finished.all():
            break
        # What finished rows are fed with no longer matters: rows don't see each other.
        tokens = best[:, None]
    return Sequences([[row] for row in found], scores)


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
) -> Sequences:
    """Keeps the `num_beams` best beginnings of each caption and returns the best finished ones.

    Args:
        step: is called with the beams of an image next to each other, B * num_beams rows.
        prompt: (B, L).
        length_penalty: finished captions are compared by log-probability / length ** length_penalty.
        early_stopping: `True` ends with the first `num_beams` finished captions, `False` when the running ones are no
            longer better at their present length, `"never"` when they can't become better.
        suppress_tokens: as in `greedy_search`.
    """
    batch, beams_to_keep = len(prompt), max(2, 1 + len(eos_token_ids)) * num_beams
    is_top = np.arange(beams_to_keep) < num_beams
    rows = np.arange(batch)[:, None]
    running = np.zeros((batch, num_beams, max_new_tokens), np.int64)
    # Only the first beam counts in the first step: all of them are alike.
    running_scores = np.full((batch, num_beams), NEVER)
    running_scores[:, 0] = 0.0
    done, done_lengths = running.copy(), np.zeros((batch, num_beams), np.int64)
    done_scores, done_sums = np.full((batch, num_beams), NEVER), np.full((batch, num_beams), NEVER)
    is_done = np.zeros((batch, num_beams), bool)
    can_improve = np.ones((batch, 1), bool)
    tokens, order = np.repeat(prompt, num_beams, axis=0), None

    for length in range(1, max_new_tokens + 1):
        log_probs = log_softmax(step(tokens, order)).reshape(batch, num_beams, -1)
        vocab_size = log_probs.shape[-1]
        log_probs[..., list(suppress_tokens)] = -np.inf
        candidates = (log_probs + running_scores[:, :, None]).reshape(batch, -1)
        top = _top_k(candidates, beams_to_keep)
        sums, beams = candidates[rows, top], top // vocab_size
        sequences = running[rows, beams]
        sequences[:, :, length - 1] = top % vocab_size
        ended = np.isin(top % vocab_size, eos_token_ids) | (length == max_new_tokens)

        # The running beams of the next step.
        open_scores = sums + ended * NEVER
        kept = _top_k(open_scores, num_beams)
        running, running_scores = sequences[rows, kept], open_scores[rows, kept]
        order = (beams[rows, kept] + rows * num_beams).flatten()
        tokens = running[:, :, length - 1].reshape(-1, 1)

        # The finished captions, old and new, best first. The candidates beyond the first `num_beams` are there only
        # so that enough go on.
        just_done = ended & is_top
        scores = sums / np.float32(length**length_penalty)
        full = is_done.all(axis=1, keepdims=True) & (early_stopping is True)
        scores = scores + (full.astype(np.float32) + ~can_improve + ~just_done) * NEVER
        merged_scores = np.concatenate([done_scores, scores], axis=1)
        best = _top_k(merged_scores, num_beams)
        done_scores = merged_scores[rows, best]
        done_sums = np.concatenate([done_sums, sums], axis=1)[rows, best]
        done = np.concatenate([done, sequences], axis=1)[rows, best]
        lengths = np.full_like(top, length)
        done_lengths = np.concatenate([done_lengths, lengths], axis=1)[rows, best]
        is_done = np.concatenate([is_done, just_done], axis=1)[rows, best]

        hoped_length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
        hoped = running_scores[:, :1] / np.float32(hoped_length**length_penalty)
        worst = np.where(is_done, done_scores.min(axis=1, keepdims=True), NEVER)
        can_improve &= (hoped > worst).any(axis=1, keepdims=True)
        if not can_improve.any() or ended.all() or (early_stopping is True and is_done.all()):
            break

    found = [
        [done[row, rank, : done_lengths[row, rank]].tolist() for rank in range(num_return_sequences)]
        for row in range(batch)
    ]
    return Sequences(found, done_sums[:, :num_return_sequences])


def _top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the `k` largest of each row, the largest first; of equal ones the first."""
    if values.shape[1] > 4 * k:
        # Sorted, so that equal values come in the order of their positions.
        part = np.sort(np.argpartition(-values, k - 1, axis=1)[:, :k], axis=1)
    else:
        part = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, part, axis=1), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(part, order, axis=1)
