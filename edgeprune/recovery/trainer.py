"""Training that recovers a pruned model: one schedule over all stages, resumable to the bit.

The trainer is a loop over updates and knows neither where the data comes from nor how the model was cut. A caller
that prunes between stages trains up to a step, cuts, hands over the smaller model and goes on.

Launched by ``accelerate launch`` or ``torchrun``, the processes share each batch; there is no other code for that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune import machine
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Evaluation, Note, TrainStep, ignore
from edgeprune.recovery import checkpoints, kernels, lora, memory
from edgeprune.recovery.loss import IGNORED
from edgeprune.recovery.objective import Objective, check_vocabularies, head_of, without_dropout
from edgeprune.recovery.optimizer import OPTIMIZERS, Moments, check_8bit
from edgeprune.recovery.packing import Batch, Packed
from edgeprune.recovery.peak import matmul_peak
from edgeprune.recovery.settings import Training
from edgeprune.recovery.teacher_cache import Taught
from edgeprune.recovery.weights import Replica, Shards

# A loss this far above its own course, in nats, this many updates in a row, is not coming back by itself.
EXPLODED, EXPLODED_STEPS = 2.0, 3
LONGEST_WAIT = timedelta(days=2)
# How much of the course is the past.
COURSE = 0.9


class Trainer:
    """A training in progress.

    Args:
        model: a causal language model of transformers, uniform or not. It is trained in place: moved to the device
            and, where that computes in bfloat16, its parameters become bfloat16; ``weights`` has the float32 ones.
            With LoRA it is given adapters, and keeps them.
        settings: how to train.
        data: what to train on; gone through in a new order each time. For ``settings.teacher_top_k`` above 0 it is
            ``Taught``.
        teacher: the dense model, for ``settings.distill`` above 0 without ``teacher_top_k``; it is moved to the device
            in the compute type.
        held_out: what to measure the loss on.
        folder: where checkpoints are kept; none are written without it.
        minutes: between two checkpoints.
        emit: hears ``TrainStep`` and ``Evaluation``, in the main process only.
        accelerator: of Hugging Face accelerate; by default one that follows how the process was launched.
        sharded: spread weights, gradients and moments over the processes (FSDP2) instead of having all of them
            in each; by default as ``accelerate`` was configured.
        force: train even though the memory seems too small.

    Attributes:
        step: updates made so far, over all stages.
        micro_batch: sequences that go through the model at once in a process.
        notes: plain JSON values of the caller's, kept in each checkpoint (which stage it is of, how the model is cut).

    Raises:
        BadInput: the settings contradict each other, the data or the machine's memory; nothing was changed.
    """

    def __init__(
        self,
        model: Any,
        settings: Training,
        data: Packed,
        *,
        teacher: Any = None,
        held_out: Packed | None = None,
        folder: Path | None = None,
        minutes: float = 10.0,
        emit: Emit = ignore,
        accelerator: Any = None,
        sharded: bool | None = None,
        force: bool = False,
    ) -> None:
        settings.check()
        self.settings, self.schedule = settings, settings.schedule
        self.step, self.notes = 0, dict[str, Any]()
        self._data, self._held_out, self._folder = data, held_out, folder
        self._accelerator = accelerator or launched()
        self._device = self._accelerator.device
        self._dtype = machine.compute_dtype(self._device)
        self._emit = emit if self._accelerator.is_main_process else ignore
        self._sharded = is_fsdp(self._accelerator) if sharded is None else sharded
        if not settings.distill or settings.teacher_top_k:
            teacher = None
        self._check(model, teacher)
        self.micro_batch = memory.fitting_micro_batch(
            model.config,
            settings,
            teacher.config if teacher is not None else None,
            self._device,
            self._dtype,
            self._processes,
            loaded=_bytes_on_cpu(model, teacher) if self._device.type == "cpu" else 0,
            shards=self._processes if self._sharded else 1,
            force=force,
            emit=self._emit,
        )
        self._teacher = None if teacher is None else _frozen(teacher, self._device, self._dtype)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._minutes, self._saved, self._asked = minutes, time.monotonic(), False
        self._start(model)

    def _check(self, model: Any, teacher: Any) -> None:
        settings = self.settings
        head_of(model)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and settings.length > longest:
            raise BadInput(f"length is {settings.length}; this model takes at most {longest}")
        for data in (self._data, self._held_out):
            if data is None:
                continue
            if not len(data):
                raise BadInput(
                    "there is not one sequence to train or to measure on; give more text"
                )
            if data.length != settings.length:
                raise BadInput(
                    f"the data is packed to {data.length} tokens and length is {settings.length}; make them the same"
                )
        if self._sharded and settings.lora_rank:
            raise BadInput("LoRA needs all weights in each process; use it without FSDP")
        if settings.optimizer == "adamw-8bit":
            check_8bit(self._sharded)
        if settings.batch % self._processes:
            raise BadInput(
                f"a batch of {settings.batch} cannot be shared by {self._processes} processes; "
                f"choose a multiple of {self._processes}"
            )
        if settings.teacher_top_k:
            _check_recorded(self._data, settings, model)
        elif settings.distill and teacher is None:
            raise BadInput(
                "distill is above 0 and there is no teacher; give the dense model, or distill = 0"
            )
        if teacher is not None:
            check_vocabularies(len(teacher.lm_head.weight), len(model.lm_head.weight))

    def _start(self, model: Any, moments: Moments | None = None, updates: int = 0) -> None:
        """Take a model and, where it is a later stage of another, AdamW's moments after so many updates."""
        settings = self.settings
        self.model = model
        without_dropout(model)
        if settings.lora_rank:
            lora.adapt(model, settings.lora_rank, settings.seed)
        else:
            model.requires_grad_(True)
        model.train()  # transformers recomputes activations in this mode alone
        if settings.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self._objective = Objective(model, self._teacher, settings.distill, settings.temperature)
        self._weights: Replica | Shards = (
            Shards(self._objective, model, self._device, self._dtype, self._processes)
            if self._sharded
            else Replica(model, self._device, self._dtype)
        )
        self._optimizer = OPTIMIZERS[settings.optimizer](self._weights, settings)
        self._course: float | None = None
        self._above = 0
        self._pace: float | None = None
        if moments is not None:
            self._optimizer.set_moments(moments, updates)

    @property
    def _processes(self) -> int:
        return int(self._accelerator.num_processes)

    # ---- training

    def run(self, until: int | None = None) -> None:
        """Train up to global step ``until``, by default to the end, and leave a checkpoint there.

        Raises:
            EdgepruneError: the loss is not a number or explodes, or the disk is full; says what to go on from.
        """
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        with self._fused():
            while self.step < until:
                due = self._train_step()
                if self._is_time_to_evaluate():
                    self.evaluate()
                if self._folder is not None and (due or self.step == until):
                    self.save(self._folder)

    @contextmanager
    def _fused(self) -> Iterator[None]:
        how = (self.settings.length, self._dtype)
        compiled = self._flops() * self.settings.tokens >= kernels.WORTH_COMPILING
        with ExitStack() as stack:
            stack.enter_context(kernels.fused(self.model, *how, compiled=compiled))
            if self._teacher is not None:
                stack.enter_context(
                    kernels.fused(self._teacher, *how, compiled=compiled, attention=False)
                )
            yield

    def _is_time_to_evaluate(self) -> bool:
        if self._held_out is None:
            return False
        done, of, steps = self.step, self.settings.evaluations, self.settings.steps
        return done * of // steps > (done - 1) * of // steps

    def _train_step(self) -> bool:
        """Make one update; return whether it is time for a checkpoint."""
        started = time.perf_counter()
        batch = self._data.batch(self._rows())
        labelled, due = self._sum(float((batch.labels != IGNORED).sum()), float(self._is_due()))
        if not labelled:
            raise EdgepruneError(
                f"no token of the batch of step {self.step + 1} has a next one; check the packing of the data"
            )
        self._weights.zero()
        found = torch.zeros(3, device=self._device)
        for piece in self._pieces(batch):
            loss, parts = self._objective(piece)
            loss.backward()
            found += torch.cat((loss.detach().reshape(1), parts))
        loss, lm_loss, kl = (each / labelled for each in self._sum(*found.tolist()))
        norm = self._weights.finish(1 / labelled, self.settings.clip, self._accelerator)
        self._watch(loss, norm)
        rate = self.schedule.rate(self.step)
        self._optimizer.step(rate)
        self._weights.publish()
        self.step += 1
        self._tell(loss, lm_loss, kl, rate, norm, time.perf_counter() - started)
        return due > 0 and self._above == 0

    def _rows(self) -> list[int]:
        """Return the numbers of this process's sequences of the next batch."""
        size = self.settings.batch
        first = self.step * size + self._accelerator.process_index
        return [self._row(n) for n in range(first, (self.step + 1) * size, self._processes)]

    def _row(self, number: int) -> int:
        """Return which sequence is the ``number``-th to be trained on."""
        epoch, place = divmod(number, len(self._data))
        if self._order[0] != epoch:
            chance = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self._data), generator=chance))
        return int(self._order[1][place])

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        given = (getattr(batch, f.name) for f in fields(Batch))
        split = zip(*(t.split(self.micro_batch) for t in given if t is not None), strict=True)
        for piece in split:
            yield Batch(*(t.to(self._device, non_blocking=True) for t in piece))

    def _sum(self, *values: float) -> list[float]:
        """Add each value up over all processes."""
        if self._processes == 1:
            return list(values)
        both = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(both)
        found: list[float] = both.tolist()
        return found

    def _watch(self, loss: float, norm: float) -> None:
        """Raise EdgepruneError where the update to come would spoil the weights, or the last few have."""
        if not math.isfinite(loss + norm):
            what = "loss" if not math.isfinite(loss) else "norm of the gradients"
            raise self._stopped(f"the {what} is not a number")
        course = loss if self._course is None else self._course
        self._above = self._above + 1 if loss > course + EXPLODED else 0
        if self._above == EXPLODED_STEPS:
            raise self._stopped(f"the loss exploded from {course:.3g} to {loss:.3g}")
        if not self._above:
            self._course = COURSE * course + (1 - COURSE) * loss

    def _stopped(self, why: str) -> EdgepruneError:
        return EdgepruneError(
            f"step {self.step + 1}: {why}; {checkpoints.way_back(self._folder)}, with a learning rate below "
            f"{self.settings.learning_rate:g}"
        )

    def _tell(
        self, loss: float, lm_loss: float, kl: float, rate: float, norm: float, seconds: float
    ) -> None:
        settings = self.settings
        each = settings.batch * settings.length
        # the first step is slower than all others
        self._pace = (
            seconds if self._pace is None or self.step <= 2 else 0.8 * self._pace + 0.2 * seconds
        )
        if self._emit is ignore:
            return
        peak = matmul_peak(str(self._device), self._dtype) * self._processes
        self._emit(
            TrainStep(
                step=self.step,
                of=settings.steps,
                loss=loss,
                lm_loss=lm_loss,
                kl=kl if settings.distill else None,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=self.step * each,
                tokens_per_second=each / seconds,
                peak_share=self._flops() * each / seconds / peak,
                seconds_left=self._pace * (settings.steps - self.step),
            )
        )

    def _flops(self) -> int:
        """Floating-point operations of the matrix products that a token takes: frozen weights have no gradients."""
        trained = sum(m.numel() for m in self._weights.masters.values())
        in_all = sum(p.numel() for p in self.model.parameters())
        taught = sum(p.numel() for p in self._teacher.parameters()) if self._teacher else 0
        return 4 * in_all + 2 * trained + 2 * taught

    # ---- measuring

    def evaluate_at(self, step: int) -> None:
        """Measure the held-out loss, where there is text for it, if so many updates are made."""
        if self.step == step and self._held_out is not None:
            self.evaluate()

    def evaluate(self) -> float:
        """Return the held-out loss in nats a token. BadInput if there is no held-out text."""
        data = self._held_out
        if data is None:
            raise BadInput("there is no held-out text to measure the loss on; give one")
        total, tokens = 0.0, 0
        share = -(
            -len(data) // self._processes
        )  # the same for all: sharded weights are gathered together
        mine = range(self._accelerator.process_index, share * self._processes, self._processes)
        for start in range(0, share, self.micro_batch):
            rows = mine[start : start + self.micro_batch]
            batch = data.batch([row % len(data) for row in rows])
            labels = batch.labels.clone()
            labels[[row >= len(data) for row in rows]] = IGNORED
            for piece in self._pieces(
                Batch(batch.input_ids, labels, batch.positions, batch.documents)
            ):
                with torch.no_grad():
                    loss, _ = self._objective(piece, measure=True)
                total += float(loss)
            tokens += int((labels != IGNORED).sum())
        total, counted = self._sum(total, float(tokens))
        loss = total / max(1.0, counted)
        perplexity = math.exp(min(loss, 700.0))
        self._emit(
            Evaluation(step=self.step, loss=loss, perplexity=perplexity, tokens=int(counted))
        )
        return loss

    # ---- weights and moments, for whoever cuts the model

    def weights(self) -> dict[str, Tensor]:
        """Return the float32 weights by their names in the model, whole, not copied where they are at hand."""
        return dict(self.each_weight())

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """Give them one after the other; all processes must ask for all of them.

        With LoRA the additions are added, and what was not trained is in the type that is computed in.
        """
        masters = self._weights.masters
        if self.settings.lora_rank:
            return lora.merged(self.model, masters)
        return ((n, self._weights.whole(m.detach())) for n, m in masters.items())

    def moments(self) -> Moments:
        """Return AdamW's first and second moments by the names of the weights; empty before the first update."""
        return self._optimizer.moments()

    def replace_model(self, model: Any, carry: Callable[[str, Tensor], Tensor] | None) -> None:
        """Go on with a smaller model: same step, same schedule, its AdamW moments cut from this one's.

        Args:
            model: the cut model; build it from ``weights``, so that it has their precision.
            carry: gives what a weight of this name keeps of a tensor that is shaped like the old one. It is asked for
                the names that the new model still has. None: the moments begin anew.
        """
        names = {name for name, _ in model.named_parameters()}
        moments: Moments | None = None
        if carry is not None:
            moments = {
                name: (carry(name, first), carry(name, second))
                for name, (first, second) in self.moments().items()
                if name in names
            }
        self._weights.release()
        self._start(model, moments, self.step)

    # ---- checkpoints

    def ask_for_checkpoint(self) -> None:
        """Have a checkpoint written after the present step; may be called from another thread or a signal."""
        self._asked = True

    def _is_due(self) -> bool:
        """Only the main process's clock counts, or the processes would not agree."""
        if not self._accelerator.is_main_process:
            return False
        return self._asked or time.monotonic() - self._saved >= 60 * self._minutes

    def save(self, folder: Path) -> None:
        """Write a checkpoint into ``folder`` and remove all but the last two.

        Raises:
            EdgepruneError: it cannot be written; says which checkpoint there still is.
        """
        main = self._accelerator.is_main_process
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._state():
            whole = self._weights.whole(tensor.detach())  # of all processes, one tensor at a time
            if main:
                tensors[name] = whole.cpu().contiguous()
            del whole
        failed: EdgepruneError | None = None
        if main:
            tensors |= {f"random.{name}": state for name, state in _random_states().items()}
            about = {
                "settings": self.settings.what(),
                "sequences": len(self._data),
                "course": self._course,
                "notes": self.notes,
            }
            try:
                checkpoints.write(folder, self.step, tensors, about)
            except EdgepruneError as error:
                failed = error
        if sum(self._sum(float(failed is not None))):
            raise failed or EdgepruneError("the main process could not write the checkpoint")
        self._asked, self._saved = False, time.monotonic()

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Give the weights and moments as this process holds them, by their names in a checkpoint."""
        for name, master in self._weights.masters.items():
            yield f"weight.{name}", master
            for key, tensor in self._optimizer.state(name):
                yield f"{key}.{name}", tensor

    def load(self, path: Path) -> None:
        """Go on from a checkpoint: one folder ``step-NNNNNNNN`` or the folder they are in.

        The model must be cut as it was then: ``checkpoints.describe(path)["notes"]`` has what the caller noted.

        Raises:
            BadInput: there is none, or it is of another training or another model.
        """
        found = path if (path / checkpoints.ABOUT).is_file() else checkpoints.latest(path)
        if found is None:
            raise BadInput(f"there is no whole checkpoint in {path}; start without resuming")
        about = checkpoints.describe(found)
        self._check_same(found, about)
        masters = self._weights.masters
        with _tensors(found) as read, torch.no_grad():
            for name, master in masters.items():
                master.copy_(self._weights.part(name, read(f"weight.{name}")))
                if about["step"]:
                    own = partial(_own, read, name)
                    self._optimizer.set_state(name, own, about["step"])
            _set_random_states(read)
        self._weights.publish()
        self.step, self._course, self.notes = about["step"], about["course"], about["notes"]
        self._above = 0
        self._emit(
            Note(text=f"training goes on from {found}, step {self.step} of {self.settings.steps}")
        )

    def _check_same(self, path: Path, about: dict[str, Any]) -> None:
        wanted = self.settings.what() | {"sequences": len(self._data)}
        stored = about["settings"] | {"sequences": about["sequences"]}
        for name in sorted(wanted.keys() | stored.keys()):
            if wanted.get(name) != stored.get(name):
                raise BadInput(
                    f"{path} was trained with {name} = {stored.get(name)}, not {wanted.get(name)}; resume with the "
                    "settings and data that it began with, or start in another folder"
                )
        shapes = {n: tuple(m.shape) for n, m in self._weights.masters.items()}
        if checkpoints.shapes(path) != shapes:
            raise BadInput(
                f"{path} is of a model with other widths; resume with the model that it was saved of"
            )


def _check_recorded(data: Packed, settings: Training, model: Any) -> None:
    """Raise BadInput unless the sequences come with predictions of a teacher that are what ``settings`` ask for."""
    wanted = (settings.teacher_top_k, settings.temperature)
    if not isinstance(data, Taught) or (data.top_k, data.temperature) != wanted:
        raise BadInput(
            f"teacher_top_k is {wanted[0]} and the data does not come with that many predictions of a teacher at the "
            f"temperature {wanted[1]:g}; record them with teacher_cache.prepare, or set teacher_top_k = 0"
        )
    check_vocabularies(data.vocabulary, len(model.lm_head.weight))


def _bytes_on_cpu(*models: Any) -> int:
    """Return what loaded models take, which is theirs to use."""
    return sum(p.nbytes for model in models if model is not None for p in model.parameters())


def launched() -> Any:
    """Return accelerate's view of how this process was launched; the others wait for one that prunes, or reads data."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    # without it processes on CPUs would each train for themselves
    cpu = machine.pick_device().type == "cpu"
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])


def is_fsdp(accelerator: Any) -> bool:
    """Tell whether weights are to be spread over the processes."""
    from accelerate.utils import DistributedType

    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _frozen(teacher: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a teacher to where it teaches."""
    teacher.to(device).eval().requires_grad_(False)
    for parameter in teacher.parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(dtype)
    return teacher


def _own(read: Callable[[str], Tensor], name: str, key: str) -> Tensor:
    return read(f"{key}.{name}")


# ---- random states


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(read: Callable[[str], Tensor]) -> None:
    torch.set_rng_state(read("random.cpu"))
    if torch.cuda.is_available():
        with_cuda = _maybe(read, "random.cuda")
        if with_cuda is not None:
            torch.cuda.set_rng_state(with_cuda)


def _maybe(read: Callable[[str], Tensor], name: str) -> Tensor | None:
    from safetensors import SafetensorError

    try:
        return read(name)
    except SafetensorError:  # it was saved on a machine without a GPU
        return None


@contextmanager
def _tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / checkpoints.TENSORS, framework="pt") as file:
            yield file.get_tensor
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{path} cannot be read: {error}; resume from the checkpoint before it"
        ) from error
