"""What the engine says during a stage, for the tests of progress; imports nothing heavy."""

from __future__ import annotations

from edgeprune.events import Note, Progress, PruneIteration, StageFinished, StageStarted


def iteration(number: int) -> PruneIteration:
    return PruneIteration(
        iteration=number,
        of=4,
        loss=3.5,
        decoder_parameters=92_100_000,
        layer_importance=[],
        layer_sparsity=[],
        num_key_value_heads=[],
        intermediate_size=[],
        seconds=1.0,
    )


EVENTS = (
    StageStarted(stage="prune", title="Prune", index=2, of=3),
    Progress(stage="prune", done=5, total=40, unit="layer passes", note="iteration 1 of 4"),
    iteration(1),
    Note(text="[a] note", level="warning"),
    Progress(stage="prune", done=15, total=40, unit="layer passes", note="iteration 2 of 4"),
    StageFinished(stage="prune", seconds=83),
)
