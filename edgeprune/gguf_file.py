"""Reading a GGUF file: its header (metadata and tensor table) alone, and its weights.

transformers reads the vocabulary of a GGUF string by string through a memory map, which takes
seconds, also when it is asked for the config alone. Here the header is walked once with ``struct``.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadInput, one_line
from edgeprune.events import Emit, Progress, ignore

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
# metadata value types of a fixed size, by their number in the file
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# an array as long as this is a vocabulary or a table of merges: its values are not kept
LONG_ARRAY = 4096
# what transformers can make a config of, among the families that can be pruned
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")
ROPE_FACTORS = ("rope_freqs", "rope_factors")


@dataclass(frozen=True)
class Tensor:
    """One row of the tensor table: ``shape`` in torch's order, ``offset`` from the data's start."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Metadata (long arrays as their length alone), tensors by name, and where the data starts."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data_start: int
    # the metadata entries as stored, without the long arrays
    raw_metadata: tuple[bytes, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return self.tensors["token_embd.weight"].shape[0]


class _Cut(Exception):
    """The file ends in the middle of its header."""


class _Cursor:
    """Reads values one after the other and notices the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise _Cut
        self.at += size

    def take(self, layout: str) -> tuple[Any, ...]:
        start = self.at
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)

    def string(self) -> str:
        (size,) = self.take("<Q")
        start = self.at
        self.skip(size)
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def value(self) -> Any:
        (kind,) = self.take("<I")
        return self.array() if kind == ARRAY else self.scalar(kind)

    def scalar(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind not in SCALARS:
            raise _Cut  # no such type: what is read here is not a header any more
        return self.take(SCALARS[kind])[0]

    def array(self) -> Any:
        kind, count = self.take("<IQ")
        if count < LONG_ARRAY:
            return [self.scalar(kind) for _ in range(count)]
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
            return count
        for _ in range(count):
            self.skip(self.take("<Q")[0])
        return count


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file ``path`` and check that all its tensors are in the file.

    BadInput if it is not a GGUF file, or ends before its last tensor does.
    """
    size = path.stat().st_size
    if size < 24:
        raise BadInput(_cut_short(path, f"it has only {size} bytes"))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        magic, version, tensor_count, entry_count = cursor.take("<4sIQQ")
        if magic != MAGIC:
            raise BadInput(f"{path} is not a GGUF file: it does not start with the letters GGUF")
        if version not in VERSIONS:
            raise BadInput(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
        try:
            header = _read_tables(path, cursor, tensor_count, entry_count)
        except _Cut:
            raise BadInput(_cut_short(path, "it ends inside its header")) from None
    _check_data(header, size)
    return header


def _read_tables(path: Path, cursor: _Cursor, tensor_count: int, entry_count: int) -> Header:
    metadata: dict[str, Any] = {}
    raw: list[bytes] = []
    for _ in range(entry_count):
        start = cursor.at
        key = cursor.string()
        metadata[key] = cursor.value()
        if cursor.at - start < LONG_ARRAY or key == "tokenizer.chat_template":
            raw.append(bytes(cursor.data[start : cursor.at]))
    tensors = {}
    for _ in range(tensor_count):
        name = cursor.string()
        (dimensions,) = cursor.take("<I")
        shape = tuple(reversed(cursor.take(f"<{min(dimensions, 8)}Q")))
        tensors[name] = Tensor(shape, *cursor.take("<IQ"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    data_start = -(-cursor.at // alignment) * alignment
    return Header(path, metadata, tensors, data_start, tuple(raw))


def _check_data(header: Header, size: int) -> None:
    for name, tensor in header.tensors.items():
        end = header.data_start + tensor.offset + _tensor_bytes(header, name, tensor)
        if end > size:
            raise BadInput(
                _cut_short(header.path, f"{name} ends at byte {end:,}, the file at byte {size:,}")
            )


def _tensor_bytes(header: Header, name: str, tensor: Tensor) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    except (KeyError, ValueError):
        raise BadInput(
            f"{header.path}: {name} is stored in a format (ggml type {tensor.ggml_type}) that this "
            f"version of the gguf package does not know; try `pip install -U gguf`"
        ) from None
    return prod(tensor.shape) // block * block_bytes


def _cut_short(path: Path, how: str) -> str:
    return f"{path} is cut short ({how}); download it again"


def check_loadable(header: Header) -> None:
    """Raise BadInput for a file that is no plain decoder in one piece."""
    path, architecture = header.path, header.architecture
    if int(header.metadata.get("split.count", 1) or 1) > 1:
        raise BadInput(
            f"{path} is one part of a split model; join the parts first with "
            f"`llama-gguf-split --merge {path.name} whole.gguf`"
        )
    if "token_embd.weight" not in header.tensors or not architecture:
        raise BadInput(f"{path} holds no language model (architecture '{architecture}')")
    if architecture not in ARCHITECTURES:
        raise BadInput(
            f"{path} is a GGUF of architecture '{architecture}'; those that can be read are "
            f"{', '.join(ARCHITECTURES)}: give the model's safetensors instead"
        )
    if header.metadata.get(f"{architecture}.expert_count", 0):
        raise BadInput(f"{path} is a mixture of experts; only dense models can be pruned")
    counts = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    if any(isinstance(header.metadata.get(f"{architecture}.{key}"), list) for key in counts):
        raise BadInput(
            f"{path} has layers of different widths; give the safetensors that it was made from"
        )


def load_config(header: Header) -> PreTrainedConfig:
    """Return the model's config as transformers makes it from the metadata.

    transformers is shown a copy of the header without vocabulary and weights, and reads it at once.
    BadInput if it does not know the architecture.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        (Path(folder) / "header.gguf").write_bytes(_header_alone(header))
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, gguf_file="header.gguf", vocab_size=header.vocab_size
            )
        except (ValueError, KeyError, TypeError, NotImplementedError) as error:
            import transformers

            raise BadInput(
                f"{header.path}: transformers {transformers.__version__} cannot read GGUF files of "
                f"architecture '{header.architecture}'; give the model's safetensors instead "
                f"({one_line(error)})"
            ) from error
    config.name_or_path = str(header.metadata.get("general.name", header.path.stem))
    return config


def _header_alone(header: Header) -> bytes:
    """Return a GGUF file with the short metadata entries and one-element stand-ins for two tensors.

    Which of the two are there tells transformers whether the embeddings are tied.
    """
    names = [n for n in ("token_embd.weight", "output.weight") if n in header.tensors]
    parts = [struct.pack("<4sIQQ", MAGIC, 3, len(names), len(header.raw_metadata))]
    parts += header.raw_metadata
    for name in names:
        encoded = name.encode()
        parts += [struct.pack("<Q", len(encoded)), encoded, struct.pack("<IQIQ", 1, 1, 0, 0)]
    table = b"".join(parts)
    alignment = header.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return table + bytes(-len(table) % alignment + alignment)


def stored_float(header: Header) -> str:
    """Return the torch name of the type that the weight matrices are stored in.

    ``float32`` for quantized ones: their values are computed, and no shorter type holds them.
    """
    kinds = {tensor.ggml_type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({1}): "float16", frozenset({30}): "bfloat16"}.get(frozenset(kinds), "float32")


def load_weights(
    header: Header, model: PreTrainedModel, dtype: torch.dtype, emit: Emit = ignore
) -> dict[str, torch.Tensor]:
    """Return the weights of ``model`` (which may be on the meta device) from the file, in ``dtype``.

    BadInput names a weight that is missing or left over.
    """
    return dict(iter_weights(header, model, dtype, emit))


def iter_weights(
    header: Header, model: PreTrainedModel, dtype: torch.dtype, emit: Emit = ignore
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and values of one weight of ``model`` after the other, as ``load_weights``.

    Read here because transformers makes the gguf package's table of names anew for every module,
    which takes longer than all the rest. BadInput names a weight that is missing or left over.
    """
    import gguf
    import numpy as np
    import torch

    stored_name = _names(header, model.config.num_hidden_layers)
    left = {name for name in header.tensors if not name.startswith(ROPE_FACTORS)}
    wanted = dict(model.named_parameters())
    for done, (name, parameter) in enumerate(wanted.items()):
        if done % 16 == 0:
            emit(Progress(stage="load", done=done, total=len(wanted), unit="tensors"))
        stored = stored_name(name)
        tensor = header.tensors.get(stored)
        if tensor is None or tensor.shape != tuple(parameter.shape):
            raise BadInput(f"{header.path}: {stored} is missing or misshapen; download it again")
        start = header.data_start + tensor.offset
        size = _tensor_bytes(header, stored, tensor)
        # mapped one at a time: what was read of a mapping stays in memory with it
        raw = np.asarray(np.memmap(header.path, np.uint8, "r", offset=start, shape=size))
        rows = raw.reshape(*tensor.shape[:-1], -1)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType(tensor.ggml_type))
        values = _as_in_transformers(header, stored, values.reshape(tensor.shape))
        yield name, torch.from_numpy(np.array(values)).to(dtype)
        left.discard(stored)
    if left:
        raise BadInput(f"{header.path}: nothing in its config uses {min(left)}; give safetensors")


def _names(header: Header, num_hidden_layers: int) -> Callable[[str], str]:
    """Return the way from a parameter's name in transformers to its name in the file."""
    import gguf

    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[header.architecture]
    table = gguf.get_tensor_name_map(architecture, num_hidden_layers)

    def stored_name(name: str) -> str:
        module, _, kind = name.rpartition(".")
        return f"{table.get_name(module)}.{kind}"

    return stored_name


def _as_in_transformers(header: Header, name: str, values: Any) -> Any:
    """Undo what llama.cpp's converter does to the values of a tensor (a NumPy array)."""
    if header.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        kind = "head_count" if ".attn_q." in name else "head_count_kv"
        heads = header.metadata.get(f"llama.attention.{kind}")
        heads = heads or header.metadata["llama.attention.head_count"]
        # it interleaves the two halves that the rotary embedding rotates
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if header.architecture == "gemma3" and name.endswith("norm.weight"):
        return values - 1  # Gemma's norms multiply by 1 + weight
    return values
