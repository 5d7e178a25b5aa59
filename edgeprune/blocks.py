"""The calibration pass: one forward and backward through the decoder, a layer at a time.

Each layer runs as a block of its own: its input and output are kept, its weights are ordinary leaf tensors in the
compute type, and its weight gradients are handed to the caller once they are complete and then dropped. All micro
batches go through one layer before any goes through the next: only the layers' inputs are held, and each layer runs
forward a second time before its backward. That is what lets a model be walked that does not fit in memory as a whole,
and what lets the pass go on after any layer (``waiting``). The other order, all layers for one micro batch after the
other, takes 30 % less time and 2.5 times the memory of the weights and gradients (``benchmarks/RESULTS.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgeprune import mapped
from edgeprune.families import logits_divisor
from edgeprune.waiting import Mark, Waiting

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


class Layers(Protocol):
    """Where the pass gets its blocks from."""

    def __len__(self) -> int: ...

    def block(self, index: int) -> Block:
        """Return layer ``index`` ready to run."""
        ...


class Watcher(Protocol):
    """What the pass reports to. ``boundary`` and ``listening`` are called once a layer and micro batch."""

    def boundary(self, index: int, before: Tensor, after: Tensor) -> None:
        """Input and output of layer ``index``, (batch, length, hidden size)."""
        ...

    def listening(self, index: int, block: Block) -> AbstractContextManager[None]:
        """Held while layer ``index`` runs forward with gradients."""
        ...

    def gradients(self, index: int, block: Block, gradients: Weights) -> None:
        """Gradients of layer ``index`` summed over all micro batches, float32; theirs to overwrite."""
        ...

    def figures(self) -> Weights:
        """All that was found so far."""
        ...

    def restore(self, figures: Weights) -> None:
        """Go on from what ``figures`` gave."""
        ...


class Ends:
    """What lies before and after the decoder layers: embeddings, masks and positions; final norm, head and loss."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device
        self._begin = mapped.Start(model, dtype, device)
        self.norm = {
            name: p.detach().to(device, dtype) for name, p in model.model.norm.named_parameters()
        }
        bias = model.lm_head.bias
        self.head_bias = None if bias is None else _moved(bias, device, dtype)
        self.divisor = logits_divisor(model.config)

    @torch.no_grad()
    def start(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input and each layer's other arguments (``mapped.Start``).

        Args:
            tokens: token ids, (batch, length).
        """
        return self._begin(tokens)

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

    @cached_property
    def head(self) -> Tensor:
        """The head's weight to compute with, (vocabulary, hidden size)."""
        return _moved(self.model.lm_head.weight, self.device, self.dtype)

    def release(self) -> None:
        """Give the memory of the head back until it is asked for again."""
        self.__dict__.pop("head", None)
        mapped.release(self.model.lm_head)


def _moved(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.detach().to(device, dtype)


@dataclass
class Pass:
    """The calibration pass over one set of equally long sequences.

    Args:
        layers: the decoder layers.
        ends: what lies before and after them.
        micro_batch: sequences at a time.
    """

    layers: Layers
    ends: Ends
    micro_batch: int

    def run(
        self,
        tokens: Tensor,
        watcher: Watcher,
        tick: Callable[[int], None] = lambda _done: None,
        waiting: Waiting | None = None,
    ) -> float:
        """Run over ``tokens`` (sequences, length) and return the mean next-token loss (nats).

        ``tick`` is told how many of the ``2 * layers * micro batches`` steps are done. The layers' inputs are held in
        ``waiting``, by default in memory, and the pass goes on from where that stands.
        """
        self._done, self._tick, self._scale = 0, tick, tokens[:, 1:].numel()
        batches = list(tokens.split(self.micro_batch))
        return self._there_and_back(batches, watcher, waiting or Waiting()) / self._scale

    def _there_and_back(self, batches: list[Tensor], watcher: Watcher, waiting: Waiting) -> float:
        layers = len(self.layers)
        started = [self.ends.start(tokens) for tokens in batches]
        arguments = [a for _, a in started]
        mark = waiting.resume() or Mark(0, [h for h, _ in started])
        del started
        mark.streams = [each.to(self.ends.device) for each in mark.streams]
        if mark.done:
            watcher.restore(mark.figures)
            self._done = mark.done * len(batches)
        for i in range(mark.done, layers):
            waiting.push(mark.streams)
            self._layer_forward(i, mark.streams, arguments, watcher)
            self._stand(mark, watcher, waiting)
        if mark.done == layers:
            for n, tokens in enumerate(batches):
                loss, mark.streams[n] = self.ends.loss(mark.streams[n], tokens)
                mark.loss += loss
            self.ends.release()
        for i in reversed(range(2 * layers - mark.done)):
            self._layer_back(i, mark.streams, waiting.pop(), arguments, watcher)
            self._stand(mark, watcher, waiting)
        return mark.loss

    @torch.no_grad()
    def _layer_forward(
        self,
        index: int,
        streams: list[Tensor],
        arguments: list[list[dict[str, Any]]],
        watcher: Watcher,
    ) -> None:
        block = self.layers.block(index)
        for n, before in enumerate(streams):
            streams[n] = block(before, arguments[n][index])
            watcher.boundary(index, before, streams[n])
            self._step()

    def _layer_back(
        self,
        index: int,
        gradients: list[Tensor],
        inputs: list[Tensor],
        arguments: list[list[dict[str, Any]]],
        watcher: Watcher,
    ) -> None:
        block = self.layers.block(index)
        sums: Weights = {}
        for n, hidden in enumerate(inputs):
            before = hidden.to(self.ends.device).detach().requires_grad_()
            with watcher.listening(index, block):
                out = block(before, arguments[n][index])
            gradients[n], found = block.backward(out, before, gradients[n])
            _add(sums, found)
            self._step()
        # of the mean loss; the loss was summed, which keeps bf16 gradients far from underflow
        watcher.gradients(index, block, {name: g.div_(self._scale) for name, g in sums.items()})

    @staticmethod
    def _stand(mark: Mark, watcher: Watcher, waiting: Waiting) -> None:
        """One layer more is done."""
        mark.done += 1
        if waiting.due():
            mark.figures = watcher.figures()
            waiting.keep(mark)

    def _step(self) -> None:
        self._done += 1
        self._tick(self._done)


def _add(sums: Weights, found: Weights) -> None:
    """Sum in float32."""
    for name, gradient in found.items():
        if name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient.float()
