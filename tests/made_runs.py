"""Folders as finished runs leave them, with results that were never measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import recipe as recipes
from edgeprune import report, runs, worker
from edgeprune.events import RunFinished, RunStarted
from edgeprune.log import LogWriter
from edgeprune.remote import hosts

LAYERS = 30
DENSE = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
PRUNED = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}
DEVICE = {
    "cpu": "A Processor",
    "physical_cores": 2,
    "logical_cores": 4,
    "memory_bytes": 8 * 10**9,
    "os": "Linux",
    "versions": {"python": "3.11", "onnxruntime-genai": "0.9"},
}
GONE = {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 1536}


def results(
    size: float = 97e6,
    speed: float = 100.0,
    perplexity: float = 62.3,
    model: str = "smol",
    devices: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return results of a pruned model with these figures; its dense one is always the same.

    ``devices`` are ``document``s by name; absent: one of this machine.
    """
    dense = (118e6, 27.1, [DENSE] * LAYERS)
    pruned = (size, perplexity, [PRUNED] * (LAYERS - 1) + [GONE])
    shapes = {
        which: {
            "parameters": int(params),
            "decoder_parameters": int(params * 0.8),
            "layers": layers,
        }
        for which, params, layers in (("dense", 134.5e6, dense[2]), ("pruned", 102.7e6, pruned[2]))
    }
    stages = {
        "source": {
            "source": {"name": model, "kind": "hub", "revision": None},
            "inspection": shapes["dense"],
        },
        "prune": {"summary": {"seed": 0}, "inspection": shapes["pruned"]},
        "export-dense": {"bytes": dense[0], "parity": {"mean_kl": 0.2}},
        "export-pruned": {"bytes": size, "parity": {"mean_kl": 0.3}},
        "evaluate": {"dense": _perplexity(dense[1]), "pruned": _perplexity(perplexity)},
        "profile": {
            "devices": {hosts.LOCAL: document(size, speed)} if devices is None else devices
        },
    }
    return report.build_results(recipes.demo(), stages)


def document(
    size: float = 97e6, speed: float = 100.0, dense_speed: float = 80.0, **known: Any
) -> dict[str, Any]:
    """Return what is measured on a device; ``known`` are more of its entries, those of ``device`` added."""
    runs = {"pruned": _timed("pruned", size, speed), "dense": _timed("dense", 118e6, dense_speed)}
    dense = {key: entry["mean"] for key, entry in runs["dense"]["summary"].items()}
    return {
        "settings": {"threads": 2},
        "runs": list(runs.values()),
        "ratios": {
            key: {"median": entry["mean"] / dense[key]}
            for key, entry in runs["pruned"]["summary"].items()
        },
        **known,
        "device": DEVICE | known.get("device", {}),
    }


def _timed(which: str, size: float, speed: float) -> dict[str, Any]:
    slow = 1 / speed
    repetitions = [
        {
            "inter_token_seconds": [slow * (1 + (i * 7 % 11) / 100) for i in range(40)],
            "decode_tokens_per_second": speed * (1 + number / 100),
        }
        for number in range(5)
    ]
    means = {
        "file_bytes": size,
        "prefill_tokens_per_second": 10 * speed,
        "decode_tokens_per_second": speed,
        "time_to_first_token_seconds": 12 / speed,
        "peak_memory_bytes": 3 * size,
    }
    return {
        "role": report.ROLES[which],
        "repetitions": repetitions,
        "disturbed": 1,
        "summary": {
            key: {"mean": mean, "stdev": 0.05 * mean if "second" in key else None}
            for key, mean in means.items()
        },
    }


def _perplexity(value: float) -> dict[str, Any]:
    return {"token_perplexity": value, "word_perplexity": 3 * value, "tokens": 9000, "window": 512}


def finished(folder: Path, **figures: Any) -> Path:
    """Make ``folder`` that of a finished run with such ``results``."""
    folder.mkdir(parents=True)
    (folder / worker.RECIPE).write_text(recipes.demo().to_toml(), "utf-8")
    worker.write_state(folder, {"source": {"seconds": 2.0, "result": {}}})
    (folder / worker.RESULTS).write_text(report.to_json(results(**figures)), "utf-8")
    (folder / worker.REPORT).write_text("<html>", "utf-8")
    with LogWriter(folder / worker.EVENTS) as emit:
        emit(RunStarted(folder=str(folder), stages=["source"], pid=1))
        emit(RunFinished(results=worker.RESULTS, report=worker.REPORT, seconds=2.0))
    runs.remember(folder)
    return folder
