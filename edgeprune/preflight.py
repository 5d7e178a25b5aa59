"""What can be checked of a run before it starts any work: with the figures, and what to do where something is wrong.

``checks`` does all of it one after the other for a list that ticks, and fetches no weights; of the machines that the
recipe names, it asks those. ``check_source`` is a run's own first stage, on the machine that prunes: it fetches the
model, and tells all problems at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeprune import doctor, hub, machine, sources
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.events import Emit, Note, ignore
from edgeprune.inspection import inspect
from edgeprune.quantities import format_bytes, format_count
from edgeprune.recipe import TARGETS, Recipe
from edgeprune.remote import hosts
from edgeprune.shards import INDEX, SINGLE
from edgeprune.sources import Source
from edgeprune.texts import COLUMNS, is_builtin, local_file, read_rows, read_texts
from edgeprune.worker import shown

if TYPE_CHECKING:  # what imports torch is imported when it is used
    from edgeprune.options import Options
    from edgeprune.outlook import Known
    from edgeprune.target import Target

WEIGHT_BYTES = 4
"""Bytes of a weight while a model is worked on: float32, the widest case."""
ROOM = 200_000_000
"""Bytes of disk for tokenizers, logs, graphs and other small things."""

# How often a text may be read in training: 2.9 times made a model worse (benchmarks/RESULTS.md, Recovery training).
MOST_TIMES = 1.5
NO_OPTIONS = ("calibration", "stream", "memory_budget")
"""Of the recipe's section ``[prune]``: where texts and weights are, not how to prune."""

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """What one check found. ``text`` has its figures, a line for each problem; ``mend`` says what to do."""

    name: str
    title: str
    state: State
    text: str = ""
    mend: str = ""

    def lines(self) -> list[str]:
        """Return each problem with what to do about it."""
        return [f"{line}; {self.mend}" if self.mend else line for line in self.text.splitlines()]


@dataclass(frozen=True)
class Finding:
    """What a check says, before it has a name."""

    state: State
    text: str
    mend: str = ""

    @staticmethod
    def of(error: EdgepruneError) -> Finding:
        """Take what an error says: its last clause is what to do."""
        text, _, mend = str(error).rpartition("; ")
        return Finding("failed", text or mend, mend if text else "")


@dataclass
class Plan:
    """A run that is looked at; the first check finds its model."""

    recipe: Recipe
    folder: Path
    source: Source | None = None
    shape: dict[str, Any] | None = None

    @cached_property
    def known(self) -> Known:
        """The model's config, for what is worked out from it."""
        from edgeprune.outlook import of_source

        assert self.source is not None
        return of_source(self.source)

    @cached_property
    def options(self) -> Options:
        """How the recipe prunes. BadInput if that cannot be done with this model."""
        from edgeprune.options import Options

        wanted = self.recipe.prune.model_dump(exclude={*TARGETS, *NO_OPTIONS})
        made = Options.of(**wanted | {"skip_layers": tuple(wanted["skip_layers"])})
        made.check(self.known.config)
        return made

    @cached_property
    def target(self) -> Target:
        """What the recipe aims at. BadInput if that cannot be reached."""
        from edgeprune.target import Target

        wanted = dict.fromkeys(TARGETS) | self.recipe.target()
        return Target.of(self.known.config, **wanted, precision=self.recipe.export.precision)


@dataclass(frozen=True)
class Step:
    """A check to make; one that ``needs_model`` is skipped where there is none."""

    name: str
    title: str
    look: Callable[[Plan], Finding]
    needs_model: bool = False
    if_recovers: bool = False
    """It has to do with training alone."""
    if_here: bool = False
    """It has to do with a machine that prunes and trains, and looks at this one."""
    far: bool = False
    """It asks another machine."""

    def check(self, plan: Plan) -> Check:
        """Make the check; what the user must mend is told and not raised."""
        if self.needs_model and plan.shape is None:
            return self.finds(Finding("skipped", "there is no model to check it with"))
        try:
            return self.finds(self.look(plan))
        except BadInput as error:
            return self.finds(Finding.of(error))

    def check_all(self, plan: Plan) -> Check:
        """As ``check``, but tell, too, what is not for the user to mend: the Hub, a disk, a link."""
        try:
            return self.check(plan)
        except EdgepruneError as error:
            return self.finds(Finding.of(error))

    def finds(self, found: Finding) -> Check:
        """Put the check's name to what it found."""
        return Check(self.name, self.title, found.state, found.text, found.mend)


def checks(
    recipe: Recipe,
    folder: Path,
    emit: Emit = ignore,
    turn: AbstractContextManager[object] | None = None,
) -> Iterator[Check]:
    """Check a run of ``recipe`` in ``folder``, one thing after the other; weights are not fetched.

    ``emit`` hears of the download of a config. ``turn`` is held while something is worked out here, and not while
    another machine is asked.
    """
    plan = Plan(recipe, folder)
    model = Step("model", "Model", lambda plan: _find(plan, emit))
    for step in (model, *BEFORE, *OF_THE_RUN, *_elsewhere(recipe)):
        if (step.if_recovers and recipe.recover is None) or (step.if_here and recipe.where):
            continue
        with nullcontext() if step.far or turn is None else turn:
            found = step.check_all(plan)
        yield found


def _elsewhere(recipe: Recipe) -> list[Step]:
    """Return what is to be looked at where other machines prune or measure."""
    devices = [name for name in recipe.profile.devices if name != hosts.LOCAL]
    box = (Step("disk", "Disk", _disk_for_results, True), Step("box", "Box", _box, far=True))
    return [
        *(box if recipe.where else ()),
        *(
            Step(f"device-{name}", f"Device {name}", partial(_device, name), far=True)
            for name in devices
        ),
    ]


def check_source(recipe: Recipe, folder: Path, emit: Emit) -> dict[str, Any]:
    """Fetch the recipe's model and check that the run can be done on this machine.

    Returns where the model is (``source``) and its shape (``inspection``).

    Raises:
        BadInput: with every problem, one a line.
    """
    wanted = recipe.source
    source = sources.resolve(
        wanted.model,
        revision=wanted.revision,
        trust_remote_code=wanted.trust_remote_code,
        emit=emit,
    )
    shape = inspect(source)
    plan = Plan(recipe, folder, source, shape)
    made = (step.check(plan) for step in OF_THE_RUN if recipe.recover or not step.if_recovers)
    problems = [line for check in made if check.state == "failed" for line in check.lines()]
    if problems:
        raise BadInput("\n".join(dict.fromkeys(problems)))
    if note := _layer_by_layer(shape["parameters"]):
        emit(Note(text=note))
    return {"source": {**asdict(source), "path": str(source.path)}, "inspection": shape}


# ---- the model


def _find(plan: Plan, emit: Emit) -> Finding:
    wanted = plan.recipe.source
    source = sources.resolve(
        wanted.model,
        revision=wanted.revision,
        trust_remote_code=wanted.trust_remote_code,
        weights=False,
        emit=emit,
    )
    finding = _weights(source, _fetcher(plan.recipe))
    if finding.state != "failed":
        plan.source, plan.shape = source, inspect(source)
        what = f"{source.title}, {format_count(plan.shape['parameters'])} parameters"
        return Finding(finding.state, f"{what}; {finding.text}", finding.mend)
    return finding


def _fetcher(recipe: Recipe) -> str:
    """Return the machine that fetches the model's weights from the Hub, if that is another one."""
    if recipe.where is None or not sources.is_on_the_hub(recipe.source.model):
        return ""
    try:
        carried = hosts.find(recipe.where.on).wheelhouse is not None
    except BadInput:  # told by the box's own check
        carried = False
    return "" if carried else recipe.where.on


def _weights(source: Source, fetcher: str = "") -> Finding:
    """Check the weights that are here, and say how much is still to be downloaded."""
    if fetcher:
        return Finding("ok", f"{fetcher} downloads its weights")
    if source.kind == "hub" and not _are_cached(source.path):
        return _download(source)
    if not source.gguf_file:
        sources.resolve(source.path)  # as a folder: what is in the cache is not asked for again
    return Finding("ok", f"its weights are here, {format_bytes(_bytes_on_disk(source))}")


def _are_cached(folder: Path) -> bool:
    if (folder / SINGLE).is_file():
        return True
    if not (folder / INDEX).is_file():
        return False
    names = sources.read_json(folder / INDEX).get("weight_map") or {}
    return bool(names) and all((folder / name).is_file() for name in names.values())


def _bytes_on_disk(source: Source) -> int:
    files = (
        [source.path / source.gguf_file] if source.gguf_file else source.path.glob("*.safetensors")
    )
    return sum(file.stat().st_size for file in files)


def _download(source: Source) -> Finding:
    from huggingface_hub import constants

    needed, cache = _bytes_to_download(source), Path(constants.HF_HUB_CACHE)
    if not needed:
        return Finding(
            "failed",
            f"'{source.name}' has no safetensors on the Hub, and pickles are never loaded",
            "convert it at https://huggingface.co/spaces/safetensors/convert",
        )
    text, free = f"{format_bytes(needed)} will be downloaded", machine.disk_free(cache)
    if needed <= free:
        return Finding("ok", text)
    mend = "free some, or set HF_HOME to a folder on another disk"
    return Finding("failed", f"{text}, and {format_bytes(free)} are free for the Hub's cache", mend)


def _bytes_to_download(source: Source) -> int:
    from huggingface_hub import snapshot_download

    try:
        files = snapshot_download(
            source.name,
            revision=source.revision,
            allow_patterns=list(hub.WEIGHTS),
            ignore_patterns=list(hub.ELSEWHERE),
            dry_run=True,
        )
    except Exception as error:  # the network fails in many ways
        raise EdgepruneError(
            f"'{source.name}' is not in the cache, and the Hub cannot be asked for it "
            f"({one_line(error)}); check the network"
        ) from error
    return sum(file.file_size or 0 for file in files if file.will_download)


# ---- this machine


def _folder(plan: Plan) -> Finding:
    from edgeprune.run import _folder_problems

    problems = _folder_problems(plan.folder.absolute())
    if problems:
        return Finding.of(BadInput("\n".join(problems)))
    return Finding("ok", f"{shown(plan.folder.absolute())} is free")


def _libraries(_plan: Plan) -> Finding:
    problems: list[doctor.Problem] = []
    found = doctor._libraries(problems)
    wrong = [problem for problem in problems if problem.required]
    if not wrong:
        return Finding("ok", f"{len(found)} libraries in the versions that are needed")
    mends = dict.fromkeys(problem.mend for problem in wrong)
    return Finding("failed", "\n".join(problem.what for problem in wrong), " && ".join(mends))


def _disk(plan: Plan) -> Finding:
    return _room(plan, _bytes_of_run(plan), "the run")


def _disk_for_results(plan: Plan) -> Finding:
    return _room(plan, _bytes_of_results(plan), "what comes home")


def _room(plan: Plan, need: int, what: str) -> Finding:
    free = machine.disk_free(plan.folder)
    text = f"{shown(plan.folder.absolute())}: {format_bytes(free)} free, and {what} may need {format_bytes(need)}"
    if need <= free:
        return Finding("ok", text)
    return Finding("failed", text, "free some space or name another disk with -o DIR")


def _bytes_of_results(plan: Plan) -> int:
    # The pruned checkpoint and both exports, none larger than the model in float32.
    return 3 * _shape(plan)["parameters"] * WEIGHT_BYTES + ROOM


def _bytes_of_run(plan: Plan) -> int:
    # Training: the models of two stages before and after it, and three checkpoints (one unfinished) of weights and
    # two moments.
    copies = 4 + 9 if plan.recipe.recover is not None else 0
    return _bytes_of_results(plan) + copies * _shape(plan)["parameters"] * WEIGHT_BYTES


def _shape(plan: Plan) -> dict[str, Any]:
    assert plan.shape is not None
    return plan.shape


def _target(plan: Plan) -> Finding:
    from edgeprune.iterations import PruneRun

    PruneRun.plan(plan.known.config, plan.options, plan.target)
    share = plan.target.removed / plan.known.decoder
    return Finding("ok", f"{share:.1%} of the parameters in the decoder layers are to go")


def _prune_memory(plan: Plan) -> Finding:
    from edgeprune.outlook import memory_to_prune

    wanted = plan.recipe.prune
    needed = memory_to_prune(plan.known, plan.options, wanted.stream, wanted.memory_budget)
    if not needed.possible:
        return Finding("failed", needed.text, "close other programs, or raise memory_budget")
    note = _layer_by_layer(plan.known.parameters)
    return Finding("warning" if note else "ok", "\n".join(filter(None, (needed.text, note))))


def _layer_by_layer(parameters: int) -> str:
    """Say that a model is larger than the memory; nothing if it is not."""
    need, memory = parameters * WEIGHT_BYTES, machine.memory()
    if need <= memory.available:
        return ""
    return (
        f"the model takes {format_bytes(need)} of memory in float32 and {format_bytes(memory.available)} are free: "
        "it is worked on one decoder layer at a time"
    )


def _train_memory(plan: Plan) -> Finding:
    from edgeprune import outlook
    from edgeprune.recovery import processes, stages

    recover = plan.recipe.recover
    assert recover is not None
    settings = outlook.settings_of(recover)
    first, *_ = stages.plan(
        plan.known.decoder,
        plan.target.removed,
        settings.steps,
        recover.interleavings,
        recover.spacing,
    )
    number = processes.count(recover.processes)
    needed = outlook.memory_to_train(plan.known, settings, first.removed, number, recover.sharded)
    return Finding("ok", needed.text) if needed.possible else Finding.of(BadInput(needed.text))


# ---- other machines


def _box(plan: Plan) -> Finding:
    assert plan.recipe.where is not None
    name = plan.recipe.where.on
    found = _examined(name, "box")
    if isinstance(found, Finding):
        return found
    free, cards = found["storage"]["free_bytes"], found["graphics"]["cards"]
    gpus = ", ".join(card["name"] for card in cards) or "no GPU"
    text = f"{_machine(name, found)}, {gpus}, {format_bytes(free)} of disk free"
    need = _bytes_of_run(plan) if plan.shape is not None else 0
    if need > free:
        mend = "free some there, or name another box"
        return Finding("failed", f"{text}, and the run may need {format_bytes(need)}", mend)
    return _with_problems(name, text, found)


def _device(name: str, plan: Plan) -> Finding:
    found = _examined(name, "board")
    if isinstance(found, Finding):
        return found
    free = found["device"]["memory_available_bytes"]
    text = f"{_machine(name, found)}, {'unknown' if free is None else format_bytes(free)} free"
    if plan.shape is not None and free is not None:
        text += f"; the dense export takes about {format_bytes(_bytes_to_measure(plan))}"
        if _bytes_to_measure(plan) > free:
            return Finding("failed", text, "close programs there, or measure elsewhere")
    return _with_problems(name, text, found)


def _bytes_to_measure(plan: Plan) -> int:
    """Return the memory that the dense export takes at least; the pruned one is loaded beside it."""
    from edgeprune.exporters.sizes import file_bytes
    from edgeprune.profiles.runner import MEMORY_FACTOR

    return int(file_bytes(plan.known.config, plan.recipe.export.precision) * MEMORY_FACTOR)


def _examined(name: str, kind: hosts.Kind) -> dict[str, Any] | Finding:
    """Return what there is on a host for that kind of work, or why that cannot be told."""
    from edgeprune.remote import check
    from edgeprune.remote.connection import UnknownHostKey, Unreachable, connect

    try:
        with connect(replace(hosts.find(name), kind=kind)) as link:
            return check.examine(link)
    except (Unreachable, UnknownHostKey) as error:
        return Finding("failed", str(error), _look_at(name))


def _machine(name: str, found: dict[str, Any]) -> str:
    memory = found["device"]["memory_bytes"]
    return (
        f"{name}: {found['system']['os']}, Python {found['python']['version']}, "
        f"{'unknown' if memory is None else format_bytes(memory)} of memory"
    )


def _with_problems(name: str, text: str, found: dict[str, Any]) -> Finding:
    """Say, too, what is missing on a host and what would mend it."""
    problems = found["problems"]
    if not problems:
        return Finding("ok", text)
    state: State = "failed" if any(each["required"] for each in problems) else "warning"
    lines = [f"{each['what']} (to mend it: {each['mend']})" for each in problems]
    return Finding(state, "\n".join([text, *lines]), _look_at(name))


def _look_at(name: str) -> str:
    return f"edgeprune hosts check {shlex.quote(name)}"


# ---- the recipe


def _lengths(plan: Plan) -> Finding:
    recipe, longest = plan.recipe, _shape(plan)["max_position_embeddings"]
    lengths = {
        "prune.length": recipe.prune.length,
        "evaluate.window": recipe.evaluate.window,
        "profile.prompt + profile.generate": recipe.profile.prompt + recipe.profile.generate,
    }
    if recipe.recover is not None:
        lengths["recover.length"] = recipe.recover.length
    problems = [
        f"{name}: {length} tokens, and the model takes at most {longest}"
        for name, length in lengths.items()
        if longest is not None and length > longest
    ]
    if problems:
        return Finding("failed", "\n".join(problems), "ask for less")
    most = max(lengths.values())
    return Finding("ok", f"up to {most} tokens; the model takes {longest or 'any number'}")


def _text(spec: str) -> Finding:
    if not list(islice(read_texts(spec), 1)):
        return Finding("failed", f"{spec}: no text in it", "name another file or data set")
    return Finding("ok", f"{spec} can be read")


def _data(plan: Plan) -> Finding:
    from edgeprune.recovery.mixture import once_over, parse_sources

    wanted = plan.recipe.recover
    assert wanted is not None
    try:
        found = [each.spec for each in parse_sources(wanted.data)]
    except BadInput as error:
        raise BadInput(f"recover.data: {error}") from None
    here = [spec for spec in found if is_builtin(spec) or local_file(spec)]
    for spec in here:
        next(iter(read_rows(spec, COLUMNS)), None)
    elsewhere = [spec for spec in found if spec not in here]
    told = [f"{', '.join(here)} can be read"] if here else []
    told += [f"{', '.join(elsewhere)} will be read from the Hub"] if elsewhere else []
    times = (wanted.tokens + wanted.held_out) / once_over(wanted.data)
    if times <= MOST_TIMES:
        return Finding("ok", "; ".join(told))
    told += [
        f"there is so little of it that it is read about {times:.0f} times and learnt by heart"
    ]
    return Finding("warning", "; ".join(told), "name more text, or train on fewer tokens")


BEFORE = (
    Step("folder", "Output folder", _folder),
    Step("libraries", "Library versions", _libraries),
    Step("target", "Target", _target, needs_model=True),
    Step("prune-memory", "Memory for pruning", _prune_memory, needs_model=True, if_here=True),
    Step("train-memory", "Memory for training", _train_memory, True, True, if_here=True),
)
"""What the stages of a run find out by themselves."""
OF_THE_RUN = (
    Step("disk", "Disk", _disk, needs_model=True, if_here=True),
    Step("lengths", "Lengths", _lengths, needs_model=True),
    Step("calibration", "Calibration text", lambda plan: _text(plan.recipe.prune.calibration)),
    Step("evaluation", "Evaluation text", lambda plan: _text(plan.recipe.evaluate.text)),
    Step("data", "Training data", _data, if_recovers=True),
)
"""What a run checks in its first stage."""
