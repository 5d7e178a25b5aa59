"""The runs of this user: a list of folders, and what each folder says of its run.

Only the folders are remembered, in ``runs.json`` in the user's state directory. How a run stands is read from its
folder every time (lock, ``events.jsonl``, ``state.json``, ``results.json``), so that nothing is ever out of date.
What is damaged is told as text, never raised: a list shows all that it can. Imports nothing heavy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from edgeprune import control, lock, worker
from edgeprune import recipe as recipes
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.events import RunFailed, RunFinished, RunStarted, StageStarted
from edgeprune.locations import state_folder
from edgeprune.log import last_session, read_kinds
from edgeprune.quantities import format_bytes, format_count
from edgeprune.recipe import Recipe
from edgeprune.remote import address

FILE = "runs.json"
SCHEMA_VERSION = 1
LOCK_SECONDS = 10.0

State = Literal["running", "paused", "away", "finished", "failed", "stopped", "dead", "missing"]
AT_WORK: tuple[State, ...] = ("running", "paused")


@dataclass(frozen=True)
class Figures:
    """What a run measured of a model, under the names of ``results.json``; None where that has no number."""

    file_bytes: float | None = None
    token_perplexity: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None
    time_to_first_token_seconds: float | None = None
    peak_memory_bytes: float | None = None


@dataclass(frozen=True)
class RunInfo:
    """A run as its folder tells it."""

    folder: Path
    """Absolute."""
    name: str
    model: str
    """As the recipe names it; empty if that cannot be read."""
    target: str
    """As in "30% sparsity"."""
    state: State
    """``away``: it goes on on another machine, and nothing here watches it; ``dead``: its process is gone without a
    word; ``missing``: there is no run in the folder (any more)."""
    stage: str
    """Title of the stage at work, or of that at which the run ended early."""
    started: float | None
    """Seconds since the epoch."""
    seconds: float | None
    """Of work: the finished stages, and the one begun by the last worker."""
    pid: int | None
    """The worker's, where one is at work."""
    error: str
    next: str
    """The command to type next."""
    dense: Figures | None
    """None unless the run is finished and its results can be read."""
    pruned: Figures | None


# ---- the list


def list_runs() -> list[RunInfo]:
    """Return all remembered runs, the one last begun or resumed first."""
    return [describe(folder) for folder in reversed(_folders())]


def remember(folder: str | Path) -> None:
    """Put ``folder`` at the head of the list. EdgepruneError if the list cannot be written."""
    path = str(Path(folder).absolute())
    _change(lambda folders: [*(each for each in folders if each != path), path])


def forget(folder: str | Path) -> bool:
    """Take ``folder`` off the list and leave it alone; False if it was not there. Raises as ``remember``."""
    path = str(Path(folder).absolute())
    found = path in map(str, _folders())
    if found:
        _change(lambda folders: [each for each in folders if each != path])
    return found


def _folders() -> list[Path]:
    """Return the folders in the list, the latest last; a damaged list is an empty one."""
    try:
        listed = json.loads((state_folder() / FILE).read_text("utf-8"))["folders"]
        return [Path(each) for each in listed if isinstance(each, str)]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        return []


def _change(change: Callable[[list[str]], list[str]]) -> None:
    try:
        with _locked() as path:
            document = {
                "schema_version": SCHEMA_VERSION,
                "folders": change([str(folder) for folder in _folders()]),
            }
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1), "utf-8")
            temporary.replace(path)
    except (OSError, Timeout, RuntimeError) as error:
        raise EdgepruneError(f"the list of runs cannot be written: {error}") from error


@contextmanager
def _locked() -> Iterator[Path]:
    path = state_folder() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
        yield path


# ---- a run


def describe(folder: str | Path) -> RunInfo:
    """Return what ``folder`` says of its run; never raises for what is in there."""
    folder = Path(folder).absolute()
    try:
        return _describe(folder, worker.read_state(folder))
    except BadInput as error:
        return _missing(folder, str(error))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        return _missing(folder, f"{folder}: its files are damaged: {one_line(error)}")


def _describe(folder: Path, finished: Mapping[str, Any]) -> RunInfo:
    kinds = (RunStarted, StageStarted, RunFinished, RunFailed)
    events = read_kinds(folder / worker.EVENTS, *kinds)
    session = last_session(events)
    end = control.end_of(session)
    pid = control.pid_of(folder)
    state = _state(folder, finished, end, pid)
    stage = next((e for e in reversed(session) if isinstance(e, StageStarted)), None)
    results, problem = _results(folder) if state == "finished" else ({}, "")
    recipe = _recipe(folder)
    return RunInfo(
        folder=folder,
        name=folder.name,
        model=recipe.source.model if recipe else "",
        target=_target(recipe) if recipe else "",
        state=state,
        stage=stage.title or stage.stage if stage and state != "finished" else "",
        started=next((e.time for e in events if isinstance(e, RunStarted)), None),
        seconds=_seconds(folder, finished, stage, end, state),
        pid=pid,
        error=problem or _error(folder, state, end),
        next=_next(folder, state, problem),
        dense=_figures(results, "dense"),
        pruned=_figures(results, "pruned"),
    )


def _missing(folder: Path, why: str) -> RunInfo:
    forget_it = f"edgeprune runs forget {worker.shown(folder)}"
    error = why if folder.exists() else f"{folder}: no such folder"
    return RunInfo(
        folder, folder.name, "", "", "missing", "", None, None, None, error, forget_it, None, None
    )


def _state(
    folder: Path, finished: Mapping[str, Any], end: control.End | None, pid: int | None
) -> State:
    # The log first: who watched over a worker that has ended may hold the lock for a moment longer.
    if isinstance(end, RunFinished):
        return "finished"
    if isinstance(end, RunFailed):
        return "stopped" if end.exit_code == worker.INTERRUPTED else "failed"
    if pid is not None and control.is_paused(pid):
        return "paused"
    if lock.is_held(folder):
        return "running"
    return "away" if address.read(folder) and "send" in finished else "dead"


def is_elsewhere(folder: Path) -> bool:
    """Tell whether the recipe of the run in ``folder`` is for another machine."""
    recipe = _recipe(folder)
    return recipe is not None and recipe.where is not None


def _error(folder: Path, state: State, end: control.End | None) -> str:
    if isinstance(end, RunFailed) and state == "failed":
        return end.error
    if state == "dead":
        last = control.last_words(folder)
        return "its process is gone without a word" + (f"; the last words: {last}" if last else "")
    return ""


def _next(folder: Path, state: State, problem: str) -> str:
    if state == "finished" and not problem:
        return f"edgeprune attach {worker.shown(folder)}"
    if state in ("running", "paused", "away"):
        verb = "unpause" if state == "paused" else "attach"
        return f"edgeprune {verb} {worker.shown(folder)}"
    return worker.resume_command(folder)


def _seconds(
    folder: Path,
    finished: Mapping[str, Any],
    stage: StageStarted | None,
    end: control.End | None,
    state: State,
) -> float:
    seconds = sum(float(entry["seconds"]) for entry in finished.values())
    if stage is None or stage.stage in finished:
        return seconds
    until = time.time() if state == "running" else end.time if end else _last_change(folder)
    return seconds + max(0.0, until - stage.time)


def _last_change(folder: Path) -> float:
    try:
        return (folder / worker.EVENTS).stat().st_mtime
    except OSError:
        return 0.0


def _recipe(folder: Path) -> Recipe | None:
    try:
        return recipes.load(folder / worker.RECIPE)
    except BadInput:
        return None


def _target(recipe: Recipe) -> str:
    ((name, value),) = recipe.target().items()
    texts: dict[str, Callable[[Any], str]] = {
        "sparsity": lambda value: f"{100 * value:.3g}% sparsity",
        "params": lambda value: f"{format_count(value)} parameters",
        "memory": lambda value: f"{format_bytes(value)} {recipe.export.precision}",
    }
    return texts[name](value)


def _results(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_results(folder), ""
    except BadInput as error:
        return {}, str(error)


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run, both models in them. BadInput if they are gone or damaged."""
    results = worker.read_results(folder)
    if not all(isinstance(results.get(which), dict) for which in ("dense", "pruned")):
        raise worker.damaged_results(folder)
    return results


def _figures(results: Mapping[str, Any], which: str) -> Figures | None:
    if which not in results:
        return None
    return Figures(**{f.name: _number(results[which].get(f.name)) for f in fields(Figures)})


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
