"""A teacher's predictions on disk: computed once for all sequences, so that training needs no teacher in memory.

Kept are the k likeliest next tokens at each place, with their log-probabilities among the whole vocabulary at the
temperature, in a folder ``teacher-HASH`` beside the packed sequences that they belong to: ``ids.npy`` (rows, length,
k), uint16 or int32, and ``log-probabilities.npy`` of the same shape, float16. It has this name only when it is whole.
What was killed goes on from ``.teacher-HASH.part``.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune import machine, sources
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.events import Emit, Note, Progress, ignore
from edgeprune.quantities import format_bytes
from edgeprune.recovery import kernels, memory
from edgeprune.recovery.loss import CHUNK_BYTES
from edgeprune.recovery.objective import head_of, last_hidden
from edgeprune.recovery.packing import Batch, Packed, alone, disk_is_told, synced, write_json
from edgeprune.recovery.settings import Training
from edgeprune.recovery.streams import Ids
from edgeprune.sources import Source

VERSION = 1
STAGE = "teacher"
SEQUENCES = ("input_ids", "labels", "positions", "documents")
IDS, LOG_PROBABILITIES, ABOUT, MARK = "ids.npy", "log-probabilities.npy", "teacher.json", "mark"
# No more than this many seconds of the work are lost with the process.
INTERVAL = 20.0


class Taught(Packed):
    """Packed sequences, and what a teacher was recorded to predict at each of their places.

    Args:
        folder: of the sequences.
        recorded: of the predictions; ``prepare`` made it.

    Raises:
        EdgepruneError: one of them is incomplete or damaged, or they do not fit together.
    """

    top_k: int
    temperature: float
    vocabulary: int
    """Of the teacher, tokens."""

    def __init__(self, folder: Path, recorded: Path) -> None:
        super().__init__(folder)
        self.recorded = recorded
        try:
            about = json.loads((recorded / ABOUT).read_text(encoding="utf-8"))
            self.top_k, self.vocabulary = int(about["top_k"]), int(about["vocabulary"])
            self.temperature = float(about["temperature"])
            self._ids, self._log_probabilities = (
                np.load(recorded / name, mmap_mode="r", allow_pickle=False)
                for name in (IDS, LOG_PROBABILITIES)
            )
            shapes = {self._ids.shape, self._log_probabilities.shape}
            if about["version"] != VERSION or shapes != {(len(self), self.length, self.top_k)}:
                raise ValueError("its parts do not fit together")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise EdgepruneError(
                f"the teacher's predictions in {recorded} are damaged ({one_line(error)}); delete that folder, and "
                "they are made anew"
            ) from error

    def __reduce__(self) -> tuple[type[Packed], tuple[Path, ...]]:
        return Taught, (self.folder, self.recorded)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the sequences of these numbers, with the predictions; IndexError for one that is not there."""
        plain, numbers = super().batch(rows), np.array(rows, np.int64)
        return replace(
            plain,
            teacher_ids=torch.from_numpy(self._ids[numbers].astype(np.int32)),
            teacher_log_probabilities=torch.from_numpy(self._log_probabilities[numbers]),
        )


def prepare(
    packed: Packed,
    teacher: Source,
    settings: Training,
    *,
    device: torch.device,
    force: bool = False,
    emit: Emit = ignore,
) -> Taught:
    """Return ``packed`` with the teacher's predictions, from the disk if they were made before.

    Then the teacher is not even loaded. What is kept is named by all that decides it: sequences, teacher, temperature,
    k and the compute type. Of several processes that ask for the same, one makes it and the others wait.

    Emits a Note of what is written where, and Progress of stage ``teacher``, in tokens.

    Args:
        packed: what ``packing.prepare`` returned.
        teacher: the dense model.
        settings: its ``teacher_top_k``, above 0, ``temperature`` and ``micro_batch`` are read.
        device: to compute on.
        force: compute though the memory seems too small.
        emit: hears of the work.

    Raises:
        BadInput: the vocabulary is smaller than k; the disk or the memory has too little room.
        EdgepruneError: the teacher predicts what is no number; the disk failed.
    """
    config, dtype = sources.load_config(teacher), machine.compute_dtype(device)
    if settings.teacher_top_k > config.vocab_size:
        raise BadInput(
            f"teacher_top_k is {settings.teacher_top_k:,} and {teacher.title} has {config.vocab_size:,} tokens in its "
            "vocabulary; take fewer, such as 64"
        )
    what = {
        "version": VERSION,
        "data": f"{packed.folder.parent.name}/{packed.folder.name}",
        "teacher": teacher.identity(),
        "temperature": settings.temperature,
        "top_k": settings.teacher_top_k,
        "dtype": str(dtype),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    folder = packed.folder.parent / f"teacher-{digest}"
    found = _opened(packed, folder)
    if found is None:
        with alone(folder, emit):
            found = _opened(packed, folder)  # by the process that was waited for
            if found is None:
                _make(folder, packed, teacher, settings, device, force, emit)
                found = Taught(packed.folder, folder)
        _give_memory_back(device)
    return found


def _opened(packed: Packed, folder: Path) -> Taught | None:
    try:
        return Taught(packed.folder, folder)
    except EdgepruneError:
        return None


def _give_memory_back(device: torch.device) -> None:
    """Let go what is left of the teacher, or what is free would be measured too small."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- making


def _make(
    folder: Path,
    packed: Packed,
    teacher: Source,
    settings: Training,
    device: torch.device,
    force: bool,
    emit: Emit,
) -> None:
    """Write the predictions for all sequences into ``folder``; whoever calls holds its lock."""
    config, dtype = sources.load_config(teacher), machine.compute_dtype(device)
    shape = (len(packed), packed.length, settings.teacher_top_k)
    kinds: dict[str, np.dtype[Any]] = {
        IDS: np.dtype(np.uint16 if config.vocab_size <= 1 << 16 else np.int32),
        LOG_PROBABILITIES: np.dtype(np.float16),
    }
    unfinished = folder.with_name(f".{folder.name}.part")
    done = _marked(unfinished)
    _check_room(folder, (shape[0] - done) * shape[1], kinds, shape[2])
    rows = memory.teacher_rows(config, settings, device, dtype, force=force, emit=emit)
    size = int(np.prod(shape)) * sum(kind.itemsize for kind in kinds.values())
    text = f"the {shape[2]} likeliest next tokens of {teacher.title} are recorded in {folder}"
    emit(Note(text=f"{text}, {format_bytes(size)}"))
    model = sources.load_model(teacher, dtype=dtype, device=device, emit=emit)
    emit(_progress(done, shape, teacher))
    with contextlib.closing(_Recording(unfinished, shape, kinds, done)) as recording:
        for found in _predictions(model, packed, settings, rows, done, device):
            recording.add(*found)
            emit(_progress(recording.rows, shape, teacher))
        about = {
            "version": VERSION,
            "top_k": shape[2],
            "temperature": settings.temperature,
            "vocabulary": config.vocab_size,
            "teacher": teacher.title,
        }
        recording.finish(folder, about)


def _progress(rows: int, shape: tuple[int, ...], teacher: Source) -> Progress:
    done, total = rows * shape[1], shape[0] * shape[1]
    return Progress(stage=STAGE, done=done, total=total, unit="tokens", note=teacher.title)


def _predictions(
    model: Any, packed: Packed, settings: Training, rows: int, done: int, device: torch.device
) -> Iterator[tuple[Ids, Ids]]:
    """Give ids and log-probabilities (up to ``rows``, length, k) of all sequences from ``done`` on."""
    left = (len(packed) - done) * packed.length
    flops = 2 * sum(p.numel() for p in model.parameters()) * left
    compiled = flops >= kernels.WORTH_COMPILING
    with kernels.fused(model, packed.length, model.dtype, compiled=compiled, attention=False):
        for first in range(done, len(packed), rows):
            batch = packed.batch(range(first, min(first + rows, len(packed))))
            batch = Batch(*(getattr(batch, name).to(device) for name in SEQUENCES))
            ids, log_probabilities = _likeliest(model, batch, settings)
            if bool(log_probabilities.isnan().any()):
                raise EdgepruneError(
                    f"the teacher predicts what is not a number, in sequence {first} or after; take another teacher, "
                    "or set distill = 0"
                )
            shape = (*batch.input_ids.shape, settings.teacher_top_k)
            lowest = torch.finfo(torch.float16).min
            half = log_probabilities.clamp_min(lowest).half()
            yield ids.view(shape).cpu().numpy(), half.view(shape).cpu().numpy()


@torch.no_grad()
def _likeliest(model: Any, batch: Batch, settings: Training) -> tuple[Tensor, Tensor]:
    """Return the ids of the likeliest next tokens and their log-probabilities, (places, k), likeliest first."""
    hidden, head = last_hidden(model, batch).flatten(0, 1), head_of(model)
    ids, found = [], []
    for chunk in hidden.split(max(1, CHUNK_BYTES // (len(head.weight) * 4))):
        logits = head.logits(chunk).float().div_(settings.temperature)
        top = logits.topk(settings.teacher_top_k)
        ids.append(top.indices)
        found.append(top.values - logits.logsumexp(dim=-1, keepdim=True))
    return torch.cat(ids), torch.cat(found)


# ---- files


def _check_room(folder: Path, tokens: int, kinds: dict[str, np.dtype[Any]], top_k: int) -> None:
    each = sum(kind.itemsize for kind in kinds.values())
    needed, free = tokens * top_k * each, machine.disk_free(folder)
    if needed <= free:
        return
    fewer = free // (tokens * each)
    way_out = f"teacher_top_k = {fewer}" if fewer else "teacher_top_k = 0, the teacher in memory"
    raise BadInput(
        f"the disk is too small: the teacher's {top_k:,} likeliest tokens at {tokens:,} places take "
        f"{format_bytes(needed)} in {folder.parent} and {format_bytes(free)} are free; make room, or use {way_out}"
    )


def _marked(folder: Path) -> int:
    """Return how many sequences the disk surely holds of a recording that was broken off."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        held = all((folder / n).stat().st_size >= size for n, size in mark["bytes"].items())
        return int(mark["rows"]) if held else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


class _Recording:
    """The two files while they grow, in a folder of their own, from ``rows`` whole sequences on."""

    def __init__(
        self, folder: Path, shape: tuple[int, ...], kinds: dict[str, np.dtype[Any]], rows: int
    ) -> None:
        self.rows, self._folder, self._kinds = rows, folder, kinds
        self._saved = time.monotonic()
        with disk_is_told(folder):
            folder.mkdir(exist_ok=True)
            self._files = {n: _grown(folder / n, k, shape, rows) for n, k in kinds.items()}

    def add(self, *found: Ids) -> None:
        """Write more sequences of each file; BadInput if the disk is full, and nothing is left."""
        try:
            with disk_is_told(self._folder):
                for (name, file), values in zip(self._files.items(), found, strict=True):
                    file.write(values.astype(self._kinds[name], copy=False).tobytes())
                self.rows += len(found[0])
                if time.monotonic() - self._saved >= INTERVAL:
                    self._mark()
        except BadInput:
            self.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _mark(self) -> None:
        for file in self._files.values():
            synced(file, close=False)
        beside = self._folder / f"{MARK}.tmp"
        sizes = {name: file.tell() for name, file in self._files.items()}
        write_json(beside, {"rows": self.rows, "bytes": sizes})
        beside.replace(self._folder / MARK)
        self._saved = time.monotonic()

    def finish(self, folder: Path, about: dict[str, Any]) -> None:
        """Give what is whole its name, in place of what is damaged."""
        with disk_is_told(self._folder):
            for file in self._files.values():
                synced(file)
            write_json(self._folder / ABOUT, about)
            (self._folder / MARK).unlink(missing_ok=True)
            if folder.exists():
                shutil.rmtree(folder)
            self._folder.rename(folder)

    def close(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what is not written yet may not fit
                file.close()


def _grown(path: Path, kind: np.dtype[Any], shape: tuple[int, ...], rows: int) -> Any:
    """Open the .npy file of an array of ``shape`` that holds its first ``rows`` so far, to write the next."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(kind)
    np.lib.format.write_array_header_1_0(
        header, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    file = path.open("ab")
    file.truncate(header.tell() + rows * int(np.prod(shape[1:])) * kind.itemsize if rows else 0)
    if not rows:
        file.write(header.getvalue())
    return file
