"""Training sequences: documents packed without mixing, shares by weight, a cache that can be trusted."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from edgeprune import machine
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Note, Progress
from edgeprune.recovery import streams
from edgeprune.recovery.mixture import DataSource, documents
from edgeprune.recovery.packing import IGNORED, Packed, _Writer, prepare
from edgeprune.recovery.streams import Encoder, shuffled
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the", "model", "layer", "of", "text", "and", "width", "prunes", "each", "token", "it")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def texts_of(name, count, seed=0):
    """Return as many different texts of 1 to 30 words, which begin with ``name``."""
    chance = random.Random(f"{name} {seed}")
    return [
        f"{name}{n} {' '.join(chance.choices(WORDS, k=chance.randint(1, 30)))}"
        for n in range(count)
    ]


def source_of(folder, name, count=200, weight=1.0, seed=0):
    path = folder / f"{name}.jsonl"
    rows = texts_of(name, count, seed)
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    return DataSource(str(path), weight)


def made(tmp_path, tokenizer, *sources, **options):
    """Prepare with small numbers; return the two parts and the events."""
    events = []
    numbers = {"tokens": 3000, "length": 64, "held_out": 300, "seed": 0} | options
    parts = prepare(sources, tokenizer, cache=tmp_path / "cache", emit=events.append, **numbers)
    return *parts, events


def everything(packed):
    return packed.batch(range(len(packed)))


def unpacked(packed):
    """Return the token ids of each document, put together over the ends of sequences."""
    batch = everything(packed)
    found = [[]]
    for row in range(len(packed)):
        for n in range(packed.length):
            if row * packed.length + n == packed.tokens:
                break
            found[-1].append(int(batch.input_ids[row, n]))
            if batch.labels[row, n] == IGNORED:
                found.append([])
    return found[:-1]


def texts_in(packed, tokenizer):
    """Return the documents as text; the last may be cut."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in unpacked(packed)]


def notes(events, level="warning"):
    return [e.text for e in events if isinstance(e, Note) and e.level == level]


def is_empty(folder):
    return not [path for path in folder.glob("*") if not path.name.endswith(".lock")]


# ---- sequences


@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=30),
    length=st.integers(2, 9),
    dtype=st.sampled_from([np.uint16, np.uint32]),
    cut=st.integers(0, 1),
)
def test_packing_is_undone_and_never_mixes_documents(tmp_path_factory, lengths, length, dtype, cut):
    folder = tmp_path_factory.mktemp("packed") / "part"
    top = np.iinfo(dtype).max
    found = [np.arange(top - n, top, dtype=dtype) for n in lengths]
    wanted = sum(lengths) - cut
    writer = _Writer(folder, SimpleNamespace(dtype=np.dtype(dtype), padding=7), length, wanted)
    for ids in found:
        writer.add(ids)
    writer.close()
    packed = Packed(folder)

    places = [(d, n) for d, size in enumerate(lengths) for n in range(size)][:wanted]
    following = [*places[1:], (-1, 0)]
    assert (packed.tokens, packed.length, len(packed)) == (wanted, length, -(-wanted // length))
    assert packed.targets == wanted - len(lengths)
    batch = everything(packed)
    for each in (batch.input_ids, batch.labels, batch.positions, batch.documents):
        assert each.dtype == torch.int64
        assert each.shape == (len(packed), length)
    assert int((batch.labels != IGNORED).sum()) == packed.targets
    for row in range(len(packed)):
        first = row * length
        for n in range(length):
            at = first + n
            ids, label, position, number = (
                int(each[row, n])
                for each in (batch.input_ids, batch.labels, batch.positions, batch.documents)
            )
            if at >= wanted:  # padding, apart from everything
                assert (ids, label, position) == (7, IGNORED, at - wanted)
                assert number == len({d for d, _ in places[first:]})
                continue
            document, index = places[at]
            same = following[at][0] == document
            assert ids == found[document][index]
            assert label == (found[document][index + 1] if same else IGNORED)
            assert position == min(index, n)
            assert number == document - places[first][0]


def test_rows_are_given_in_the_order_asked_for(tmp_path, tokenizer):
    training, _, _ = made(tmp_path, tokenizer, source_of(tmp_path, "a"))
    whole = everything(training)
    some = training.batch([5, 0, 5])
    for name in ("input_ids", "labels", "positions", "documents"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[[5, 0, 5]])
    assert training.batch([]).labels.shape == (0, 64)
    for wrong in (-1, len(training)):
        with pytest.raises(IndexError):
            training.batch([wrong])


def test_a_pickled_copy_opens_the_same_folder(tmp_path, tokenizer):
    training, _, _ = made(tmp_path, tokenizer, source_of(tmp_path, "a"))
    pickled = pickle.dumps(training)
    assert len(pickled) < 1000
    assert torch.equal(everything(pickle.loads(pickled)).labels, everything(training).labels)


# ---- token ids


def test_eos_closes_a_document_once(tokenizer):
    encode = Encoder(tokenizer)
    plain, chat = encode(["plain", "<|begin|>user\nWhy?<|end|>"])
    assert (plain[-1], list(chat).count(1)) == (1, 1)
    assert encode.begin is None
    assert plain.dtype == np.uint16


def test_a_tokenizer_that_begins_with_bos_begins_documents_with_it_once():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    plain, chat = Encoder(tokenizer)(["plain", "<|begin|>user\nWhy?<|end|>"])
    assert (plain[0], plain[-1]) == (0, 1)
    assert list(chat).count(0) == 1


def test_a_tokenizer_without_eos_closes_with_bos_or_not_at_all():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    assert Encoder(tokenizer)(["plain"])[0][-1] == 0
    tokenizer.bos_token = None
    assert Encoder(tokenizer).end is None


def test_a_large_vocabulary_takes_four_bytes(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: {"a": 1 << 16})
    assert Encoder(tokenizer).dtype == np.uint32


def test_a_tokenizer_is_told_by_what_it_does_and_not_by_its_last_call():
    tokenizer = tiny.tokenizer()
    first = Encoder(tokenizer).identity()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert Encoder(tokenizer).identity() == first == Encoder(tiny.tokenizer()).identity()
    tokenizer.chat_template = "{{ messages }}"
    assert Encoder(tokenizer).identity() != first
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    assert Encoder(tokenizer).identity() != first


def test_shuffling_keeps_every_document_in_a_bounded_buffer(monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_DOCUMENTS", 10)
    drawn = 0

    def counted():
        nonlocal drawn
        for drawn in range(1, 101):
            yield str(drawn)

    found = []
    for text in shuffled(counted(), random.Random(0)):
        found.append(text)
        assert drawn - len(found) < 10
    assert sorted(found, key=int) == [str(n) for n in range(1, 101)] != found
    monkeypatch.setattr(streams, "BUFFER_CHARACTERS", 3)
    assert len(list(shuffled(["long enough", "a", "b", "c"], random.Random(0)))) == 4


# ---- preparing


def test_documents_are_whole_and_held_out_ones_are_not_trained_on(tmp_path, tokenizer):
    source = source_of(tmp_path, "a", count=400)
    training, held_out, events = made(tmp_path, tokenizer, source, tokens=6000, held_out=500)
    assert (training.tokens, held_out.tokens) == (6000, 500)
    assert (len(training), len(held_out)) == (94, 8)
    trained, kept = texts_in(training, tokenizer), texts_in(held_out, tokenizer)
    known = set(documents(source, tokenizer))
    assert set(trained[:-1]) | set(kept[:-1]) <= known
    assert any(text.startswith(trained[-1]) for text in known)
    assert len(trained) == len(set(trained))
    assert not set(trained) & set(kept)
    assert trained[:-1] != [text for text in documents(source, tokenizer) if text in trained[:-1]]
    assert not notes(events)


def test_shares_are_those_of_the_weights_to_within_a_document(tmp_path, tokenizer):
    weights = {"x": 5.0, "y": 3.0, "z": 0.5}
    sources = [source_of(tmp_path, name, 300, weight) for name, weight in weights.items()]
    training, held_out, _ = made(tmp_path, tokenizer, *sources, tokens=5000, held_out=600)
    longest = max(len(ids) for ids in unpacked(training))
    for part in (training, held_out):
        found = unpacked(part)
        for name, weight in weights.items():
            mine = [ids for ids in found if tokenizer.decode(ids).startswith(name)]
            assert abs(sum(map(len, mine)) - part.tokens * weight / 8.5) <= longest


def test_the_same_call_gives_the_same_data_and_another_seed_another_order(tmp_path, tokenizer):
    source = source_of(tmp_path, "a", count=400)
    first, again = (
        everything(made(tmp_path / name, tokenizer, source)[0]).input_ids for name in "ab"
    )
    assert torch.equal(first, again)
    other = everything(made(tmp_path, tokenizer, source, seed=1)[0]).input_ids
    assert not torch.equal(first, other)


def test_a_source_that_runs_dry_begins_anew_without_what_is_held_out(tmp_path, tokenizer):
    source = source_of(tmp_path, "a", count=30)
    holds = sum(map(len, Encoder(tokenizer)(list(documents(source, tokenizer)))))
    training, held_out, events = made(
        tmp_path, tokenizer, source, tokens=3 * holds, held_out=holds // 4
    )
    (warning,) = notes(events)
    assert f"a.jsonl holds {holds:,} tokens" in warning
    assert "about 3.2 times (epochs)" in warning or "about 3.3 times (epochs)" in warning
    _, _, events = made(tmp_path, tokenizer, source, tokens=3 * holds, held_out=holds // 4)
    assert notes(events) == [warning], "of what is prepared already, too"
    trained, kept = texts_in(training, tokenizer), texts_in(held_out, tokenizer)
    assert training.tokens == 3 * holds
    whole = [text for text in documents(source, tokenizer) if text in kept[:-1]]
    assert len(whole) == len(kept) - 1
    assert not set(trained) & set(whole)
    assert all(3 <= trained.count(text) <= 6 for text in set(trained[:-1]))


def test_a_document_that_occurs_twice_is_not_both_held_out_and_trained_on(tmp_path, tokenizer):
    one, two = source_of(tmp_path, "a", count=100), source_of(tmp_path, "b", count=5)
    Path(two.spec).write_bytes(Path(one.spec).read_bytes() + b"\n" + Path(one.spec).read_bytes())
    training, held_out, _ = made(tmp_path, tokenizer, one, two, held_out=600)
    kept = texts_in(held_out, tokenizer)
    assert len(kept) == len(set(kept))
    assert not set(texts_in(training, tokenizer)[:-1]) & set(kept[:-1])


def test_a_source_of_one_document_cannot_be_held_out_of(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One document and no other.")
    with pytest.raises(BadInput, match="too little text, and all"):
        made(tmp_path, tokenizer, DataSource(str(tmp_path / "a.txt")))
    assert is_empty(tmp_path / "cache")
    training, held_out, _ = made(
        tmp_path, tokenizer, DataSource(str(tmp_path / "a.txt")), held_out=0
    )
    assert (training.tokens, held_out.tokens, len(held_out)) == (3000, 0, 0)
    assert held_out.batch([]).input_ids.shape == (0, 64)


def test_licences_come_first_and_progress_ends_at_the_total(tmp_path, tokenizer):
    sources = [DataSource("builtin", licence="PSF"), source_of(tmp_path, "a")]
    *_, events = made(tmp_path, tokenizer, *sources)
    assert notes(events[:2], "info") == [
        "builtin: licence PSF",
        f"{tmp_path}/a.jsonl: licence not known",
    ]
    tokens = [e for e in events if isinstance(e, Progress) and e.unit == "tokens"]
    assert {(e.stage, e.total) for e in tokens} == {("data", 3300)}
    assert [e.done for e in tokens] == sorted(e.done for e in tokens)
    assert tokens[-1].done == 3300
    assert {e.note for e in tokens} == {"builtin", f"{tmp_path}/a.jsonl"}


def test_skipped_rows_are_told(tmp_path, tokenizer):
    source = source_of(tmp_path, "a")
    with Path(source.spec).open("a") as file:
        file.write('\n{"text": null}\n{"title": "x"}\n')
    *_, events = made(tmp_path, tokenizer, source)
    assert notes(events)[-1].endswith("a.jsonl: rows without text that were skipped: 2")


def test_rows_that_are_all_bad_are_refused_and_leave_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(BadInput, match="columns are title"):
        made(tmp_path, tokenizer, DataSource(str(tmp_path / "a.jsonl")))
    assert is_empty(tmp_path / "cache")


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"length": 1}, "length of 2"),
        ({"tokens": 0}, "too few"),
        ({"held_out": -1}, "cannot be held out"),
    ],
)
def test_numbers_that_make_no_sense(tmp_path, tokenizer, numbers, says):
    with pytest.raises(BadInput, match=says):
        made(tmp_path, tokenizer, DataSource("builtin"), **numbers)
    with pytest.raises(BadInput, match="nothing to train on"):
        made(tmp_path, tokenizer)


# ---- the cache


@pytest.fixture
def unread(monkeypatch):
    """Return what forbids to read any source from then on."""

    def refuse(*_, **__):
        raise AssertionError("a source was read")

    return lambda: monkeypatch.setattr(streams, "documents", refuse)


def test_the_second_call_reads_no_source(tmp_path, tokenizer, unread):
    source = source_of(tmp_path, "a")
    first, _, _ = made(tmp_path, tokenizer, source)
    unread()
    os.utime(source.spec, (1, 1))
    moved = tmp_path / "moved.jsonl"
    Path(source.spec).rename(moved)
    again, _, events = made(tmp_path, tokenizer, DataSource(str(moved), 7.0))
    assert again.folder == first.folder
    assert any("licence" in text for text in notes(events, "info"))


def test_whatever_decides_the_data_names_it(tmp_path, tokenizer):
    a, b = source_of(tmp_path, "a"), source_of(tmp_path, "b")
    folders = [made(tmp_path, tokenizer, a, b)[0].folder]
    for options in ({"tokens": 2900}, {"length": 32}, {"held_out": 200}, {"seed": 3}):
        folders.append(made(tmp_path, tokenizer, a, b, **options)[0].folder)
    heavier = DataSource(b.spec, 2.0)
    folders.append(made(tmp_path, tokenizer, a, heavier)[0].folder)
    other = tiny.tokenizer()
    other.chat_template = None
    folders.append(made(tmp_path, other, a, b)[0].folder)
    before = Path(a.spec).stat()
    Path(a.spec).write_text(Path(a.spec).read_text().replace("model", "madel"))
    os.utime(a.spec, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert Path(a.spec).stat().st_size == before.st_size
    folders.append(made(tmp_path, tokenizer, a, b)[0].folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training/tokens.npy", lambda p: p.write_bytes(p.read_bytes()[:-2])),
        ("training/starts.npy", lambda p: p.write_bytes(b"")),
        ("held-out/packed.json", lambda p: p.unlink()),
        ("held-out/packed.json", lambda p: p.write_text("{}")),
        ("held-out/starts.npy", lambda p: np.save(p, np.zeros(1, np.int64))),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, tokenizer, name, damage):
    source = source_of(tmp_path, "a")
    training, held_out, _ = made(tmp_path, tokenizer, source)
    before = [everything(part).input_ids for part in (training, held_out)]
    folder = training.folder.parent
    damage(folder / name)
    with pytest.raises(EdgepruneError, match="is damaged"):
        Packed((folder / name).parent)
    *parts, events = made(tmp_path, tokenizer, source)
    assert "damaged: it is made anew" in notes(events)[0]
    for part, ids in zip(parts, before, strict=True):
        assert torch.equal(everything(part).input_ids, ids)


def test_interrupted_work_leaves_nothing(tmp_path, tokenizer):
    def interrupt(event):
        if isinstance(event, Progress) and event.unit == "tokens" and event.done > 1000:
            raise KeyboardInterrupt

    source = source_of(tmp_path, "a")
    numbers = {"tokens": 3000, "length": 64, "held_out": 300, "cache": tmp_path / "cache"}
    with pytest.raises(KeyboardInterrupt):
        prepare([source], tokenizer, emit=interrupt, **numbers)
    assert is_empty(tmp_path / "cache")


def test_a_disk_without_room_is_told_before_and_during_the_work(tmp_path, tokenizer, monkeypatch):
    source = source_of(tmp_path, "a")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "disk_free", lambda _: 6599)
        with pytest.raises(BadInput, match=r"disk is full.*6\.60 kB"):
            made(tmp_path, tokenizer, source)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgepruneError, match=r"disk is full: the training data in .*cache"):
        made(tmp_path, tokenizer, source)
    assert is_empty(tmp_path / "cache")


def test_a_data_set_of_the_hub_is_named_by_its_commit(tmp_path, tokenizer, monkeypatch, unread):
    rows = [{"text": text} for text in texts_of("a", 200)]
    commit = SimpleNamespace(sha="1" * 40, card_data={"license": "mit"})
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: commit)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    )
    first, _, events = made(tmp_path, tokenizer, DataSource("owner/set"))
    assert notes(events, "info") == ["owner/set: licence mit"]
    commit.sha = "2" * 40
    second, _, _ = made(tmp_path, tokenizer, DataSource("owner/set"))
    assert second.folder != first.folder
    unread()

    def unreachable(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    again, _, events = made(tmp_path, tokenizer, DataSource("owner/set"))
    assert again.folder == second.folder
    assert "no network" in notes(events)[0]
    with pytest.raises(BadInput, match="no network"):
        made(tmp_path, tokenizer, DataSource("owner/other"))


def test_of_two_processes_one_prepares_also_after_one_was_killed(tmp_path, tokenizer):
    source = source_of(tmp_path, "a", count=400)
    cache = tmp_path / "cache"
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def start(how):
        arguments = (source.spec, tmp_path / "tokenizer", cache, how)
        command = [sys.executable, "-m", "tests.preparing", *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, **pipes)

    killed, other = started = [start("dies"), start("lives")]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 2
    killed.communicate("go\n", timeout=300)
    assert killed.returncode == 9
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".part"]

    other.stdin.write("go\n")
    other.stdin.flush()
    training, _, events = made(tmp_path, tokenizer, source, tokens=4000, length=32, held_out=200)
    found = json.loads(other.communicate(timeout=300)[0])
    made_here = any(isinstance(e, Progress) and e.unit == "tokens" for e in events)
    assert found == {"made": not made_here, "sum": int(everything(training).input_ids.sum())}
    assert [path for path in cache.iterdir() if path.is_dir()] == [training.folder.parent]
