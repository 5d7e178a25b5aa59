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

from edgeprune import machine, mapped, sources
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Progress, ignore
from edgeprune.families import logits_divisor

# Tokens that run through the model together, and rows of logits held at once.
BATCH_TOKENS = 2048
HEAD_ROWS = 256
# Part of the memory budget that the hidden states between two layers of a mapped model may fill.
HIDDEN_SHARE = 0.25


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
    memory: int | None = None,
    emit: Emit = ignore,
) -> Perplexity:
    """Measure ``model`` on ``text`` in the type and on the device that the model is in.

    A mapped model is run layer by layer, in the type and on the device that compute fastest.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; special tokens are not added.
        text: the text as a whole.
        window: tokens that the model sees at once.
        stride: tokens from one window's start to the next; default ``window``, no overlap.
        max_tokens: read only this many tokens of the text.
        memory: bytes to get along with, for a mapped model; default ``mapped.budget``.
        emit: hears progress in windows, or in layer passes.

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
    spans = list(_spans(len(ids), window, stride))
    batches = list(_batches(spans, max(1, BATCH_TOKENS // window)))
    if mapped.is_mapped(model):
        dtype, device = machine.compute_dtype(), machine.pick_device()
        total = _likelihood_by_layer(model, ids, batches, dtype, device, memory, emit)
    else:
        dtype = model.dtype
        total = _likelihood(model, ids, batches, emit)
    predicted = sum(new for _, _, new in spans)
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
        dtype=str(dtype).removeprefix("torch."),
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


def measure(
    source: sources.Source,
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    memory: int | None = None,
    emit: Emit = ignore,
) -> Perplexity:
    """Measure a source as ``perplexity`` does, layer by layer if it does not fit in ``memory`` bytes.

    ``memory`` is by default a good part of what is free (``mapped.budget``).
    """
    dtype, device = machine.compute_dtype(), machine.pick_device()
    with sources.opened(source, memory=memory, dtype=dtype, device=device, emit=emit) as model:
        return perplexity(
            model,
            sources.load_tokenizer(source),
            text,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            memory=memory,
            emit=emit,
        )


Batch = list[tuple[int, int, int]]
"""Start, end and number of newly predicted tokens of windows that are equally long."""


@torch.inference_mode()
def _likelihood(model: Any, ids: Tensor, batches: list[Batch], emit: Emit) -> float:
    """Return the summed negative log likelihood of the predicted tokens."""
    total, done = 0.0, 0
    windows = sum(map(len, batches))
    for batch in batches:
        tokens = _tokens(ids, batch).to(model.device)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        total += _batch_loss(_Head.of(model), hidden, tokens, batch)
        done += len(batch)
        emit(Progress(stage="perplexity", done=done, total=windows, unit="windows"))
    return total


@torch.inference_mode()
def _likelihood_by_layer(
    model: Any,
    ids: Tensor,
    batches: list[Batch],
    dtype: torch.dtype,
    device: torch.device,
    memory: int | None,
    emit: Emit,
) -> float:
    """Return the same with one decoder layer in memory, for as many batches at a time as fit."""
    layers, done, total = model.config.num_hidden_layers, 0, 0.0

    def tick() -> None:
        nonlocal done
        done += 1
        passes = layers * len(batches)
        emit(Progress(stage="perplexity", done=done, total=passes, unit="layer passes"))

    room = int((mapped.budget() if memory is None else memory) * HIDDEN_SHARE)
    walk = mapped.Walk(model, dtype, device)
    for chunk in _chunks(batches, room // (model.config.hidden_size * dtype.itemsize)):
        tokens = [_tokens(ids, batch) for batch in chunk]
        hidden = walk.hidden(tokens, tick)
        with mapped.visiting(model.lm_head, dtype, device) as weights:
            head = _Head(weights["weight"], weights.get("bias"), logits_divisor(model.config))
            for batch, each, states in zip(chunk, tokens, hidden, strict=True):
                total += _batch_loss(head, states, each.to(device), batch)
    return total


def _chunks(batches: list[Batch], most: int) -> Iterator[list[Batch]]:
    """Group batches so that a group has at most ``most`` tokens, or one batch."""
    chunk: list[Batch] = []
    held = 0
    for batch in batches:
        size = sum(end - start for start, end, _ in batch)
        if chunk and held + size > most:
            yield chunk
            chunk, held = [], 0
        chunk.append(batch)
        held += size
    if chunk:
        yield chunk


def _tokens(ids: Tensor, batch: Batch) -> Tensor:
    return torch.stack([ids[start:end] for start, end, _ in batch])


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


def _batches(spans: list[tuple[int, int, int]], most: int) -> Iterator[Batch]:
    """Group neighbours of equal length, so that nothing is padded."""
    batch: Batch = []
    for span in spans:
        if batch and (len(batch) == most or span[1] - span[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Head:
    weight: Tensor
    bias: Tensor | None
    divisor: float

    @staticmethod
    def of(model: Any) -> _Head:
        return _Head(model.lm_head.weight, model.lm_head.bias, logits_divisor(model.config))


def _batch_loss(head: _Head, hidden: Tensor, tokens: Tensor, batch: Batch) -> float:
    """Return the summed loss of a batch; ``hidden`` (batch, length, hidden size)."""
    total = 0.0
    for row, (start, end, new) in enumerate(batch):
        first = end - start - new
        total += _summed_loss(head, hidden[row, first - 1 : -1], tokens[row, first:])
    return total


def _summed_loss(head: _Head, hidden: Tensor, targets: Tensor) -> float:
    total = 0.0
    for rows, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = linear(rows, head.weight, head.bias).float() / head.divisor
        total += float(cross_entropy(logits, wanted, reduction="sum"))
    return total
