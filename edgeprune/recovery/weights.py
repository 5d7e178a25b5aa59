"""Weights in two forms: bfloat16 ones to compute with, float32 ones to train, and what the gradients go through."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Numbers whose squares are added up at one go.
PIECE = 2**18


class Replica:
    """All weights of a model on this process's device: trained where they require gradients, or frozen.

    ``masters`` are float32 parameters by name, each with a ``grad`` that is a part of one flat float32 buffer. Where
    the model computes in bfloat16 its own parameters are rounded copies of them, made once an update, and what a
    backward pass finds is added to the buffer at once: sums over micro batches are float32 in either case.

    Several processes hold the same weights and add their buffers up once an update, which is what DDP does, at the
    cost of one message however many micro batches there are.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        model.to(
            device
        )  # first: where the device is named otherwise ("cpu:0") it copies, gradients too
        frozen = [p for p in model.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._copies: list[Tensor] = []
        self.masters: dict[str, nn.Parameter] = {}
        self._flat = torch.zeros(sum(p.numel() for p in parameters.values()), device=device)
        self._hooks: list[Any] = []
        self._places: list[Tensor] = []
        self._filled = set[int]()
        places = self._flat.split([p.numel() for p in parameters.values()])
        for (name, parameter), place in zip(parameters.items(), places, strict=True):
            # copied, since a cut model shares what is whole with the dense one
            full = parameter.detach().to(device, torch.float32, copy=True)
            parameter.grad = None
            parameter.data = full.to(dtype)
            master = parameter
            if dtype != torch.float32:
                master = nn.Parameter(full)
                self._copies.append(parameter.data)
                into = partial(self._into, len(self._places))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(into))
                self._places.append(place.view(parameter.shape))
            master.grad = place.view(parameter.shape)
            self.masters[name] = master

    def zero(self) -> None:
        """Forget the gradients: the next ones are written over them."""
        self._filled.clear()
        if not self._hooks:
            self._flat.zero_()

    def _into(self, number: int, parameter: Tensor) -> None:
        """Add a parameter's gradient to its place in the buffer; the first of an update is copied, which is quicker."""
        assert parameter.grad is not None
        if number in self._filled:
            self._places[number].add_(parameter.grad)
        else:
            self._places[number].copy_(parameter.grad)
            self._filled.add(number)
        parameter.grad = None

    def finish(self, scale: float, clip: float, accelerator: Any) -> float:
        """Add up the gradients of all processes, multiply them by ``scale``, clip them; return their norm before."""
        for number, place in enumerate(self._places):
            if number not in self._filled:
                place.zero_()
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(self._flat)
        norm = float(squares(self._flat).sqrt()) * scale
        self._flat.mul_(scale * min(1.0, clip / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the model's own parameters."""
        if self._copies:
            torch._foreach_copy_(self._copies, list(self.masters.values()))

    def whole(self, tensor: Tensor) -> Tensor:
        """Return all of a master, or of a tensor laid out as one."""
        return tensor

    def part(self, _name: str, tensor: Tensor) -> Tensor:
        """Return what this process holds of a whole tensor, on its device."""
        return tensor.to(self._flat.device, copy=True)

    def release(self) -> None:
        """Let the model go: it keeps its present weights."""
        for hook in self._hooks:
            hook.remove()


class Shards:
    """Weights, gradients and moments spread over the processes: FSDP2 (torch's ``fully_shard``), a layer at a time.

    The model's own parameters are the float32 masters, of which each process holds a part; they are gathered in the
    compute type where they are used. Interface as ``Replica``.

    Args:
        objective: the module whose forward pass is all of the work, so that everything is gathered inside of it.
        model: the student in it.
        device: of this process.
        dtype: to compute in.
        processes: how many there are.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        processes: int,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        model.to(device)
        for parameter in model.parameters():
            parameter.data = parameter.detach().to(torch.float32, copy=True)
            parameter.requires_grad_(True)
            parameter.grad = None
        how: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (processes,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        }
        for layer in model.model.layers:
            fully_shard(layer, **how)
        # what a teacher was recorded to say stays in float16
        as_given = replace(how["mp_policy"], cast_forward_inputs=False)
        fully_shard(objective, **how | {"mp_policy": as_given})
        self._device, self._processes = device, processes
        self.masters: dict[str, nn.Parameter] = dict(model.named_parameters())

    def zero(self) -> None:
        """Forget the gradients."""
        for master in self.masters.values():
            master.grad = None

    def finish(self, scale: float, clip: float, _accelerator: Any) -> float:
        """Multiply the gradients by ``scale``, clip them; return their norm before."""
        scale *= self._processes  # fully_shard gives the mean over the processes
        gradients = [_local(m.grad) for m in self.masters.values() if m.grad is not None]
        total = torch.stack([squares(g) for g in gradients]).sum()
        torch.distributed.all_reduce(total)
        norm = float(total.sqrt()) * scale
        torch._foreach_mul_(gradients, scale * min(1.0, clip / (norm + 1e-6)))
        return norm

    def publish(self) -> None:
        """Nothing to do: the masters are rounded when they are gathered."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return all of a master, or of a tensor laid out as one; to be called by all processes."""
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return what this process holds of a whole tensor, on its device."""
        from torch.distributed.tensor import distribute_tensor

        like: Any = self.masters[name]
        return distribute_tensor(tensor.to(self._device), like.device_mesh, like.placements)

    def release(self) -> None:
        """Let the model go: its weights stay spread."""


def squares(tensor: Tensor) -> Tensor:
    """Return the sum of a contiguous tensor's squares, in float64 where the device has it.

    So clipping does not depend on how the numbers are spread over processes. Added up at one go in float32, 10^8 of
    them give a norm that is 2 % too low on CPUs.
    """
    exact = torch.float32 if tensor.device.type == "mps" else torch.float64
    pieces = (piece.to(exact) for piece in tensor.flatten().split(PIECE))
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local()
    return found
