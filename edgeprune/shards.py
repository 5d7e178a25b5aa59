"""The files of a checkpoint: reading their headers, and writing them a tensor at a time.

No more than one tensor need be in memory, however large the whole. A file's header comes first and is
known last, so that room for it is kept and filled with spaces, as the format allows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Types of the format that torch has too, by their name in a header."""
_CODES = {name: code for code, name in DTYPES.items()}
_ENTRY = 160
"""Bytes that an entry of the header takes beside the tensor's name, at most."""
_PIECE = 1 << 24


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of a safetensors header by tensor, and the byte that the data starts at."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


class Writer:
    """Writes tensors into the files of a checkpoint's folder.

    Args:
        folder: an existing folder.
        names: all names that will come: they say how much room a header needs.
        shard_bytes: a new file is begun before one grows beyond this.
    """

    def __init__(self, folder: Path, names: list[str], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._room = -(-(64 + sum(len(json.dumps(name)) + _ENTRY for name in names)) // 8) * 8
        self._headers: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._at = 0
        self.bytes = 0
        self.written: set[str] = set()
        """Names of the tensors that are in the files."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write these tensors; none is kept."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._file is None or (self._at and self._at + size > self._shard_bytes):
                self._begin()
            self._write(name, tensor.detach(), size)

    def finish(self) -> None:
        """Complete the last file, give all files their names and write the index."""
        if self._file is None:
            self._begin()
        self._end()
        count = len(self._headers)
        if count == 1:
            self._part(0).replace(self._folder / SINGLE)
            return
        where: dict[str, str] = {}
        for number, header in enumerate(self._headers):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).replace(self._folder / name)
            where |= {key: name for key in header if key != "__metadata__"}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / INDEX).write_text(text, encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._folder / f"{number}.part"

    def _begin(self) -> None:
        if self._file is not None:
            self._end()
        self._file = self._part(len(self._headers)).open("wb")
        self._file.seek(8 + self._room)
        self._headers.append({"__metadata__": {"format": "pt"}})
        self._at = 0

    def _write(self, name: str, tensor: torch.Tensor, size: int) -> None:
        import torch

        assert self._file is not None
        self._headers[-1][name] = {
            "dtype": _CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [self._at, self._at + size],
        }
        if tensor.numel():
            flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
            for piece in flat.split(_PIECE):
                self._file.write(memoryview(piece.numpy()))
        self._at += size
        self.bytes += size
        self.written.add(name)

    def _end(self) -> None:
        assert self._file is not None
        header = json.dumps(self._headers[-1], separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room))
        self._file.write(header.ljust(self._room))
        self._file.close()
        self._file = None
