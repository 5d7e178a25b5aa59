"""The documents of a source as token ids: tokenized many at a time, shuffled in a bounded buffer, without end."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from edgeprune.errors import BadInput
from edgeprune.events import Emit, Note
from edgeprune.recovery.mixture import DataSource, Skipped, documents

# What waits to be drawn from, of each source, whichever is reached first.
BUFFER_DOCUMENTS, BUFFER_CHARACTERS = 2048, 8_000_000
# What is given to the tokenizer at once: enough for all of its threads.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1_000_000

Ids = np.ndarray[Any, np.dtype[Any]]


class Encoder:
    """Turns documents into token ids, each closed in the way that the tokenizer's model knows.

    A tokenizer that begins texts with BOS begins documents with it; EOS, or for want of it BOS, closes them. Neither
    is written twice where a chat template has written it already.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        begun = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
        self.begin: int | None = bos if begun else None
        self.end: int | None = bos if eos is None and not begun else eos
        pads = (tokenizer.pad_token_id, eos, bos, 0)
        self.padding: int = next(each for each in pads if each is not None)
        vocabulary = 1 + max(tokenizer.get_vocab().values())
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)

    def __call__(self, texts: list[str]) -> list[Ids]:
        """Return the token ids of each document."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [self._closed(ids) for ids in encoded["input_ids"]]

    def _closed(self, ids: list[int]) -> Ids:
        first = [] if self.begin is None or ids[:1] == [self.begin] else [self.begin]
        last = [] if self.end is None or ids[-1:] == [self.end] else [self.end]
        return np.array([*first, *ids, *last], self.dtype)

    def identity(self) -> str:
        """Return a SHA-256 of all that decides which ids a document gets."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend else self.tokenizer.get_vocab()
        if backend:  # these two are of the last call, whoever made it
            rules |= {"truncation": None, "padding": None}
        name = type(self.tokenizer).__name__
        what = [name, rules, self.tokenizer.chat_template, self.begin, self.end, self.padding]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Stream:
    """A source's documents as token ids, again and again, in another order each time.

    Args:
        source: what to read.
        revision: the commit of a data set of the Hub.
        encode: makes the token ids.
        wanted: how many tokens will be asked for, about: what the warning of an exhausted source compares with.
        seed: of the order.
        held_out: documents that are passed over, by ``fingerprint``; the caller may add to it while it reads.
        emit: is told when the source begins anew.
    """

    def __init__(
        self,
        source: DataSource,
        revision: str | None,
        encode: Encoder,
        *,
        wanted: int,
        seed: str,
        held_out: set[bytes],
        emit: Emit,
    ) -> None:
        self.source, self.skipped, self.tokens, self.epochs = source, Skipped(), 0, 0
        self.holds: int | None = None
        """All its tokens but the held-out ones, once it ran dry."""
        self._revision, self._encode, self._wanted = revision, encode, wanted
        self._seed, self.held_out, self._emit = seed, held_out, emit

    def __iter__(self) -> Iterator[Ids]:
        """Yield documents without end; BadInput if the source has no more of which all are held out."""
        for self.epochs in itertools.count():
            before = self.tokens
            for ids in self._epoch():
                # a single token has no next one to learn
                if len(ids) < 2 or fingerprint(ids) in self.held_out:
                    continue
                self.tokens += len(ids)
                yield ids
            if self.tokens == before:
                raise self._too_little()
            if not self.epochs:
                self.holds = self.tokens
                self._emit(repeated(self.source, self.holds, self._wanted))

    def _epoch(self) -> Iterator[Ids]:
        # what is skipped is counted once
        skipped = Skipped() if self.epochs else self.skipped
        texts = documents(
            self.source, self._encode.tokenizer, revision=self._revision, skipped=skipped
        )
        chance = random.Random(f"{self._seed} {self.epochs}")
        for batch in _batches(shuffled(texts, chance)):
            yield from self._encode(batch)

    def _too_little(self) -> BadInput:
        held = f", and all {self.tokens:,} tokens of it are held out" if self.tokens else ""
        return BadInput(
            f"{self.source.spec} has too little text{held}; give a longer text, one with more "
            "documents, or hold out less"
        )


def repeated(source: DataSource, holds: int, wanted: int) -> Note:
    """Return the warning of a source of which more tokens are wanted than it holds."""
    return Note(
        level="warning",
        text=f"{source.spec} holds {holds:,} tokens and {wanted:,} are asked of it: it is read about "
        f"{wanted / holds:.1f} times (epochs)",
    )


def fingerprint(ids: Ids) -> bytes:
    """Return 16 bytes that tell documents apart."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def shuffled(texts: Iterable[str], chance: random.Random) -> Iterator[str]:
    """Yield all texts in another order, of which no more wait than the buffer holds."""
    waiting: list[str] = []
    characters = 0
    for text in texts:
        waiting.append(text)
        characters += len(text)
        while len(waiting) >= BUFFER_DOCUMENTS or characters >= BUFFER_CHARACTERS:
            drawn = chance.randrange(len(waiting))
            waiting[drawn], waiting[-1] = waiting[-1], waiting[drawn]
            characters -= len(waiting[-1])
            yield waiting.pop()
    chance.shuffle(waiting)
    yield from waiting


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
