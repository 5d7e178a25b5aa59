"""Calibration sequences: windows of real text, drawn afresh and reproducibly for each iteration."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.errors import BadInput
from edgeprune.texts import read_texts, text_hash

# Enough variety for any number of windows, and little enough to hold in memory.
MOST_CHARACTERS = 64_000_000
# English has 4-5 characters a token; a window of text this much longer than its tokens is nearly always enough.
CHARACTERS_PER_TOKEN = 8
MOST_MISSES = 1000


@dataclass(frozen=True)
class Calibration:
    """Documents to draw windows from. ``name`` is what the user called them."""

    name: str
    documents: list[str]
    hash: str

    def draw(self, tokenizer: Any, samples: int, length: int, seed: str) -> Tensor:
        """Return ``samples`` windows of ``length`` token ids, int64, the same for the same ``seed``.

        Each window starts at a random place of a random document. BadInput if the documents are
        too short for a single window.
        """
        chance = random.Random(seed)
        windows: list[list[int]] = []
        misses = 0
        while len(windows) < samples:
            window = self._window(tokenizer, length, chance)
            if window is not None:
                windows.append(window)
                continue
            misses += 1
            if misses >= MOST_MISSES and misses > 20 * len(windows):
                raise BadInput(
                    f"{self.name} has no documents of {length} tokens to calibrate on; "
                    f"give a longer text with --calibration FILE, or a smaller --length"
                )
        return torch.tensor(windows)

    def _window(self, tokenizer: Any, length: int, chance: random.Random) -> list[int] | None:
        document = chance.choice(self.documents)
        characters = length * CHARACTERS_PER_TOKEN
        start = chance.randint(0, max(0, len(document) - characters))
        if start:
            # begin at a word, as the tokens of half a word are rare ones
            start = max(document.find(" ", start, start + 100), start)
        text = document[start : start + characters]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids[:length] if len(ids) >= length else None


def read_calibration(spec: str) -> Calibration:
    """Read the documents of ``spec`` (see ``texts.read_texts``), up to 64 million characters."""
    documents = []
    room = MOST_CHARACTERS
    for document in read_texts(spec):
        documents.append(document[:room])
        room -= len(document)
        if room <= 0:
            break
    return Calibration(spec, documents, text_hash(documents))
