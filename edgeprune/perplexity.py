"""Perplexity of a text, by the two conventions in use: per token and per word."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Progress, ignore
from edgeprune.families import logits_divisor

# Tokens that run through the model together, and rows of logits held at once.
BATCH_TOKENS = 2048
HEAD_ROWS = 256


@dataclass(frozen=True)
class Perplexity:
    """``token_perplexity`` is exp(mean negative log likelihood of the predicted tokens).

    ``word_perplexity`` spreads the same likelihood over the whitespace-separated words of the text
    (lm-evaluation-harness' convention for WikiText). A token that no window shows with a token before
    it is not predicted: the first of each window where windows do not overlap. With
    ``stride < window`` each later window predicts only its new tokens.
    """

    token_perplexity: float
    word_perplexity: float
    tokens: int
    words: int
    window: int
    stride: int
    dtype: str
    seconds: float
    text_hash: str


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    emit: Emit = ignore,
) -> Perplexity:
    """Measure ``model`` on ``text`` in the type and on the device that the model is in.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; special tokens are not added.
        text: the text as a whole.
        window: tokens that the model sees at once.
        stride: tokens from one window's start to the next; default ``window``, no overlap.
        max_tokens: read only this many tokens of the text.
        emit: hears progress in windows.

    Raises:
        BadInput: the text has fewer than two tokens, or window and stride do not fit the model.
        EdgepruneError: the model's output is not a number.
    """
    stride = stride or window
    _check_window(model, window, stride)
    started = time.monotonic()
    ids = tokenize(tokenizer, text, max_tokens)
    if len(ids) < 2:
        raise BadInput("the text has fewer than two tokens; give a longer one with --text FILE")
    total, predicted = _likelihood(model, ids, window, stride, emit)
    mean = total / predicted
    if not math.isfinite(mean):
        raise EdgepruneError("the model's output is not a number (NaN); its weights are damaged")
    read = tokenizer.decode(ids.tolist())
    words = max(1, len(read.split()))
    return Perplexity(
        token_perplexity=_exp(mean),
        word_perplexity=_exp(mean * len(ids) / words),
        tokens=len(ids),
        words=words,
        window=window,
        stride=stride,
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=time.monotonic() - started,
        text_hash=hashlib.sha256(read.encode()).hexdigest(),
    )


def _check_window(model: Any, window: int, stride: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None) or window
    if not 2 <= window <= longest:
        raise BadInput(f"a window of {window} tokens: this model takes 2 to {longest}")
    if not 1 <= stride <= window:
        raise BadInput(
            f"a stride of {stride} tokens: it must be between 1 and the window, {window}"
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def tokenize(tokenizer: Any, text: str, max_tokens: int | None) -> Tensor:
    """Return the text's token ids, at most ``max_tokens``, without tokenizing much more than that."""
    characters = len(text) if max_tokens is None else max_tokens * 8
    while True:
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        # a token at the cut may be half of one; so more than max_tokens are wanted
        if characters >= len(text) or (max_tokens is not None and len(ids) > max_tokens):
            return torch.tensor(ids[:max_tokens])
        characters *= 2


@torch.inference_mode()
def _likelihood(model: Any, ids: Tensor, window: int, stride: int, emit: Emit) -> tuple[float, int]:
    """Return the summed negative log likelihood and how many tokens were predicted."""
    total, predicted, done = 0.0, 0, 0
    spans = list(_spans(len(ids), window, stride))
    for batch in _batches(spans, max(1, BATCH_TOKENS // window)):
        tokens = torch.stack([ids[start:end] for start, end, _ in batch]).to(model.device)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        for row, (start, end, new) in enumerate(batch):
            first = end - start - new
            total += _summed_loss(model, hidden[row, first - 1 : -1], tokens[row, first:])
            predicted += new
        done += len(batch)
        emit(Progress(stage="perplexity", done=done, total=len(spans), unit="windows"))
    return total, predicted


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and the number of tokens that are predicted for the first time."""
    seen = 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        first = max(seen, start + 1)
        if end > first:
            yield start, end, end - first
        seen = end
        if end == length:
            return


def _batches(spans: list[tuple[int, int, int]], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group neighbours of equal length, so that nothing is padded."""
    batch: list[tuple[int, int, int]] = []
    for span in spans:
        if batch and (len(batch) == most or span[1] - span[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


def _summed_loss(model: Any, hidden: Tensor, targets: Tensor) -> float:
    divisor = logits_divisor(model.config)
    total = 0.0
    head = model.lm_head
    for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = linear(rows, head.weight, head.bias).float() / divisor
        total += float(cross_entropy(logits, wanted, reduction="sum"))
    return total
