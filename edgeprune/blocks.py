"""The calibration pass: one forward and backward through the decoder, a layer at a time.

Each layer runs as a block of its own: its input and output are kept, its weights are ordinary leaf tensors in the
compute type, and its weight gradients are handed to the caller once they are complete and then dropped. That is what
lets a model be walked that does not fit in memory as a whole.

Two orders give the same figures:

- *resident*: all layers forward and backward for one micro batch after the other; nothing is computed twice, and the
  gradients of all layers are held in float32.
- *recompute*: one layer after the other for all micro batches; only the layers' inputs are held, and each layer runs
  forward a second time before its backward.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgeprune import mapped
from edgeprune.families import logits_divisor

# Short sequences run faster through plain matrix products than through fused CPU attention kernels (1.5 x at 64).
EAGER_UP_TO = 256
# Rows of logits at a time: 256 x 49k bf16 values stay near the caches, and no full logits are ever held.
HEAD_ROWS = 256

Weights = dict[str, Tensor]


@dataclass
class Block:
    """A decoder layer without weights of its own (on the meta device) and the weights to run it with."""

    module: nn.Module
    weights: Weights

    def __call__(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run the layer: ``hidden`` (batch, length, hidden size) to the same shape."""
        out = functional_call(self.module, self.weights, (hidden,), arguments)
        return out[0] if isinstance(out, tuple) else out

    def backward(self, out: Tensor, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Weights]:
        """Return the gradients of ``hidden`` and of the weights that want one."""
        names = [name for name, w in self.weights.items() if w.requires_grad]
        wanted = [hidden, *(self.weights[name] for name in names)]
        first, *rest = torch.autograd.grad(out, wanted, gradient)
        return first, dict(zip(names, rest, strict=True))


class Waiting:
    """A stack of lists of tensors, in memory up to ``hold`` bytes (None: all) and beyond that in a temporary file."""

    def __init__(self, hold: int | None) -> None:
        self._room = hold
        self._stack: list[list[Tensor] | list[tuple[int, torch.Size, torch.dtype]]] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def push(self, tensors: list[Tensor]) -> None:
        """Put a list on top. The tensors must not change afterwards."""
        size = sum(t.nbytes for t in tensors)
        if self._room is None or size <= self._room:
            if self._room is not None:
                self._room -= size
            self._stack.append(list(tensors))
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        places = []
        for tensor in tensors:
            places.append((self._file.seek(0, 2), tensor.shape, tensor.dtype))
            self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self._stack.append(places)

    def pop(self) -> list[Tensor]:
        """Take the list on top."""
        return [t if isinstance(t, Tensor) else self._read(*t) for t in self._stack.pop()]

    def _read(self, place: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        assert self._file is not None
        self._file.seek(place)
        size = shape.numel() * dtype.itemsize
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype).view(shape)


class Layers(Protocol):
    """Where the pass gets its blocks from."""

    def __len__(self) -> int: ...

    def block(self, index: int) -> Block:
        """Return layer ``index`` ready to run."""
        ...


class Watcher(Protocol):
    """What the pass reports to. All methods are called once a layer and micro batch, or once a layer."""

    def boundary(self, index: int, before: Tensor, after: Tensor) -> None:
        """Input and output of layer ``index``, (batch, length, hidden size)."""
        ...

    def gradients(self, index: int, block: Block, gradients: Weights) -> None:
        """Gradients of layer ``index`` summed over all micro batches, float32."""
        ...


class Ends:
    """What lies before and after the decoder layers: embeddings, masks and positions; final norm, head and loss."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device
        self.norm = {
            name: p.detach().to(device, dtype) for name, p in model.model.norm.named_parameters()
        }
        self.head = model.lm_head.weight.detach().to(device, dtype)
        self.head_bias = _moved(model.lm_head.bias, device, dtype)
        self.divisor = logits_divisor(model.config)

    def start(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input and each layer's other arguments, as the model itself makes them.

        Args:
            tokens: token ids, (batch, length).
        """
        layers = self.model.model.layers
        with torch.no_grad(), mapped.recorded_calls(layers) as (first, recorded):
            self.model.model(input_ids=tokens.to(self.model.device), use_cache=False)
        return self._moved(first[0]), [self._moved(arguments) for arguments in recorded]

    def loss(self, hidden: Tensor, tokens: Tensor) -> tuple[float, Tensor]:
        """Return the summed next-token loss of a micro batch and its gradient by ``hidden``."""
        hidden = hidden.detach().requires_grad_()
        normed = functional_call(self.model.model.norm, self.norm, (hidden,))
        inputs = normed[:, :-1].flatten(0, 1).detach()
        targets = tokens[:, 1:].flatten().to(self.device)
        gradient = torch.zeros_like(normed)
        rows = torch.empty_like(inputs)
        total = 0.0
        for start in range(0, len(inputs), HEAD_ROWS):
            piece = slice(start, start + HEAD_ROWS)
            loss, rows[piece] = self._head(inputs[piece], targets[piece])
            total += loss
        gradient[:, :-1] = rows.view(gradient[:, :-1].shape)
        (result,) = torch.autograd.grad(normed, hidden, gradient)
        return total, result

    @torch.no_grad()
    def _head(self, inputs: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        logits = nn.functional.linear(inputs, self.head, self.head_bias)
        if self.divisor != 1.0:
            logits /= self.divisor
        probability = torch.softmax(logits, dim=-1)
        at = torch.arange(len(targets), device=targets.device)
        own = probability[at, targets].float()
        probability[at, targets] = (own - 1).to(probability.dtype)
        loss = -own.clamp_min(torch.finfo(torch.float32).tiny).log().sum()
        return float(loss), probability @ self.head / self.divisor

    def release(self) -> None:
        """Give the memory of a mapped head and embedding back."""
        mapped.release(self.model.lm_head)
        mapped.release(self.model.model.embed_tokens)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.to(self.device)
            return value.to(self.dtype) if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(self._moved(v) for v in value)
        return {k: self._moved(v) for k, v in value.items()} if isinstance(value, dict) else value


def _moved(value: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.detach().to(device, dtype)


@dataclass
class Pass:
    """The calibration pass over one set of equally long sequences.

    Args:
        layers: the decoder layers.
        ends: what lies before and after them.
        micro_batch: sequences at a time.
        recompute: walk layer by layer instead of micro batch by micro batch (see the module's text).
        hold: bytes of layer inputs to hold in memory when recomputing; what is beyond waits in a file.
    """

    layers: Layers
    ends: Ends
    micro_batch: int
    recompute: bool = False
    hold: int | None = None
    _sums: dict[int, Weights] = field(default_factory=dict)

    def run(
        self, tokens: Tensor, watcher: Watcher, tick: Callable[[int], None] = lambda _done: None
    ) -> float:
        """Run over ``tokens`` (sequences, length) and return the mean next-token loss (nats).

        ``tick`` is told how many of the ``2 * layers * micro batches`` steps are done.
        """
        self._done, self._tick, self._scale = 0, tick, tokens[:, 1:].numel()
        batches = list(tokens.split(self.micro_batch))
        order = self._layer_by_layer if self.recompute else self._batch_by_batch
        return order(batches, watcher) / self._scale

    def _batch_by_batch(self, batches: list[Tensor], watcher: Watcher) -> float:
        self._sums = {}
        total = 0.0
        for number, tokens in enumerate(batches, start=1):
            hidden, arguments = self.ends.start(tokens)
            trail: list[tuple[Tensor, Tensor]] = []
            for i in range(len(self.layers)):
                hidden = hidden.detach().requires_grad_()
                out = self.layers.block(i)(hidden, arguments[i])
                watcher.boundary(i, hidden.detach(), out.detach())
                trail.append((hidden, out))
                hidden = out
                self._step()
            loss, gradient = self.ends.loss(hidden, tokens)
            total += loss
            for i in reversed(range(len(self.layers))):
                before, out = trail.pop()
                gradient = self._back(i, before, out, gradient)
                if number == len(batches):
                    watcher.gradients(i, self.layers.block(i), self._finish(i))
        return total

    def _layer_by_layer(self, batches: list[Tensor], watcher: Watcher) -> float:
        self._sums = {}
        started = [self.ends.start(tokens) for tokens in batches]
        arguments = [a for _, a in started]
        hidden = [h for h, _ in started]
        del started
        with Waiting(self.hold) as inputs, torch.no_grad():
            for i in range(len(self.layers)):
                inputs.push(hidden)
                block = self.layers.block(i)
                for n, before in enumerate(hidden):
                    after = block(before, arguments[n][i])
                    watcher.boundary(i, before, after)
                    hidden[n] = after
                    self._step()
            total = 0.0
            with torch.enable_grad():
                for n, tokens in enumerate(batches):
                    loss, hidden[n] = self.ends.loss(hidden[n], tokens)
                    total += loss
                self.ends.release()
                self._layers_back(hidden, inputs, arguments, watcher)
        return total

    def _layers_back(
        self,
        gradients: list[Tensor],
        inputs: Waiting,
        arguments: list[list[dict[str, Any]]],
        watcher: Watcher,
    ) -> None:
        for i in reversed(range(len(self.layers))):
            for n, hidden in enumerate(inputs.pop()):
                before = hidden.detach().requires_grad_()
                out = self.layers.block(i)(before, arguments[n][i])
                gradients[n] = self._back(i, before, out, gradients[n])
            watcher.gradients(i, self.layers.block(i), self._finish(i))

    def _back(self, index: int, before: Tensor, out: Tensor, gradient: Tensor) -> Tensor:
        result, found = self.layers.block(index).backward(out, before, gradient)
        sums = self._sums.get(index)
        if sums is None:
            self._sums[index] = {name: g.float() for name, g in found.items()}
        else:
            for name, g in found.items():
                sums[name] += g
        self._step()
        return result

    def _finish(self, index: int) -> Weights:
        """Gradients of the mean loss; the loss was summed, which keeps bf16 gradients far from underflow."""
        return {name: g.div_(self._scale) for name, g in self._sums.pop(index).items()}

    def _step(self) -> None:
        self._done += 1
        self._tick(self._done)
