"""Who may import whom; `make check` follows the imports, and here no module escapes it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = ("cli", "cli_hosts", "cli_options", "cli_prune", "cli_runs")
SCREEN = {f"edgeprune.{name}" for name in ("__main__", *CLI, "console", "tables")}
HEAVY = ("torch", "transformers", "numpy", "textual", "datasets", "onnx", "onnxruntime")


def contract(name: str) -> dict[str, Any]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = settings["tool"]["importlinter"]["contracts"]
    return next(each for each in found if each["name"] == name)


def imports_of(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def modules_loaded_by(*arguments: str) -> set[str]:
    code = (
        "import sys; from edgeprune.__main__ import main; main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_every_module_is_the_engines_or_the_screens() -> None:
    engine = set(contract("The engine knows no screen")["source_modules"])
    modules = {f"edgeprune.{path.stem}" for path in (ROOT / "edgeprune").glob("*.py")}
    modules -= {"edgeprune.__init__"}
    unlisted = modules - engine - SCREEN
    assert not unlisted, "add them to source_modules of the first contract in pyproject.toml"
    packages = ("exporters", "profiles", "recovery", "remote")
    assert engine - modules == {f"edgeprune.{name}" for name in packages}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "edgeprune/remote").glob("far_*.py")), ids=lambda path: path.stem
)
def test_what_is_sent_to_other_machines_needs_no_more_than_their_python(path: Path) -> None:
    ast.parse(path.read_text("utf-8"), feature_version=(3, 9))
    assert imports_of(path) <= set(sys.stdlib_module_names)


def test_the_runner_needs_only_what_a_board_has() -> None:
    others = imports_of(ROOT / "profiles" / "runner.py") - set(sys.stdlib_module_names)
    assert others <= {"numpy", "onnxruntime_genai"}


def test_the_modelling_file_runs_without_edgeprune() -> None:
    others = imports_of(ROOT / "edgeprune" / "nonuniform.py") - set(sys.stdlib_module_names)
    assert others <= {"torch", "transformers"}


@pytest.mark.parametrize("arguments", [("--help",), ("prune", "--help"), ("--version",), ()])
def test_help_waits_for_nothing(arguments: tuple[str, ...]) -> None:
    loaded = modules_loaded_by(*arguments)
    assert "edgeprune.cli" in loaded
    assert not loaded.intersection(HEAVY)


def test_the_package_is_lazy_and_complete() -> None:
    code = "import sys, edgeprune; assert not set(sys.modules) & {'torch', 'numpy'}"
    subprocess.run([sys.executable, "-c", code], check=True)
    import edgeprune

    assert all(callable(getattr(edgeprune, name)) for name in edgeprune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = edgeprune.nonsense
