"""What a micro batch costs: student, teacher and loss in one module, so that a sharded model's weights are at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import BadInput
from edgeprune.families import logits_divisor
from edgeprune.recovery.loss import Head, Recorded, Teaching, cross_entropy, head_loss
from edgeprune.recovery.packing import Batch


class Objective(nn.Module):
    """The training loss of a causal language model.

    Args:
        model: the student, of transformers; trained in place.
        teacher: a model of the same vocabulary, or None; not trained and not part of this module's parameters. Without
            it, what a batch has recorded of one is learnt.
        weight: share of the teacher's KL divergence in the loss, in [0, 1].
        temperature: of the KL divergence.
    """

    def __init__(self, model: Any, teacher: Any, weight: float, temperature: float) -> None:
        super().__init__()
        self.model = model
        self._teacher = (
            [teacher] if teacher is not None and weight else []
        )  # a list hides it from nn.Module
        self._weight, self._temperature = weight, temperature

    def forward(self, batch: Batch, measure: bool = False) -> tuple[Tensor, Tensor]:
        """Return the summed loss of the labelled tokens and its parts, as ``loss.head_loss``.

        With ``measure`` it is the cross-entropy alone, from float32 logits, without gradient.
        """
        hidden = last_hidden(self.model, batch).flatten(0, 1)
        labels = batch.labels.flatten()
        if measure:
            total = cross_entropy(hidden, head_of(self.model), labels)
            return total, torch.stack((total, torch.zeros_like(total)))
        return head_loss(hidden, head_of(self.model), labels, self._teaching(batch))

    @torch.no_grad()
    def _teaching(self, batch: Batch) -> Teaching | Recorded | None:
        for teacher in self._teacher:
            hidden = last_hidden(teacher, batch).flatten(0, 1)
            return Teaching(hidden, head_of(teacher), self._weight, self._temperature)
        ids, recorded = batch.teacher_ids, batch.teacher_log_probabilities
        if ids is None or recorded is None or not self._weight:
            return None
        return Recorded(ids.flatten(0, 1), recorded.flatten(0, 1), self._weight, self._temperature)


def last_hidden(model: Any, batch: Batch) -> Tensor:
    """Return what the head reads, (rows, length, hidden size).

    Positions that restart tell transformers where a document ends: it then masks attention across documents, and
    within a layer's sliding window where it has one.
    """
    out = model.model(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


def head_of(model: Any) -> Head:
    """Return the model's head. BadInput where the logits are bent afterwards (soft capping)."""
    if getattr(model.config, "final_logit_softcapping", None):
        raise BadInput(
            f"models of type '{model.config.model_type}' with final_logit_softcapping cannot be trained yet; "
            "set it to null in config.json if the model does not depend on it"
        )
    return Head(model.lm_head.weight, model.lm_head.bias, logits_divisor(model.config))


def check_vocabularies(teacher: int, model: int) -> None:
    """Raise BadInput unless a teacher's logits are of as many tokens as the model's."""
    if teacher != model:
        raise BadInput(
            f"the teacher has {teacher:,} tokens in its vocabulary and the model {model:,}; distill from a model with "
            "the same tokenizer, or set distill = 0"
        )


def without_dropout(model: nn.Module) -> None:
    """Switch all dropout off, whatever mode the model is in."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - nn.Module's own types know no floats
