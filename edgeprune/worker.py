"""The process in which a run's work is done: ``python -m edgeprune.worker FOLDER``.

It works through the stages of the recipe in FOLDER, keeps what each one found in ``state.json`` and
tells what happens in ``events.jsonl``. Started again after any death, it skips what is finished.

It ends when it is told to, in an orderly way: by a file ``stop`` in FOLDER (on every system, and heard while a library
computes), by SIGINT or SIGTERM, or by the end of its standard input. The last is how it never outlives the process that
started it; ``--detached`` leaves that out.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil

from edgeprune import lock
from edgeprune import recipe as recipes
from edgeprune.errors import BadInput, EdgepruneError, Left
from edgeprune.events import (
    Emit,
    Event,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    ignore,
)
from edgeprune.log import LogWriter
from edgeprune.recipe import Recipe

EVENTS = "events.jsonl"
OUTPUT = "worker.log"
RECIPE = "recipe.toml"
STATE = "state.json"
STOP = "stop"
PRUNE_STATE = "prune-state.safetensors"
MEASURED = "measured.json"
RECOVERY = "recovery"
TENSORBOARD = "tensorboard"
UNFINISHED = "unfinished"
PRUNED = "pruned"
EXPORT_DENSE = "export-dense"
EXPORT_PRUNED = "export-pruned"
RESULTS = "results.json"
REPORT = "report.html"

STATE_VERSION = 1
INTERRUPTED = 130
DETACHED = "--detached"
LOOK_INTERVAL = 0.2
"""Seconds between two looks for the file ``stop``."""
PATIENCE = 20.0
"""Seconds that the work has to stop by itself before it is ended."""


@dataclass(frozen=True)
class Work:
    """What a stage may use: the run's folder and recipe, and the results of the stages before."""

    folder: Path
    recipe: Recipe
    results: dict[str, dict[str, Any]]
    emit: Emit

    @contextmanager
    def artefact(self, name: str) -> Iterator[Path]:
        """Give a path to make the folder or file ``name`` at; it appears in the run when whole."""
        temporary = self.folder / UNFINISHED / name
        temporary.parent.mkdir(exist_ok=True)
        yield temporary
        final = self.folder / name
        remove(final)
        temporary.rename(final)


@dataclass(frozen=True)
class Stage:
    """A step of a run: ``do`` returns its figures; ``artefacts`` are what it leaves in the run."""

    name: str
    title: str
    do: Callable[[Work], dict[str, Any]]
    artefacts: tuple[str, ...] = ()


# ---- the stages


def _source(work: Work) -> dict[str, Any]:
    from edgeprune import report
    from edgeprune.preflight import check_source

    return {**check_source(work.recipe, work.folder, work.emit), **report.this_machine()}


def _prune(work: Work) -> dict[str, Any]:
    from edgeprune import provenance
    from edgeprune.inspection import inspect
    from edgeprune.pruner import prune

    pruned = work.folder / PRUNED
    precision = work.recipe.export.precision
    if not pruned.exists():  # it does if a worker was killed before it could record it
        with work.artefact(PRUNED) as output:
            if work.recipe.recover is not None:
                _recover(work, work.recipe.recover.processes, output)
            else:
                prune(
                    _dense(work),
                    output,
                    **work.recipe.target(),
                    **_pruning(work),
                    precision=precision,
                    state=work.folder / PRUNE_STATE,
                    emit=work.emit,
                )
    return {"summary": provenance.read_provenance(pruned), "inspection": inspect(pruned)}


def _pruning(work: Work) -> dict[str, Any]:
    options = work.recipe.prune.model_dump(exclude={*recipes.TARGETS})
    return options | {"skip_layers": tuple(work.recipe.prune.skip_layers)}


def _recover(work: Work, wanted: int | None, output: Path) -> None:
    from edgeprune.recovery import processes

    number = processes.count(wanted)
    if number > 1:
        processes.run(work.folder, output, number)
    else:
        prune_and_recover(work, output)


def prune_and_recover(work: Work, output: Path) -> None:
    """Prune and train as the recipe's section ``[recover]`` says; one of several processes or all of it."""
    from edgeprune import tensorboard
    from edgeprune.recovery.recover import prune_and_recover
    from edgeprune.recovery.settings import training_for

    wanted = work.recipe.recover
    assert wanted is not None
    own = {"data", "tokens", "interleavings", "spacing", "held_out", "minutes", "tensorboard"}
    own |= {"processes", "sharded"}
    speaks = work.emit is not ignore
    board = work.folder / TENSORBOARD if wanted.tensorboard and speaks else None
    with tensorboard.recorded(board, work.emit) as emit:
        prune_and_recover(
            _dense(work),
            output,
            target=work.recipe.target(),
            pruning=_pruning(work),
            precision=work.recipe.export.precision,
            data=wanted.data,
            training=training_for(wanted.tokens, emit, **wanted.model_dump(exclude=own)),
            interleavings=wanted.interleavings,
            spacing=wanted.spacing,
            held_out=wanted.held_out,
            minutes=wanted.minutes,
            sharded=wanted.sharded,
            work=work.folder / RECOVERY,
            emit=emit,
        )


def _export_dense(work: Work) -> dict[str, Any]:
    source = work.recipe.source
    return _export(work, source.model, EXPORT_DENSE, _commit(work), source.trust_remote_code)


def _export_pruned(work: Work) -> dict[str, Any]:
    return _export(work, str(work.folder / PRUNED), EXPORT_PRUNED, None, False)


def _export(
    work: Work, model: str, name: str, revision: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    from edgeprune.exporters.onnx import MANIFEST, export

    if not (work.folder / name).exists():  # likewise
        with work.artefact(name) as output:
            export(
                model,
                output,
                precision=work.recipe.export.precision,
                revision=revision,
                trust_remote_code=trust_remote_code,
                emit=work.emit,
            )
    manifest = json.loads((work.folder / name / MANIFEST).read_text("utf-8"))
    return cast("dict[str, Any]", manifest)


def _evaluate(work: Work) -> dict[str, Any]:
    from edgeprune import sources

    both = {"dense": _dense(work), "pruned": sources.resolve(work.folder / PRUNED)}
    return {
        which: _perplexity(work.recipe, source, _half(which, part, work.emit))
        for part, (which, source) in enumerate(both.items())
    }


def _half(note: str, part: int, emit: Emit) -> Emit:
    """Count the windows of both models as one work: part 0 is the first half, 1 the second."""

    def pass_on(event: Event) -> None:
        if isinstance(event, Progress):
            done = part * event.total + event.done
            event = replace(event, done=done, total=2 * event.total, note=note)
        emit(event)

    return pass_on


def _perplexity(recipe: Recipe, source: Any, emit: Emit) -> dict[str, Any]:
    from edgeprune.perplexity import measure
    from edgeprune.texts import read_texts

    settings = recipe.evaluate
    found = measure(
        source,
        "\n\n".join(read_texts(settings.text)),
        window=settings.window,
        max_tokens=settings.max_tokens,
        emit=emit,
    )
    return asdict(found)


def _profile(work: Work) -> dict[str, Any]:
    from edgeprune.profiles import devices

    both = work.folder / EXPORT_PRUNED, work.folder / EXPORT_DENSE
    kept = work.folder / MEASURED
    measured = devices.measure(
        *both,
        **work.recipe.profile.model_dump(),
        known=_read_measured(kept),
        keep=lambda found: _write_json(kept, found),
        emit=work.emit,
    )
    remove(kept)
    return {"devices": measured}


def _read_measured(path: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured before the run was interrupted, or a device failed."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _report(work: Work) -> dict[str, Any]:
    from edgeprune import report
    from edgeprune.log import read_events

    results = report.build_results(work.recipe, work.results)
    page = report.render(results, read_events(work.folder / EVENTS))
    with work.artefact(REPORT) as path:
        path.write_text(page, "utf-8")
    with work.artefact(RESULTS) as path:
        path.write_text(report.to_json(results), "utf-8")
    return {"results": RESULTS, "report": REPORT}


def _dense(work: Work) -> Any:
    """Return the source that the first stage found, sought again if its files have gone since."""
    from edgeprune import sources

    found = work.results["source"]["source"]
    path = Path(found["path"])
    if path.exists():
        return sources.Source(**{**found, "path": path})
    wanted = work.recipe.source
    return sources.resolve(
        wanted.model,
        revision=_commit(work),
        trust_remote_code=wanted.trust_remote_code,
        emit=work.emit,
    )


def _commit(work: Work) -> str | None:
    """Return the commit of a Hub model that the run began with: all stages use the same."""
    found = work.results["source"]["source"]
    return found["revision"] if found["kind"] == "hub" else None


STAGES = (
    Stage("source", "Check the source model", _source),
    Stage("prune", "Prune", _prune, (PRUNED,)),
    Stage("export-dense", "Export the dense model", _export_dense, (EXPORT_DENSE,)),
    Stage("export-pruned", "Export the pruned model", _export_pruned, (EXPORT_PRUNED,)),
    Stage("evaluate", "Perplexity of both models", _evaluate),
    Stage("profile", "Profile both exports", _profile),
    Stage("report", "Report", _report, (RESULTS, REPORT)),
)


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """Return what is to be done for ``recipe``: other things where another machine prunes and trains."""
    if recipe.where is None:
        return STAGES
    from edgeprune.remote import box

    return box.stages(recipe, STAGES)


# ---- working through them


def work_through(folder: Path, recipe: Recipe, stages: Sequence[Stage], emit: Emit) -> None:
    """Do the stages that are not finished yet, in order, and keep each one's result."""
    finished = _finished(folder, stages)
    remove(folder / UNFINISHED)
    for stage in stages[len(finished) + 1 :]:  # made from what is to be made again
        for name in stage.artefacts:
            remove(folder / name)
    emit(
        RunStarted(
            folder=str(folder),
            stages=[stage.name for stage in stages],
            finished=list(finished),
            pid=os.getpid(),
        )
    )
    results = {name: entry["result"] for name, entry in finished.items()}
    for index, stage in enumerate(stages, start=1):
        if stage.name in finished:
            continue
        emit(StageStarted(stage=stage.name, title=stage.title, index=index, of=len(stages)))
        began = time.monotonic()
        result = stage.do(Work(folder, recipe, dict(results), within(stage.name, emit)))
        seconds = time.monotonic() - began
        results[stage.name] = result
        finished[stage.name] = {"seconds": seconds, "result": result}
        write_state(folder, finished)
        emit(StageFinished(stage=stage.name, seconds=seconds, result=result))
    remove(folder / UNFINISHED)
    seconds = sum(entry["seconds"] for entry in finished.values())
    emit(RunFinished(results=RESULTS, report=REPORT, seconds=seconds))


def _finished(folder: Path, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Return the entries of the leading stages that are complete, their artefacts still there."""
    kept = read_state(folder)
    finished = {}
    for stage in stages:
        if stage.name not in kept or not all((folder / name).exists() for name in stage.artefacts):
            break
        finished[stage.name] = kept[stage.name]
    return finished


def within(stage: str, emit: Emit) -> Emit:
    """Pass on what a stage's engine reports, but not its own stages: the run's are coarser."""

    def pass_on(event: Event) -> None:
        if isinstance(event, StageStarted | StageFinished):
            return
        if hasattr(event, "stage"):
            event.stage = stage
        emit(event)

    return pass_on


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the finished stages of the run in ``folder``: {stage: {"seconds", "result"}}.

    Raises:
        BadInput: if there is no run in ``folder``, or one of another version.
    """
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        stages, version = dict(state["stages"]), state["schema_version"]
    except (OSError, ValueError, LookupError, TypeError):
        raise BadInput(
            f"{folder}: no run to go on with here; start one with: edgeprune run RECIPE -o DIR"
        ) from None
    if version != STATE_VERSION:
        raise BadInput(f"{folder}: the run was made by another version of edgeprune; start it anew")
    return stages


def read_results(folder: Path) -> dict[str, Any]:
    """Return ``results.json`` of a finished run. BadInput if it is gone or damaged."""
    from edgeprune import report

    try:
        results = json.loads((folder / RESULTS).read_text("utf-8"))
    except (OSError, ValueError):
        results = None
    if not isinstance(results, dict):
        raise damaged_results(folder)
    return report.current(results)


def damaged_results(folder: Path) -> BadInput:
    """Return the error for results that cannot be used."""
    again = resume_command(folder)
    return BadInput(f"{folder / RESULTS}: gone or damaged; make it again with: {again}")


def write_state(folder: Path, stages: dict[str, dict[str, Any]]) -> None:
    """Keep the finished ``stages``; a crash leaves the state before or after, never between."""
    _write_json(folder / STATE, {"schema_version": STATE_VERSION, "stages": stages})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- the process


def main(folder: Path, detached: bool = False) -> int:
    """Do the work of the run in ``folder``; the exit code says how it went."""
    with LogWriter(folder / EVENTS) as emit:
        failed = _try(folder, emit, detached)
        if failed is not None:
            emit(failed)
    if detached:  # nobody watches to do it
        lock.clear(folder)
    return 0 if failed is None else failed.exit_code


def _try(folder: Path, emit: Emit, detached: bool) -> RunFailed | None:
    resume = resume_command(folder)
    try:
        _obey(folder, emit, detached)
        recipe = recipes.load(folder / RECIPE)
        work_through(folder, recipe, stages_of(recipe), emit)
    except Left:
        return None
    except EdgepruneError as error:
        return RunFailed(error=str(error), exit_code=error.exit_code, next=resume)
    except KeyboardInterrupt:
        return RunFailed(error="stopped", exit_code=INTERRUPTED, next=resume)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return RunFailed(error="the disk is full: free some space", exit_code=2, next=resume)
        traceback.print_exc()  # into the run's worker.log
        text = f"{type(error).__name__}: {error} (all of it in {folder / OUTPUT})"
        return RunFailed(error=text, exit_code=1, next=resume)
    return None


def resume_command(folder: Path) -> str:
    """Return what to type to go on with the run in ``folder``."""
    return f"edgeprune run --resume {shown(folder)}"


def shown(folder: Path) -> str:
    """Return ``folder`` as it is typed into a shell here."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))


def _obey(folder: Path, emit: Emit, detached: bool) -> None:
    """From now on, interrupt the work when told to stop, and end the process if that does not end it."""
    told = threading.Event()

    def interrupt(_signal: int, _frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # once is enough: the end is not disturbed
            signal.signal(each, signal.SIG_IGN)
        told.set()
        raise KeyboardInterrupt

    def wait_for_end_of_input() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
            pass
        told.set()

    def watch() -> None:
        while not (told.wait(LOOK_INTERVAL) or (folder / STOP).exists()):
            pass
        _interrupt_main()
        time.sleep(PATIENCE)
        emit(RunFailed(error="stopped", exit_code=INTERRUPTED, next=resume_command(folder)))
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        os._exit(INTERRUPTED)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    if not detached:
        threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    threading.Thread(target=watch, daemon=True).start()


def _interrupt_main() -> None:
    if hasattr(signal, "pthread_kill"):  # unlike interrupt_main, ends a wait in a system call
        signal.pthread_kill(cast("int", threading.main_thread().ident), signal.SIGINT)
    else:
        import _thread

        _thread.interrupt_main()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), detached=DETACHED in sys.argv))
