"""What a training takes of a device's memory, before it takes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from edgeprune import machine, sources
from edgeprune.errors import BadInput
from edgeprune.events import Emit, Note
from edgeprune.families import head_dim
from edgeprune.nonuniform import layer_widths
from edgeprune.quantities import format_bytes
from edgeprune.recovery import lora
from edgeprune.recovery.kernels import LONGEST_ATTENTION
from edgeprune.recovery.loss import CHUNK_BYTES
from edgeprune.recovery.settings import Training

# Tokens that go through the model at once unless memory is short. The gradients are added up once a micro batch, so
# that few tokens waste time; more than this gains nothing.
MICRO_BATCH_TOKENS = {"cpu": 4096, "mps": 4096, "cuda": 16384}
SHORTEST = 128
# Of the additions that are advised where full training does not fit.
LIGHT_RANK = 32


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device. The weights are the float32 ones and, with bfloat16, the copies to compute with."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    teacher: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)


def estimate(
    config: Any,
    settings: Training,
    micro_batch: int,
    dtype: torch.dtype,
    teacher: Any = None,
    shards: int = 1,
    device: str = "cpu",
    removed: int = 0,
) -> Estimate:
    """Estimate what training a model takes of each device.

    A teacher whose predictions are on disk (``settings.teacher_top_k``) is not counted.

    Args:
        config: of the model, uniform or not.
        settings: how to train; its ``micro_batch`` is not read.
        micro_batch: sequences at once.
        dtype: computed in.
        teacher: config of the teacher, None without one.
        shards: devices that the weights, gradients and moments are spread over.
        device: its type, such as ``cuda``.
        removed: parameters that will be cut off before.
    """
    parameters = sources.weight_bytes(config, 1) - removed
    layers = [
        _layer_bytes(config, i, settings.length, dtype, device)
        for i in range(config.num_hidden_layers)
    ]
    tokens, hidden = micro_batch * settings.length, config.hidden_size * dtype.itemsize
    kept = sum(layers)
    if settings.checkpointing:
        kept = max(layers) + len(layers) * hidden
    trained, frozen = parameters, 0
    if settings.lora_rank:
        trained = lora.parameters(sources.build_on_meta(config), settings.lora_rank)
        frozen = parameters
    copies = dtype.itemsize if dtype != torch.float32 else 0
    moments = 2 if settings.optimizer == "adamw-8bit" else 8
    head = config.vocab_size * config.hidden_size
    # gathered while it is used: the ends of the model and one layer
    gathered = (head + parameters // len(layers)) * dtype.itemsize if shards > 1 else 0
    chunk = min(CHUNK_BYTES, tokens * config.vocab_size * dtype.itemsize)
    chunks = 4 if settings.teacher_top_k else 5 if teacher is not None else 2
    return Estimate(
        weights=frozen * dtype.itemsize
        + trained * 4 // shards
        + (gathered if shards > 1 else trained * copies),
        gradients=trained * 4 // shards + (0 if frozen else 2 * head * dtype.itemsize),
        optimizer=trained * moments // shards,
        activations=tokens * kept,
        loss=chunk * chunks + (0 if frozen else head * 4),
        teacher=0 if settings.teacher_top_k else _teacher_bytes(teacher, tokens, dtype),
    )


def _layer_bytes(config: Any, index: int, length: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that one token leaves behind in a layer for the backward pass."""
    heads, kv_heads, channels = layer_widths(config)[index]
    size, hidden = head_dim(config), config.hidden_size
    if dtype == torch.float32:  # as transformers writes it
        return 4 * (6 * hidden + 3 * heads * size + 2 * kv_heads * size + 4 * channels)
    values = 4 * hidden + 3 * heads * size + 2 * kv_heads * size + 4 * channels
    if device == "cpu" and length <= LONGEST_ATTENTION:
        values += heads * length * 3 // 4  # the probabilities of attention
    return dtype.itemsize * values


def _teacher_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    if config is None:
        return 0
    widest = max(widths.intermediate_size for widths in layer_widths(config))
    values = sources.weight_bytes(config, 1) + tokens * (4 * config.hidden_size + 3 * widest)
    return values * dtype.itemsize


def fitting_micro_batch(
    config: Any,
    settings: Training,
    teacher: Any,
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
    *,
    loaded: int = 0,
    removed: int = 0,
    shards: int = 1,
    force: bool = False,
    emit: Emit,
) -> int:
    """Return how many sequences go through the model at once: the settings', or as many as fit.

    Args:
        config: of the model.
        settings: how to train.
        teacher: config of the teacher, None without one.
        device: to train on.
        dtype: to compute in.
        processes: that share a batch.
        loaded: bytes of the models that are in the device's memory already.
        removed: parameters that will be cut off before.
        shards: devices that the weights, gradients and moments are spread over.
        force: do not refuse.
        emit: is told instead.

    Raises:
        BadInput: not even that fits; says what would. With ``force`` it is a note instead.
    """
    available = free_memory(device) + loaded

    def needed(asked: Training, micro_batch: int) -> Estimate:
        return estimate(config, asked, micro_batch, dtype, teacher, shards, device.type, removed)

    share = max(1, settings.batch // processes)
    most = settings.micro_batch or max(
        1, MICRO_BATCH_TOKENS.get(device.type, 4096) // settings.length
    )
    micro_batch = most = min(most, share)
    if settings.micro_batch is None:
        while micro_batch > 1 and needed(settings, micro_batch).total > available:
            micro_batch = (micro_batch + 1) // 2
    found = needed(settings, micro_batch)
    if found.total <= available:
        return micro_batch
    fits = (
        words
        for words, asked, rows in _ways_out(settings, micro_batch)
        if needed(asked, rows).total <= available
    )
    way_out = next((f"it fits with {words}" for words in fits), None)
    text = (
        f"training takes about {format_bytes(found.total)} on {device} ({found}) and {format_bytes(available)} are "
        f"free; {way_out or 'only a smaller model, a smaller teacher or more devices would make it fit'}"
    )
    if not force:
        raise BadInput(text)
    emit(Note(text=text, level="warning"))
    return micro_batch


def teacher_rows(
    config: Any,
    settings: Training,
    device: torch.device,
    dtype: torch.dtype,
    *,
    force: bool = False,
    emit: Emit,
) -> int:
    """Return how many sequences go at once through a teacher that has the device to itself.

    BadInput if not even one fits; with ``force`` it is a note instead.
    """
    available = free_memory(device)

    def needed(rows: int) -> int:
        tokens = rows * settings.length
        logits = min(CHUNK_BYTES, tokens * config.vocab_size * 4)
        return _teacher_bytes(config, tokens, dtype) + 3 * logits

    rows = settings.micro_batch or MICRO_BATCH_TOKENS.get(device.type, 4096) // settings.length
    rows = max(1, rows)
    while rows > 1 and needed(rows) > available:
        rows = (rows + 1) // 2
    if needed(rows) > available:
        text = (
            f"the teacher alone takes about {format_bytes(needed(rows))} on {device} and {format_bytes(available)} are "
            "free; only a smaller teacher or more memory would make it fit"
        )
        if not force:
            raise BadInput(text)
        emit(Note(text=text, level="warning"))
    return rows


def _ways_out(settings: Training, micro_batch: int) -> Iterator[tuple[str, Training, int]]:
    """Give what costs least first: words, settings and micro batch."""
    if micro_batch > 1:
        yield "micro_batch = 1", settings, 1
    careful, words = replace(settings, checkpointing=True), "activation checkpointing"
    if not settings.checkpointing:
        yield words, careful, micro_batch
    if micro_batch > 1:
        words = f"{words} and micro_batch = 1"
        yield words, careful, 1
    if settings.distill and not settings.teacher_top_k:
        yield f"{words} and teacher_top_k = 64", replace(careful, teacher_top_k=64), 1
    length = settings.length // 2
    while length >= SHORTEST:
        yield f"{words} and length = {length}", replace(careful, length=length), 1
        length //= 2
    if settings.optimizer != "adamw-8bit":
        careful = replace(careful, optimizer="adamw-8bit")
        words = f"{words} and the optimizer adamw-8bit"
        yield words, careful, 1
    if not settings.lora_rank:
        light = f"LoRA of rank {LIGHT_RANK} (lora_rank = {LIGHT_RANK}) and activation checkpointing"
        yield light, replace(careful, optimizer="adamw", lora_rank=LIGHT_RANK), 1


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on a device; processes share a CPU's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return machine.memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
