"""What a recovery is asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from edgeprune.errors import BadInput
from edgeprune.events import Emit, Note, ignore
from edgeprune.recovery import lora
from edgeprune.recovery.schedule import Schedule

# Updates that a small budget is divided into, where its tokens suffice (benchmarks/RESULTS.md, Recovery training).
ENOUGH_STEPS = 1000
# From here on the paper's schedule is taken as it is: a guess, to be measured.
MANY_STEPS = 4000
# Of shorter trainings: the highest rate, and the share of the updates in which it falls.
SHORT_RATE, SHORT_DECAY = 2e-4, 0.9
MOST_RECORDED = 65_535
# Tokens of training between two measurements of the held-out loss: they cost a fifteenth of it at most.
TOKENS_TO_EVALUATE = 100_000

OptimizerName = Literal["adamw", "adamw-8bit"]


@dataclass(frozen=True)
class Training:
    """How to train; the defaults are Adapt-Pruner's (arXiv 2502.03460), with a small default length.

    Args:
        tokens: to train on in all, over all stages.
        length: of a sequence.
        batch: sequences of an update, all processes together.
        micro_batch: sequences that go through the model at once in a process; None picks what fits.
        learning_rate: the highest of the schedule.
        min_learning_rate: what it ends with.
        warmup: share of the updates in which it rises.
        decay: share of the updates in which it falls.
        clip: the largest norm of the gradients.
        weight_decay: of matrices, not of norms and biases.
        betas: of AdamW.
        distill: weight of the teacher's KL divergence, in [0, 1]; the language model loss has the rest.
        temperature: of the KL divergence.
        teacher_top_k: how many of the teacher's likeliest next tokens are recorded on disk before the training, which
            then needs no teacher in memory; 0 has it there and learns its whole predictions.
        checkpointing: keep only the layers' inputs for the backward pass and compute the rest twice.
        optimizer: "adamw", or "adamw-8bit" with moments of 2 bytes a weight instead of 8.
        lora_rank: train low-rank additions of this rank and add them to the weights at the end; 0 trains the weights.
        evaluations: how many times to measure the held-out loss, evenly over the run, the last at its end.
        seed: orders the sequences.
    """

    tokens: int
    length: int = 512
    batch: int = 128
    micro_batch: int | None = None
    learning_rate: float = 2e-5
    min_learning_rate: float = 2e-6
    warmup: float = 0.05
    decay: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    distill: float = 0.0
    temperature: float = 1.0
    teacher_top_k: int = 0
    checkpointing: bool = False
    optimizer: OptimizerName = "adamw"
    lora_rank: int = 0
    evaluations: int = 10
    seed: int = 0

    @property
    def steps(self) -> int:
        """How many updates the tokens make, at least one."""
        return max(1, self.tokens // (self.batch * self.length))

    @property
    def schedule(self) -> Schedule:
        """The learning rates of all updates."""
        return Schedule(
            self.steps, self.learning_rate, self.min_learning_rate, self.warmup, self.decay
        )

    def check(self) -> None:
        """Raise BadInput for what cannot be done."""
        for name in ("tokens", "length", "batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} is {value}; it must be at least 1")
        for name in ("warmup", "decay", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("learning_rate", "clip", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise BadInput(f"{name} is {getattr(self, name)}; it must be a number above 0")
        if self.optimizer not in get_args(OptimizerName):
            names = " or ".join(get_args(OptimizerName))
            raise BadInput(f"optimizer is '{self.optimizer}'; it must be {names}")
        for name in ("min_learning_rate", "weight_decay", "evaluations", "lora_rank"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise BadInput(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.teacher_top_k <= MOST_RECORDED:
            raise BadInput(
                f"teacher_top_k is {self.teacher_top_k}; it must be from 0 to {MOST_RECORDED}"
            )
        if self.teacher_top_k and not self.distill:
            raise BadInput(
                f"teacher_top_k is {self.teacher_top_k} and distill is 0; distill above 0, or leave teacher_top_k out"
            )
        if self.warmup + self.decay > 1:
            raise BadInput(f"warmup {self.warmup} and decay {self.decay} are more than the whole")
        if self.min_learning_rate > self.learning_rate:
            raise BadInput(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"betas are {self.betas}; each must be at least 0 and below 1")

    def what(self) -> dict[str, Any]:
        """Return what a checkpoint belongs to, as plain JSON values: all that changes the result."""
        plain = asdict(replace(self, micro_batch=None, checkpointing=False, evaluations=0))
        return plain | {"betas": list(self.betas)}


def training_for(
    tokens: int,
    emit: Emit = ignore,
    *,
    length: int = Training.length,
    batch: int | None = None,
    learning_rate: float | None = None,
    min_learning_rate: float | None = None,
    decay: float | None = None,
    **others: Any,
) -> Training:
    """Return the settings for a budget of tokens: what is None is chosen, and told.

    Raises:
        BadInput: they cannot be used, or are too few tokens for one update.
    """
    for name, value in (("tokens", tokens), ("length", length)):
        if value < 1:
            raise BadInput(f"{name} is {value}; it must be at least 1")
    chosen = defaults_for(tokens, length, batch)
    rate = chosen.learning_rate if learning_rate is None else learning_rate
    if learning_rate is None and others.get("lora_rank"):
        rate *= lora.RATE
    lowest = float(f"{rate / 10:.2g}") if min_learning_rate is None else min_learning_rate
    fall = min(chosen.decay, 1 - others.get("warmup", chosen.warmup)) if decay is None else decay
    made = replace(chosen, learning_rate=rate, min_learning_rate=lowest, decay=fall, **others)
    made.check()
    if tokens < made.batch * length:
        raise BadInput(
            f"{tokens:,} tokens are less than one update of {made.batch} x {length} tokens; train on more, "
            "or with a smaller batch or length"
        )
    text = (
        f"{made.steps} updates of {made.batch} x {length} tokens, learning rate {made.learning_rate:g}, "
        f"falling in the last {made.decay:.0%}"
    )
    emit(Note(text=text))
    return made


def defaults_for(tokens: int, length: int = Training.length, batch: int | None = None) -> Training:
    """Return the settings for a budget of tokens.

    A batch of 128 sequences x 512 tokens turns 5 M tokens into 76 updates: too few to warm up, move and fall. So a
    small budget takes the largest power of two that leaves ``ENOUGH_STEPS`` updates. A short training also hardly
    leaves the start at the paper's 2e-5, as Adam moves each weight by about the learning rate an update: it has
    ``SHORT_RATE``, which then falls for most of the time. The lowest rate is a tenth of the highest.
    """
    most = max(1, tokens // (ENOUGH_STEPS * length))
    batch = batch or min(Training.batch, 1 << (most.bit_length() - 1))
    evaluations = min(Training.evaluations, max(1, tokens // TOKENS_TO_EVALUATE))
    made = Training(tokens, length, batch=batch, evaluations=evaluations)
    if made.steps >= MANY_STEPS:
        return made
    return replace(made, learning_rate=SHORT_RATE, decay=SHORT_DECAY)
