"""A run that is done on another machine, a box, and told and finished here.

The run's folder here is an ordinary one. Its worker brings to the box what it needs, lets an ordinary run begin there
that outlives every connection, tells that run's events as its own, and brings home what it made; measuring and the
report are done here. The worker can end and begin again at any time: which events were told is in the log itself
(``Event.far_offset``), and everything else is asked of the box.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeprune import control, sources, texts, worker
from edgeprune import recipe as recipes
from edgeprune.errors import BadInput, EdgepruneError, Interrupted, Left, one_line
from edgeprune.events import (
    Emit,
    Note,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    event_from_json,
    ignore,
)
from edgeprune.recipe import Recipe, RecoverSection, WhereSection
from edgeprune.remote import address, environment, far_runs, far_store, hosts, transfer
from edgeprune.remote.address import Far
from edgeprune.remote.connection import Link, Unreachable, connect
from edgeprune.remote.words import harmless

if TYPE_CHECKING:
    from edgeprune.worker import Stage, Work

MADE = (worker.PRUNED, worker.EXPORT_DENSE, worker.EXPORT_PRUNED)
REPORTS = (worker.RESULTS, worker.REPORT, worker.EVENTS, worker.TENSORBOARD)
FOLLOW_INTERVAL = 0.5
"""Seconds between two looks at the far log."""
PATIENCE = (2.0, 5.0, 10.0, 30.0)
"""Seconds to wait before each new try to reach a box; the last for all further ones."""
SENDING_TRIES = 6

Answer = TypeVar("Answer")


# ---- the stages of such a run


def stages(recipe: Recipe, local: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Return what the worker here does for a run on a box, of what it does for one here."""
    assert recipe.where is not None
    on = recipe.where.on
    names = [stage.name for stage in local]
    far, near = local[: names.index("profile")], local[names.index("profile") :]
    return (
        worker.Stage("send", f"Prepare {on}", send),
        *(replace(stage, do=partial(follow, stage.name), artefacts=()) for stage in far),
        worker.Stage("fetch", f"Bring the results home from {on}", fetch, MADE),
        *near,
    )


def send(work: Work) -> dict[str, Any]:
    """Bring edgeprune, the recipe and the local files that it names to the box, each only once."""
    assert work.recipe.where is not None
    far = address.read(work.folder) or Far(work.recipe.where.on, _new_id(work.folder))
    address.write(work.folder, far)
    return _patiently(far, partial(_send, work, far), work.emit, tries=SENDING_TRIES)


def _send(work: Work, far: Far, link: Link) -> dict[str, Any]:
    python = environment.box(link, work.emit)
    places = link.far(far_runs, "prepare", run=far.run)
    files = local_files(work.recipe, carried=link.host.wheelhouse is not None)
    sent = transfer.send(link, list(files.values()), work.emit, "send")
    entries = [
        [f"{use}/{path.name}/{name}" if name else f"{use}/{path.name}", sha256]
        for use, path in files.items()
        for name, sha256 in sent[path]
    ]
    link.far(far_store, "link_inputs", run=far.run, entries=entries)
    moved = {use: f"{places['inputs']}/{use}/{path.name}" for use, path in files.items()}
    recipe = far_recipe(work.recipe, moved)
    files_there = {"recipe.toml": recipe.to_toml(), "origin.toml": work.recipe.to_toml()}
    link.far(far_runs, "write", run=far.run, files=files_there)
    work.emit(Note(text=f"the run on {far.host} is {far.run}"))
    return {"host": far.host, "run": far.run, "python": python}


def _new_id(folder: Path) -> str:
    name = re.sub("[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:40]
    return f"{name or 'run'}-{secrets.token_hex(4)}"


def local_files(recipe: Recipe, carried: bool = False) -> dict[str, Path]:
    """Return the files and folders here that the recipe uses, by what they are for.

    A model of the Hub is fetched by the box itself, unless all that it needs is ``carried`` to it.

    Raises:
        BadInput: for a model that cannot be used.
    """
    found: dict[str, Path | None] = {
        "model": _local_model(recipe, carried),
        "calibration": texts.local_file(recipe.prune.calibration),
        "evaluate": texts.local_file(recipe.evaluate.text),
    }
    for index, spec in enumerate(recipe.recover.data if recipe.recover else ()):
        found[f"data-{index}"] = texts.local_file(_name_and_weight(spec)[0])
    return {use: path for use, path in found.items() if path is not None}


def _local_model(recipe: Recipe, carried: bool) -> Path | None:
    wanted = recipe.source
    if sources.is_on_the_hub(wanted.model) and not carried:
        return None
    source = sources.resolve(
        wanted.model, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code
    )
    return source.path / source.gguf_file if source.gguf_file else source.path


def _name_and_weight(spec: str) -> tuple[str, str]:
    """Return the name in "notes.txt=3" and what follows it."""
    if Path(spec).exists() or "=" not in spec:
        return spec, ""
    name, _, weight = spec.rpartition("=")
    return name, f"={weight}"


def far_recipe(recipe: Recipe, moved: Mapping[str, str]) -> Recipe:
    """Return the recipe as the box does it: its own paths, and nothing measured there."""

    def at(use: str, name: str) -> str:
        return moved.get(use, name)

    source, prune, evaluate = recipe.source, recipe.prune, recipe.evaluate
    revision = None if "model" in moved else source.revision
    return recipe.model_copy(
        update={
            "source": source.model_copy(
                update={"model": at("model", source.model), "revision": revision}
            ),
            "prune": prune.model_copy(update={"calibration": at("calibration", prune.calibration)}),
            "evaluate": evaluate.model_copy(update={"text": at("evaluate", evaluate.text)}),
            "recover": recipe.recover and _far_data(recipe.recover, at),
            "profile": recipe.profile.model_copy(update={"devices": []}),
            "where": None,
        }
    )


def _far_data(section: RecoverSection, at: Callable[[str, str], str]) -> RecoverSection:
    both = [_name_and_weight(spec) for spec in section.data]
    data = [at(f"data-{index}", name) + weight for index, (name, weight) in enumerate(both)]
    return section.model_copy(update={"data": data})


# ---- following


def follow(stage: str, work: Work) -> dict[str, Any]:
    """Let the run go on at the box if it does not, and tell its events until ``stage`` is finished there.

    Returns the stage's figures. Told to stop, it has the run at the box stop as well.

    Raises:
        EdgepruneError, BadInput, Interrupted: the run failed at the box or was stopped there.
        Left: the worker here was interrupted, and the run goes on at the box.
    """
    far = _far_of(work.folder)
    watch = _Watch(far, stage, work, told(work.folder))
    try:
        result = _patiently(far, watch.follow, work.emit)
    except KeyboardInterrupt:
        if (work.folder / worker.STOP).exists() and _told_to_stop(far, work.emit):
            raise
        raise Left from None
    if stage == "source" and not sources.is_on_the_hub(work.recipe.source.model):
        result["source"] |= _as_here(work.recipe)
    return result


def _as_here(recipe: Recipe) -> dict[str, Any]:
    """Describe the model that was sent as a run here would."""
    wanted = recipe.source
    source = sources.resolve(
        wanted.model, trust_remote_code=wanted.trust_remote_code, weights=False
    )
    return {**asdict(source), "path": str(source.path)}


def _far_of(folder: Path) -> Far:
    far = address.read(folder)
    if far is None:
        raise BadInput(f"{folder}: no run on a box, or {address.FILE} is gone; start the run anew")
    return far


class _Watch:
    """Reads the far log from where the last reader of it ended; lives through any number of connections."""

    def __init__(self, far: Far, stage: str, work: Work, offset: int) -> None:
        self.far, self.stage, self.work, self.offset = far, stage, work, offset
        self.failed: RunFailed | None = None
        self.was_at_work = False

    def follow(self, link: Link) -> dict[str, Any]:
        """Return the figures of the stage when it is finished."""
        log = link.far(far_runs, "read", run=self.far.run)["folder"] + f"/{worker.EVENTS}"
        while True:
            status = link.far(far_runs, "status", run=self.far.run)
            result = self._read(
                link, log
            )  # after the status: what was written before an end is read
            if result is not None:
                return result
            if status["at_work"]:
                self.was_at_work = True
                time.sleep(FOLLOW_INTERVAL)
            elif self.failed is not None:
                self._raise(self.failed)
            elif self.was_at_work:
                raise self._died(status["last_words"])
            else:
                self._start(link)

    def _read(self, link: Link, log: str) -> dict[str, Any] | None:
        rest = b""
        start = self.offset
        while new := link.read(log, start + len(rest)):
            *lines, rest = (rest + new).split(b"\n")
            for line in lines:
                start += len(line) + 1
                result = self._take(line, start)
                if result is not None:
                    return result
        self.offset = start
        return None

    def _take(self, line: bytes, end: int) -> dict[str, Any] | None:
        """Tell one event of the far log, or keep what it says of the run's end."""
        try:
            event = event_from_json(harmless(json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            event = Note(text=f"a line of the log was skipped: {one_line(error)}", level="warning")
        event.far_offset = end
        if isinstance(event, StageFinished) and event.stage == self.stage:
            return event.result
        if isinstance(event, RunStarted):
            self.failed = None
        elif isinstance(event, RunFailed):
            self.failed = event
        elif not isinstance(event, StageStarted | StageFinished | RunFinished):
            self.work.emit(event)
        return None

    def _start(self, link: Link) -> None:
        python = environment.box(link, self.work.emit)
        self.work.emit(Note(text=f"{self.far.host} begins the run {self.far.run}"))
        done = link.far(far_runs, "start", run=self.far.run, python=python, seen=self.offset)
        self.was_at_work = True
        if done["code"]:
            error = BadInput if done["code"] == BadInput.exit_code else EdgepruneError
            raise error(f"{self.far.host}: {_reason(done['said'])}")

    def _raise(self, failed: RunFailed) -> None:
        if failed.exit_code == worker.INTERRUPTED and not self.was_at_work:
            self.failed = None  # an earlier stop, which this is to go on from
            return
        # Told, and so not taken for the end of the next try.
        text = f"{self.far.host}: {failed.error}"
        self.work.emit(Note(text=text, level="warning", far_offset=failed.far_offset))
        if failed.exit_code == worker.INTERRUPTED:
            raise Interrupted(text)
        raise (BadInput if failed.exit_code == BadInput.exit_code else EdgepruneError)(text)

    def _died(self, last_words: str) -> EdgepruneError:
        said = f"; its last words: {last_words}" if last_words else ""
        return EdgepruneError(
            f"{self.far.host}: the run's worker is gone without a word (out of memory? restarted?){said}"
        )


def _reason(said: str) -> str:
    """Return what a command of edgeprune's said last that was wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "\n".join(errors or lines[-1:]) or "the run did not begin there"


def told(folder: Path) -> int:
    """Return the byte of the far log up to which its events are in the log of ``folder``."""
    mark = b'"far_offset": '
    try:
        lines = (folder / worker.EVENTS).read_bytes().split(b"\n")[:-1]
    except OSError:
        return 0
    last = next((line for line in reversed(lines) if mark in line), None)
    return int(json.loads(last).get("far_offset", 0)) if last else 0


def _link(far: Far) -> Link:
    return connect(hosts.find(far.host))


def _patiently(
    far: Far, do: Callable[[Link], Answer], emit: Emit, tries: int | None = None
) -> Answer:
    """Do something on the box, again and again while it cannot be reached.

    With ``tries`` it must be there at the first of them, and after so many that failed one after the other the last
    Unreachable is raised.
    """
    lost, was_reached = 0, tries is None
    while True:
        try:
            with _link(far) as link:
                if lost:
                    emit(Note(text=f"{far.host} is reached again"))
                lost, was_reached = 0, True
                return do(link)
        except Unreachable as error:
            lost += 1
            if not was_reached or lost == tries:
                raise
            if lost == 1:
                emit(Note(text=f"{error}; trying again", level="warning"))
        time.sleep(PATIENCE[min(lost, len(PATIENCE)) - 1])


# ---- bringing home


def fetch(work: Work) -> dict[str, Any]:
    """Bring what the run made home, whole or not at all, and only what is not here yet."""
    far = _far_of(work.folder)
    wanted = (*MADE, worker.TENSORBOARD)
    _patiently(far, lambda link: _fetch(link, far, work.folder, wanted, work.emit), work.emit)
    return {"host": far.host, "run": far.run}


def _fetch(link: Link, far: Far, folder: Path, wanted: Sequence[str], emit: Emit) -> list[str]:
    place = link.far(far_runs, "read", run=far.run)["folder"]
    there = link.far(far_runs, "present", run=far.run, names=list(wanted))
    transfer.fetch(link, place, folder, there, emit, "fetch")
    return list(there)


# ---- without a worker here


def adopt(far: Far, folder: Path) -> None:
    """Make ``folder`` that of a run which was begun from elsewhere, for a worker here to go on with.

    Raises:
        BadInput: there is no such run, or ``folder`` is in use.
        EdgepruneError: the box cannot be reached.
    """
    with _link(far) as link:
        origin = link.far(far_runs, "read", run=far.run)["origin"]
    recipe = recipes.parse_toml(origin, f"{far}'s recipe")
    recipe = recipe.model_copy(update={"where": WhereSection(on=far.host)})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: not an empty folder; name another with -o DIR")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / worker.RECIPE).write_text(recipe.to_toml(), "utf-8")
    address.write(folder, far)
    sent = {"seconds": 0.0, "result": {"host": far.host, "run": far.run}}
    worker.write_state(folder, {"send": sent})


def fetch_now(far: Far, folder: Path, emit: Emit = ignore) -> list[str]:
    """Bring home what the run at the box has made so far; return the names. Raises as ``adopt``."""
    folder.mkdir(parents=True, exist_ok=True)
    with _link(far) as link:
        return _fetch(link, far, folder, (*MADE, worker.RESULTS, worker.REPORT), emit)


def stop(far: Far) -> bool:
    """Tell the run at the box to stop; False if none is at work there. Raises as ``adopt``."""
    with _link(far) as link:
        return bool(link.far(far_runs, "stop", run=far.run))


def stop_unwatched(folder: Path, far: Far) -> bool:
    """Tell the run at the box to stop that nothing here watches; if it was at work, say so in the log of ``folder``.

    Returns, Raises: as ``stop``.
    """
    told = stop(far)
    if told:
        control.say_stopped(folder)
    return told


def listing(host: str) -> list[dict[str, Any]]:
    """Return the runs on a box, the last changed first: ``run, state, changed, bytes, model``. Raises as ``adopt``."""
    with connect(hosts.find(host)) as link:
        found = link.far(far_runs, "listing")
    return [{**each, "model": _model(each.pop("origin"))} for each in found]


def clean(far: Far) -> int:
    """Remove the run at the box and what only it needed; return the bytes freed. Raises as ``adopt``."""
    with _link(far) as link:
        link.far(far_runs, "remove", run=far.run)
        return int(link.far(far_store, "clean"))


def _told_to_stop(far: Far, emit: Emit) -> bool:
    try:
        stop(far)
    except EdgepruneError as error:
        emit(Note(text=f"{far} could not be told to stop: {error}", level="warning"))
        return False
    return True


def _model(origin: str) -> str:
    try:
        return recipes.parse_toml(origin).source.model
    except BadInput:
        return ""
