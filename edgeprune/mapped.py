"""Models that do not fit in memory: weights that stay in their files until they are used.

The parameters of a mapped model are the files themselves, mapped read-only in the type that they are
stored in. What is touched becomes resident page by page; ``release`` gives the pages of a part back
and ``prefetch`` asks the system to read one ahead. ``Walk`` runs such a model one decoder layer after
the other.
"""

from __future__ import annotations

import copy
import mmap
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgeprune import machine, shards
from edgeprune.families import logits_divisor

BUDGET_SHARE = 0.6
"""Part of the free memory that a model may fill before it is mapped instead."""
# Values of the head that are converted at once.
_HEAD_PIECE = 1 << 26

# The mappings made here, by their address: advice is given to these alone, since MADV_DONTNEED clears any other memory.
_MAPPINGS: dict[int, weakref.ref[mmap.mmap]] = {}


# ---- tensors in files


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, as read-only views of the file.

    One that is not aligned to its type is copied. ValueError for a type that torch does not have.
    """
    entries, start = shards.read_header(path)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read-only
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
    _MAPPINGS[whole.data_ptr()] = weakref.ref(mapping)
    return {name: _view(whole, start, name, entry) for name, entry in entries.items()}


def _view(whole: Tensor, start: int, name: str, entry: dict[str, Any]) -> Tensor:
    if entry["dtype"] not in shards.DTYPES:
        raise ValueError(f"{name} is stored as {entry['dtype']}, which is not read")
    dtype = getattr(torch, shards.DTYPES[entry["dtype"]])
    first, last = (start + offset for offset in entry["data_offsets"])
    values = whole[first:last]
    if first % dtype.itemsize:
        values = values.clone()
    return values.view(dtype).view(entry["shape"])


def is_mapped(what: nn.Module | Tensor) -> bool:
    """Whether a tensor, or any parameter of a module, is a mapped file."""
    return any(_span(tensor) for tensor in _parameters(what))


def release(what: nn.Module | Tensor) -> None:
    """Give the memory of mapped parameters back; the next use reads them from the file again."""
    page = mmap.PAGESIZE
    for mapping, first, last in _spans(what):
        # a page that only begins or ends here holds other tensors too
        first, last = -(-first // page) * page, last // page * page
        _advise(mapping, "MADV_DONTNEED", first, last)


def prefetch(what: nn.Module | Tensor) -> None:
    """Ask the system to read mapped parameters ahead; returns at once."""
    page = mmap.PAGESIZE
    for mapping, first, last in _spans(what):
        _advise(mapping, "MADV_WILLNEED", first // page * page, last)


def _advise(mapping: mmap.mmap, advice: str, first: int, last: int) -> None:
    if last > first and hasattr(mmap, advice) and hasattr(mapping, "madvise"):
        mapping.madvise(getattr(mmap, advice), first, last - first)


def _parameters(what: nn.Module | Tensor) -> Iterator[Tensor]:
    if isinstance(what, Tensor):
        yield what
    else:
        yield from what.parameters()


def _spans(what: nn.Module | Tensor) -> Iterator[tuple[mmap.mmap, int, int]]:
    for tensor in _parameters(what):
        span = _span(tensor)
        if span is not None:
            yield span


def _span(tensor: Tensor) -> tuple[mmap.mmap, int, int] | None:
    """Return the mapping that holds a tensor, and where in it the tensor begins and ends."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    start = tensor.untyped_storage().data_ptr()
    found = _MAPPINGS.get(start)
    mapping = found() if found else None
    if mapping is None:
        _MAPPINGS.pop(start, None)  # the memory may be anybody's by now
        return None
    first = tensor.data_ptr() - start
    length = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return mapping, first, first + length * tensor.element_size()


# ---- models


def build(config: Any, files: Sequence[Path]) -> tuple[Any, dict[str, Any]]:
    """Build the model of a dense or pruned config over the safetensors ``files``.

    Returns the model, in evaluation mode, and ``missing_keys`` and ``mismatched_keys`` as
    ``from_pretrained`` reports them: with either, the model is not complete.
    """
    model = _skeleton(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, Tensor] = {}
    for path in files:
        stored |= map_tensors(path)
    found = _renamed(stored, wanted)
    mismatched = [
        (name, tuple(t.shape), wanted[name])
        for name, t in found.items()
        if tuple(t.shape) != wanted[name]
    ]
    for name, _, _ in mismatched:
        del found[name]
    missing = set(wanted) - set(found) - {name for name, _, _ in mismatched}
    model.load_state_dict(found, strict=False, assign=True)
    if mismatched:
        missing -= set(model.all_tied_weights_keys)  # what they are tied to may be misshapen
    else:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    model.config.dtype = model.dtype
    return model.eval(), {"missing_keys": missing, "mismatched_keys": mismatched}


def _skeleton(config: Any) -> Any:
    """Build the model without its weights, but with the buffers that no file holds."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from edgeprune.nonuniform import class_for

    config = copy.deepcopy(config)
    config.dtype = torch.float32  # buffers such as Gemma's embedding scale are made in it
    with init_empty_weights(include_buffers=False):
        if config.is_heterogeneous:
            return class_for(config.model_type)(config)
        return AutoModelForCausalLM.from_config(config)


def _renamed(stored: dict[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what is wanted of the stored tensors, whose names may lack or have a prefix."""
    ways: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("language_model."),
        lambda name: name.replace("language_model.model.", "model."),
        lambda name: name.replace("model.language_model.", "model."),
    )
    found = ({way(name): t for name, t in stored.items() if way(name) in wanted} for way in ways)
    return max(found, key=len)


# ---- memory


def budget() -> int:
    """Bytes that a model's weights may take in memory here and now."""
    return int(machine.memory().available * BUDGET_SHARE)


def resident() -> int:
    """Bytes of memory that this process fills now, mapped files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Bytes of memory that this process has filled at most so far; 0 where Linux does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"]), 0)


def trim() -> None:
    """Have the C library give memory that was freed back to the system, where it can (glibc)."""
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    import ctypes

    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


# ---- running


@contextmanager
def visiting(
    module: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Give a module's parameters ready to compute with, and release them afterwards."""
    try:
        yield {name: p.detach().to(device, dtype) for name, p in module.named_parameters()}
    finally:
        release(module)


@contextmanager
def recorded_calls(
    layers: nn.ModuleList,
) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Let decoder layers record the hidden states and arguments they are called with, not compute."""
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def record(given: Tensor, **others: Any) -> Tensor:
        hidden.append(given)
        arguments.append(others)
        return given

    try:
        for layer in layers:
            layer.forward = record
        yield hidden, arguments
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class Start:
    """What a model does before its first decoder layer.

    Nothing is padded: what the layers are given beside hidden states depends on the shape of the token ids alone, and
    is made once for each.

    Args:
        model: a causal language model; mapped, or resident on the CPU.
        dtype: the type to compute in.
        device: the device to compute on.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._model, self._dtype, self._device = model.model, dtype, device
        self._arguments: dict[torch.Size, list[dict[str, Any]]] = {}

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input (batch, length, hidden size) and every layer's other arguments.

        ``ids`` are token ids, (batch, length).
        """
        with recorded_calls(self._model.layers) as (hidden, arguments):
            self._model(inputs_embeds=self._embedded(ids), use_cache=False)
        kept = self._arguments.setdefault(ids.shape, _moved(arguments, self._device))
        return hidden[0].to(self._device), kept

    def _embedded(self, ids: Tensor) -> Tensor:
        """Embed in the type to compute in, without converting the whole table."""
        table = self._model.embed_tokens
        used, place = torch.unique(ids.to(table.weight.device), return_inverse=True)
        rows = nn.functional.embedding(used, table.weight).to(self._dtype)
        release(table)
        few = copy.copy(table)
        few.padding_idx = None  # it may be beyond the few rows
        return functional_call(few, {"weight": rows}, (place,))


class Walk:
    """Runs a model layer by layer, so that no more than one decoder layer need be in memory.

    Args:
        model: a causal language model; mapped, or resident on the CPU.
        dtype: the type to compute in; weights of another are converted when they are visited.
        device: the device to compute on.
    """

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._start = Start(model, dtype, device)

    @torch.inference_mode()
    def hidden(
        self, batches: Sequence[Tensor], tick: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """Return the final norm's output (batch, length, hidden size) for each batch of token ids.

        ``tick`` is called once a layer and batch. All batches' hidden states are held at a time.
        """
        layers = self._model.model.layers
        started = [self._start(ids) for ids in batches]
        hidden = [first for first, _ in started]
        for i, layer in enumerate(layers):
            if i + 1 < len(layers):
                prefetch(layers[i + 1])
            with visiting(layer, self._dtype, self._device) as weights:
                for n, (_, arguments) in enumerate(started):
                    hidden[n] = _call(layer, weights, hidden[n], arguments[i])
                    tick()
        norm = self._model.model.norm
        with visiting(norm, self._dtype, self._device) as weights:
            return [_call(norm, weights, each, {}) for each in hidden]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of final hidden states; the head is converted piece by piece."""
        head = self._model.lm_head
        rows = max(1, _HEAD_PIECE // head.weight.shape[1])
        pieces = []
        for piece in head.weight.detach().split(rows):
            weight = piece.to(self._device, self._dtype)
            pieces.append(nn.functional.linear(hidden, weight))
            release(piece)
        logits = torch.cat(pieces, dim=-1)
        if head.bias is not None:
            logits += head.bias.to(self._device, self._dtype)
        return logits.float() / logits_divisor(self._model.config)


def _call(
    module: nn.Module, weights: dict[str, Tensor], hidden: Tensor, arguments: dict[str, Any]
) -> Tensor:
    out = functional_call(module, weights, (hidden,), arguments)
    return out[0] if isinstance(out, tuple) else out


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(each, device) for each in value)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value
