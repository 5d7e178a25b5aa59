"""Adapt-Pruner: cut a model down to a target in steps, each with importance measured anew.

The source weights are never changed. What a run has decided so far is which groups each layer keeps; every
iteration cuts the source weights to that, and so does the end. A run that was killed goes on from those lists.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune import calibration as texts
from edgeprune import checkpoint, machine, pruned, sources, state_file
from edgeprune.events import Emit, Note, ignore
from edgeprune.footprint import fit
from edgeprune.iterations import PruneRun
from edgeprune.locations import own_name
from edgeprune.options import Effort, Options
from edgeprune.scratch import Scratch
from edgeprune.target import Target


def prune(
    model: str | Path | sources.Source,
    output: str | Path,
    *,
    sparsity: float | None = None,
    params: int | None = None,
    memory: int | None = None,
    precision: str = "int4",
    calibration: str = "builtin",
    effort: Effort = "balanced",
    stream: bool | None = None,
    memory_budget: int | None = None,
    state: Path | None = None,
    kept: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    emit: Emit = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Prune ``model`` and write the smaller one to the folder ``output``.

    Args:
        model: Hub id, folder, .gguf file or ``wheel:`` name.
        output: a folder that does not exist yet or is empty.
        sparsity: share of the decoder layers' parameters to remove, in (0, 1).
        params: or: parameters of the whole model to keep.
        memory: or: bytes of the ONNX export at ``precision``.
        precision: of the export that ``memory`` means: int4, int8, fp16, fp32.
        calibration: text to measure importance on; see ``texts.read_texts``.
        effort: quick, balanced or best; what ``options`` leaves open of iterations and samples.
        stream: leave the weights in their files until they are used; by default where the memory asks for it.
        memory_budget: bytes that the run may take; by default a good part of what is free.
        state: file that makes the run resumable: the same call goes on from it, and removes it at the end.
        kept: safetensors file to write the numbers of the KV groups and channels to that each layer keeps.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code of the model's repository.
        emit: hears progress.
        **options: fields of ``Options``.

    Returns:
        The content of the checkpoint's ``edgeprune.json``.

    Raises:
        BadInput: what was given cannot be used; nothing was written.
        EdgepruneError: the work failed, for instance on a full disk.
    """
    output = Path(output)
    checkpoint.check_output(output)
    source = model
    if not isinstance(source, sources.Source):
        source = sources.resolve(
            source, revision=revision, trust_remote_code=trust_remote_code, emit=emit
        )
    config = sources.load_config(source)
    chosen = Options.of(effort, **options)
    chosen.check(config)
    run = PruneRun.plan(config, chosen, Target.of(config, sparsity, params, memory, precision))
    corpus = texts.read_calibration(calibration)
    tokenizer = sources.load_tokenizer(source)
    corpus.draw(tokenizer, 1, chosen.length, "is the text long enough?")
    run.room = fit(source, config, run.groups, chosen, stream, memory_budget)
    streamed = run.room.streamed
    started = time.monotonic()
    what = _fingerprint(source, config, chosen, run.target, corpus.hash)
    with _opened(source, streamed, emit) as dense, _scratch(output, state, what) as scratch:
        if state is not None and state.is_file():
            state_file.load(run, state, what, emit)
        for step in run.steps(dense, tokenizer, corpus, scratch, emit):
            if state is not None:
                state_file.save(run, state, what)
            emit(step)
        if chosen.repair_samples:
            run.repair(dense, tokenizer, corpus, scratch, emit)
        repaired = scratch if chosen.repair_samples else None
        record = checkpoint.save_parts(
            pruned.settings(dense, run.kept),
            pruned.parts(dense, run.groups, run.kept, repaired),
            tokenizer,
            output,
            provenance={
                "method": chosen.method,
                "options": chosen.to_json(),
                "target": run.target.to_json(),
                "calibration": {"text": own_name(calibration), "sha256": corpus.hash},
                "loss": run.losses,
                "seconds": round(time.monotonic() - started, 1),
                "compute_dtype": str(machine.compute_dtype()).removeprefix("torch."),
                "streamed": streamed,
            },
            source=source,
            generation_config=dense.generation_config,
        )
    if kept is not None:
        state_file.write_kept(kept, run.kept)
    if state is not None:
        state.unlink(missing_ok=True)
        shutil.rmtree(_scratch_folder(state), ignore_errors=True)
    return record


@contextmanager
def _opened(source: sources.Source, streamed: bool, emit: Emit) -> Iterator[Any]:
    """Give the dense model, in memory or mapped."""
    if not streamed:
        yield sources.load_model(source, emit=emit)
        return
    emit(Note(text=f"{source.title} is read from its files one decoder layer at a time"))
    with sources.unpacking_place(source) as place:
        yield sources.load_model(source, mapped=True, scratch=place, emit=emit)


def _scratch_folder(state: Path) -> Path:
    return state.with_name(state.name + ".scratch")


@contextmanager
def _scratch(output: Path, state: Path | None, what: str) -> Iterator[Scratch]:
    """Give a folder for unfinished work: beside the state, where it outlives a killed process, or a passing one."""
    if state is not None:
        yield Scratch(_scratch_folder(state), what)
        return
    # beside the output and not in /tmp, which is in memory on many systems
    output = output.absolute()
    checkpoint.sweep(output, ".scratch")
    folder = output.with_name(f".{output.name}.{os.getpid()}.scratch")
    try:
        yield Scratch(folder, what, lasting=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(
    source: sources.Source, config: Any, options: Options, target: Target, text: str
) -> str:
    """What a state file belongs to."""
    parts = {
        "source": [source.kind, source.name, source.revision],
        "config": config.to_dict(),
        "options": options.to_json(),
        "target": target.to_json(),
        "calibration": text,
    }
    return json.dumps(parts, sort_keys=True, default=str)
