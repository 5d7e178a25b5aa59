"""Prepares training data in a process of its own: prints ready, waits for a line, prints what came of it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from edgeprune.events import Event, Progress
from edgeprune.recovery.mixture import parse_sources
from edgeprune.recovery.packing import prepare


def main(source: str, tokenizer: str, cache: str, dies: str) -> None:
    heard = 0

    def emit(event: Event) -> None:
        nonlocal heard
        if isinstance(event, Progress) and event.unit == "tokens":
            heard += 1
            time.sleep(0.002)
            if dies == "dies" and heard == 20:
                os._exit(9)  # as if killed: nothing is cleaned up

    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    print("ready", flush=True)
    sys.stdin.readline()
    training, _ = prepare(
        parse_sources([source]),
        loaded,
        tokens=4000,
        length=32,
        held_out=200,
        cache=Path(cache),
        emit=emit,
    )
    total = int(training.batch(range(len(training))).input_ids.sum())
    print(json.dumps({"made": heard > 0, "sum": total}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
