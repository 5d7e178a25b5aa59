"""AdamW over a model's float32 weights, its moments in float32 or in 8 bits, found by the names of the weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import BadInput
from edgeprune.recovery.settings import Training
from edgeprune.recovery.weights import Replica, Shards

Moments = dict[str, tuple[Tensor, Tensor]]
# Values that share a scale in bitsandbytes' 8 bits.
BLOCK = 256


class AdamW:
    """torch's, with moments of 8 bytes a weight.

    Args:
        weights: what it trains.
        settings: ``betas``, ``weight_decay`` of matrices; the learning rate is given to each step.
    """

    first, second = "exp_avg", "exp_avg_sq"

    def __init__(self, weights: Replica | Shards, settings: Training) -> None:
        self._weights = weights
        matrices = [m for m in weights.masters.values() if m.ndim > 1]
        vectors = [m for m in weights.masters.values() if m.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = self._made([group for group in groups if group["params"]], settings)

    def _made(self, groups: list[dict[str, Any]], settings: Training) -> Any:
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, fused=True
        )

    def step(self, rate: float) -> None:
        """Make an update with the masters' gradients at the learning rate ``rate``."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def moments(self) -> Moments:
        """Return the first and second moments by the names of the weights, float32; empty before the first update."""
        found = {}
        for name, master in self._weights.masters.items():
            state = self._optimizer.state.get(master)
            if state:
                found[name] = (self._moment(state, 0), self._moment(state, 1))
        return found

    def _moment(self, state: dict[str, Any], which: int) -> Tensor:
        return self._weights.whole(state[(self.first, self.second)[which]])

    def set_moments(self, moments: Moments, updates: int) -> None:
        """Take over the moments after ``updates`` updates; the other weights' start from nothing."""
        for name, both in moments.items():
            parts = (self._weights.part(name, each) for each in both)
            self._set(name, dict(zip((self.first, self.second), parts, strict=True)), updates)

    def _set(self, name: str, tensors: dict[str, Tensor], updates: int) -> None:
        step = torch.tensor(float(updates), device=next(iter(tensors.values())).device)
        self._optimizer.state[self._weights.masters[name]] = {"step": step, **tensors}

    def state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Give what a checkpoint holds of a weight's moments, as this process has it."""
        state = self._optimizer.state.get(self._weights.masters[name], {})
        for key in (self.first, self.second) if state else ():
            yield key, state[key]

    def set_state(self, name: str, read: Callable[[str], Tensor], updates: int) -> None:
        """Take over a weight's moments from a checkpoint; ``read`` gives what ``state`` gave, by its key."""
        self.set_moments({name: (read(self.first), read(self.second))}, updates)


class AdamW8bit(AdamW):
    """bitsandbytes', with moments of 2 bytes a weight (Dettmers et al., arXiv 2110.02861).

    Small tensors keep theirs in float32. Not for weights that are spread over processes.

    Raises:
        BadInput: bitsandbytes is not installed, or the weights are spread.
    """

    first, second = "state1", "state2"
    _scales = ("absmax1", "absmax2")

    def _made(self, groups: list[dict[str, Any]], settings: Training) -> Any:
        check_8bit(sharded=isinstance(self._weights, Shards))
        from bitsandbytes.optim import AdamW8bit as Optimizer

        made = Optimizer(groups, lr=settings.learning_rate, betas=settings.betas)
        made.check_overrides()
        made.initialized = True  # so that a state that is set is not taken for another device's
        return made

    def _moment(self, state: dict[str, Any], which: int) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        codes: Tensor = state[(self.first, self.second)[which]]
        if codes.dtype != torch.uint8:
            return codes
        scale, table = state[self._scales[which]], state[f"qmap{which + 1}"]
        found: Tensor = dequantize_blockwise(codes, absmax=scale, code=table, blocksize=BLOCK)
        return found

    def set_moments(self, moments: Moments, updates: int) -> None:
        """Take over the moments after ``updates`` updates; the other weights' start from nothing."""
        from bitsandbytes.functional import quantize_blockwise

        for name, both in moments.items():
            state = self._begun(name, updates)
            for which, moment in enumerate(both):
                codes = state[(self.first, self.second)[which]]
                if codes.dtype != torch.uint8:
                    codes.copy_(moment)
                    continue
                table, scale = state[f"qmap{which + 1}"], state[self._scales[which]]
                moment = moment.to(codes.device, torch.float32).contiguous()
                found, how = quantize_blockwise(moment, code=table, blocksize=BLOCK)
                codes.copy_(found)
                scale.copy_(how.absmax)

    def _begun(self, name: str, updates: int) -> dict[str, Any]:
        """Return a weight's state after ``updates`` updates, its moments still nothing."""
        master = self._weights.masters[name]
        for number, group in enumerate(self._optimizer.param_groups):
            for place, each in enumerate(group["params"]):
                if each is master:
                    self._optimizer.init_state(group, master, number, place)
        state: dict[str, Any] = self._optimizer.state[master]
        state["step"] = updates
        return state

    def state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Give what a checkpoint holds of a weight's moments: the codes as they are, not rounded twice."""
        state = self._optimizer.state.get(self._weights.masters[name], {})
        for key in (self.first, self.second, *self._scales):
            if key in state:
                yield key, state[key]

    def set_state(self, name: str, read: Callable[[str], Tensor], updates: int) -> None:
        """Take over a weight's moments from a checkpoint; ``read`` gives what ``state`` gave, by its key."""
        state = self._begun(name, updates)
        for key in (self.first, self.second, *self._scales):
            if key in state:
                state[key].copy_(read(key))


def check_8bit(sharded: bool) -> None:
    """Raise BadInput where moments cannot be kept in 8 bits."""
    if sharded:
        raise BadInput(
            "adamw-8bit needs all weights in each process; use adamw with FSDP, or processes without FSDP"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(
            "adamw-8bit needs bitsandbytes: pip install 'edgeprune[8bit]', or leave out the optimizer option"
        )


OPTIMIZERS: dict[str, type[AdamW]] = {"adamw": AdamW, "adamw-8bit": AdamW8bit}
