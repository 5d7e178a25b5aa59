"""Folders as finished runs leave them, with results that were never measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune import recipe as recipes
from edgeprune import report, runs, worker
from edgeprune.events import RunFinished, RunStarted
from edgeprune.log import LogWriter

LAYERS = 30
DENSE = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
PRUNED = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}
GONE = {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 1536}


def results(
    size: float = 97e6, speed: float = 100.0, perplexity: float = 62.3, model: str = "smol"
) -> dict[str, Any]:
    """Return results of a pruned model with these figures; its dense one is always the same."""
    dense = (118e6, 80.0, 27.1, [DENSE] * LAYERS)
    pruned = (size, speed, perplexity, [PRUNED] * (LAYERS - 1) + [GONE])
    profiles = {"dense": _profile("dense", *dense[:2]), "pruned": _profile("pruned", *pruned[:2])}
    means = {
        which: {key: entry["mean"] for key, entry in profile["summary"].items()}
        for which, profile in profiles.items()
    }
    shapes = {
        which: {
            "parameters": int(params),
            "decoder_parameters": int(params * 0.8),
            "layers": layers,
        }
        for which, params, layers in (("dense", 134.5e6, dense[3]), ("pruned", 102.7e6, pruned[3]))
    }
    stages = {
        "source": {
            "source": {"name": model, "kind": "hub", "revision": None},
            "inspection": shapes["dense"],
        },
        "prune": {"summary": {"seed": 0}, "inspection": shapes["pruned"]},
        "export-dense": {"parity": {"mean_kl": 0.2}},
        "export-pruned": {"parity": {"mean_kl": 0.3}},
        "evaluate": {"dense": _perplexity(dense[2]), "pruned": _perplexity(perplexity)},
        "profile": {
            "runs": [profiles["pruned"], profiles["dense"]],
            "ratios": {
                key: {"median": mean / means["dense"][key]} for key, mean in means["pruned"].items()
            },
        },
    }
    return report.build_results(recipes.demo(), stages)


def _profile(which: str, size: float, speed: float) -> dict[str, Any]:
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
