"""Sources of text for recovery: what users write, and rows of every shape as documents."""

from __future__ import annotations

import gzip
import json
import math
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors

from edgeprune import texts
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.recovery.mixture import (
    ADAPT_PRUNER,
    DataSource,
    Skipped,
    Unreachable,
    documents,
    look_up,
    once_over,
    parse_sources,
)
from tests import tiny

ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
AS_CHAT = "<|begin|>user\nWhy?<|end|>\n<|begin|>assistant\nBecause.<|end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def write_lines(path, rows):
    data = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(tmp_path, tokenizer, *rows):
    return list(documents(DataSource(write_lines(tmp_path / "a.jsonl", rows)), tokenizer))


# ---- what users write


def test_a_source_has_the_weight_1_or_its_own(tmp_path):
    for name in ("a.txt", "b=2.jsonl", "c.txt"):
        (tmp_path / name).write_text("text")
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b=2.jsonl", "c.txt"))
    found = parse_sources([a, b, f"{c}=0.5", "owner/set:en:train=3e6", "builtin=2"])
    assert [(each.spec, each.weight) for each in found] == [
        (a, 1.0),
        (b, 1.0),  # a file may have such a name
        (c, 0.5),
        ("owner/set:en:train", 3e6),
        ("builtin", 2.0),
    ]


def test_how_much_there_is_to_read_is_told_by_sizes_and_weights(tmp_path):
    text, packed = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    text.write_text("word " * 8000)
    packed.write_bytes(b"." * 4000)
    assert once_over([str(text)]) == 10_000
    assert once_over([str(packed)]) == 3_000
    # of three tokens in four the second file runs dry first
    assert once_over([str(text), f"{packed}=3"]) == 4_000
    assert once_over(["adapt-pruner"]) == once_over(["owner/set"]) == math.inf
    assert once_over(["builtin", "owner/set"]) == 2 * once_over(["builtin"])


def test_the_papers_mixture_has_nine_sources_with_tokens_and_licences():
    assert parse_sources(["adapt-pruner"]) == list(ADAPT_PRUNER)
    assert len(ADAPT_PRUNER) == 9
    assert sum(each.weight for each in ADAPT_PRUNER) == pytest.approx(3.91e9, rel=0.01)
    assert all(each.licence for each in ADAPT_PRUNER)


def test_a_mixture_shares_the_weight_that_it_is_given():
    found = parse_sources(["adapt-pruner=0.8", "builtin=0.2"])
    assert sum(each.weight for each in found[:-1]) == pytest.approx(0.8)
    assert found[0].weight / found[1].weight == pytest.approx(1.80 / 0.66)


def test_a_source_of_the_paper_named_alone_brings_its_licence():
    assert parse_sources(["openbmb/UltraInteract_sft"])[0].licence == "MIT"


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ([], "nothing to train on"),
        (["no/such.txt"], "there is no file"),
        (["./here"], "there is no file"),
        (["."], "is a folder"),
        (["builtin=-1"], "no weight above 0"),
        (["builtin=0"], "no weight above 0"),
        (["builtin=nan"], "no weight above 0"),
        (["builtin=inf"], "no weight above 0"),
        (["builtin=much"], "no weight above 0"),
        (["=2"], "no weight above 0"),
        (["builtin", "builtin=2"], "named twice"),
        (["builtin", "adapt-pruner"], "needs a weight"),
        (["adapt-pruner=1", "Open-Orca/OpenOrca=1"], "named twice"),
        (["some words"], "neither a file"),
        (["a:b:c:d"], "names no text"),
    ],
)
def test_bad_sources_are_refused_in_one_line(specs, says):
    with pytest.raises(BadInput, match=says) as refused:
        parse_sources(specs)
    assert "\n" not in str(refused.value)


def test_one_file_by_two_names_is_one_source(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="named twice"):
        parse_sources(["a.txt", str(tmp_path / "a.txt")])


# ---- rows into documents


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversation": ASKED, "toxic": False},
        {
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]
        },
        {"messages": [{"role": "system", "content": " "}, *ASKED]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "context": None, "response": "Because.", "category": "qa"},
        {"system_prompt": "", "question": "Why?", "response": "Because."},
        # the model's own template wins over a text rendered with another's
        {"text": "### Why?", "messages": ASKED, "prompt": "Why?"},
        {"text": "### Why?", "instruction": "Why?", "output": "Because."},
        {"messages": None, "instruction": "Why?", "output": "Because."},
    ],
)
def test_every_shape_of_chat_is_rendered_with_the_template(tmp_path, tokenizer, row):
    assert read(tmp_path, tokenizer, row) == [AS_CHAT]


def test_system_prompts_and_inputs_are_part_of_the_chat(tmp_path, tokenizer):
    orca = {"system_prompt": "Be brief.", "question": "Why?", "response": "Because."}
    alpaca = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    dolly = {"instruction": "Add.", "context": "1, 2", "response": "3"}
    added = "<|begin|>user\nAdd.\n\n1, 2<|end|>\n<|begin|>assistant\n3<|end|>"
    assert read(tmp_path, tokenizer, orca, alpaca, dolly) == [
        f"<|begin|>system\nBe brief.<|end|>\n{AS_CHAT}",
        added,
        added,
    ]


@pytest.mark.parametrize("column", texts.COLUMNS)
def test_plain_text_columns_are_taken_as_they_are(tmp_path, tokenizer, column):
    text = " A text.\n\nWith two paragraphs. \n"
    assert read(tmp_path, tokenizer, {column: text, "id": 1}) == [text]


def test_without_a_template_a_chat_is_readable_text(tmp_path):
    bare = tiny.tokenizer()
    bare.chat_template = None
    assert read(tmp_path, bare, {"messages": ASKED}) == ["User: Why?\n\nAssistant: Because."]


def test_a_template_without_system_prompts_gets_them_in_the_question(tmp_path):
    strict = tiny.tokenizer()
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    strict.chat_template = refuses + tiny.CHAT_TEMPLATE
    row = {"system_prompt": "Be brief.", "question": "Why?", "response": "Because."}
    assert read(tmp_path, strict, row) == [AS_CHAT.replace("Why?", "Be brief.\n\nWhy?")]


def test_bad_rows_are_skipped_and_counted(tmp_path, tokenizer):
    bad = [
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [*ASKED, {"role": "user", "content": " "}]},
        {"messages": ["Why?", "Because."]},
        {"messages": [{"content": "Why?"}]},
        {"instruction": "Why?", "output": ""},
        {"text": None},
        {"text": "  \n"},
        {"title": "no text"},
        {"text": 7},
        [1, 2],
        None,
        3,
    ]
    skipped = Skipped()
    path = write_lines(tmp_path / "a.jsonl", [*bad, {"text": "good"}])
    assert list(documents(DataSource(path), tokenizer, skipped=skipped)) == ["good"]
    assert skipped.rows == len(bad)


def test_a_template_that_refuses_a_chat_skips_it(tmp_path):
    strict = tiny.tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert read(tmp_path, strict, {"messages": ASKED}, {"text": "good"}) == ["good"]


def test_all_bad_rows_are_refused_with_the_columns_found(tmp_path, tokenizer):
    with pytest.raises(BadInput, match="its columns are body, title;") as refused:
        read(tmp_path, tokenizer, {"title": "x"}, {"body": "y"})
    assert "a.jsonl" in str(refused.value)


def test_a_source_that_is_useless_for_long_is_given_up(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("edgeprune.recovery.mixture.MOST_USELESS", 5)
    with pytest.raises(BadInput, match="in 5 rows"):
        read(tmp_path, tokenizer, *[{"body": "x"}] * 9, {"text": "too late"})


def test_a_long_text_is_cut_at_ends_of_lines_and_nothing_is_lost(tmp_path, tokenizer):
    text = "".join(f"line {n}: äöü and some words\r\n" for n in range(4000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "one-line.txt").write_text(text.replace("\r\n", " "))
    (tmp_path / "no-blank.txt").write_text("x" * 70_000)
    rows = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    for path in (tmp_path / "a.txt", rows):
        pieces = list(documents(DataSource(str(path)), tokenizer))
        assert "".join(pieces) == text
        assert all(len(p) <= texts.LONGEST_ROW and p.endswith("\n") for p in pieces)
        assert len(pieces) < 8
    pieces = list(documents(DataSource(str(tmp_path / "one-line.txt")), tokenizer))
    assert all(p.endswith(" ") for p in pieces)
    pieces = list(documents(DataSource(str(tmp_path / "no-blank.txt")), tokenizer))
    assert [len(p) for p in pieces] == [32_768, 32_768, 4464]


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"]
)
def test_local_files_of_every_kind(tmp_path, tokenizer, name):
    rows = {
        "txt": b"One text.",
        "jsonl": b'{"text": "One text."}\n',
        "json": b'[{"text": "One text."}]',
    }
    data = rows[name.split(".")[1]]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(documents(DataSource(str(tmp_path / name)), tokenizer)) == ["One text."]


@pytest.mark.parametrize(
    "value",
    [
        {"messages": ASKED},
        [{"messages": ASKED}],
        {"version": 1, "data": [{"messages": ASKED}]},
    ],
)
def test_chats_in_json(tmp_path, tokenizer, value):
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert list(documents(DataSource(str(tmp_path / "a.json")), tokenizer)) == [AS_CHAT]


def test_chats_in_parquet(tmp_path, tokenizer):
    table = pa.table({"prompt": ["Why?", "Oh"], "messages": [ASKED, None], "text": [None, "plain"]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = documents(DataSource(str(tmp_path / "a.parquet")), tokenizer)
    assert list(found) == [AS_CHAT, "plain"]


def test_a_table_without_a_known_column_is_refused(tmp_path, tokenizer):
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="it has id, body"):
        list(documents(DataSource(str(tmp_path / "a.parquet")), tokenizer))


def test_files_are_streamed(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "bad\n')
    found = documents(DataSource(str(tmp_path / "a.jsonl")), tokenizer)
    assert next(found) == "good"
    with pytest.raises(BadInput, match="line 2"):
        next(found)


def test_builtin_documents(tokenizer):
    assert next(documents(DataSource("builtin"), tokenizer)) in next(texts.read_texts("builtin"))


# ---- the Hub


def test_a_data_set_of_the_hub_is_streamed_at_its_commit(monkeypatch, tokenizer):
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        return datasets.Dataset.from_list([{"messages": ASKED}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource("owner/set:default:train_sft")
    assert list(documents(source, tokenizer, revision="abc")) == [AS_CHAT]
    options = {"split": "train_sft", "revision": "abc", "streaming": True}
    assert asked == [("owner/set", "default", options)]


def test_a_hub_that_fails_on_the_way_is_no_bug(monkeypatch, tokenizer):
    def rows():
        yield {"text": "good"}
        raise OSError("connection reset")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    found = documents(DataSource("owner/set"), tokenizer)
    with pytest.raises(EdgepruneError, match=r"owner/set.*connection reset"):
        list(found)


def test_a_gated_data_set_says_what_to_do(monkeypatch, tokenizer):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("'lmsys/x' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadInput, match=r"gated: accept its terms.*hf auth login"):
        list(documents(DataSource("lmsys/x"), tokenizer))


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "mit"}, "mit"),
        ({"license": ["mit", "cc0-1.0"]}, "mit, cc0-1.0"),
        (None, "not known: see https://huggingface.co/datasets/owner/set"),
    ],
)
def test_commit_and_licence_are_looked_up(monkeypatch, card, licence):
    found = SimpleNamespace(sha="abc", card_data=card)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_: found)
    assert look_up(DataSource("owner/set:en")) == (DataSource("owner/set:en", 1.0, licence), "abc")
    assert look_up(DataSource("owner/set", 1.0, "own"))[0].licence == "own"


def test_local_sources_are_not_looked_up(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for source in (DataSource("builtin"), DataSource(str(tmp_path / "a.txt"))):
        assert look_up(source) == (source, None)


def test_what_the_hub_does_not_have_or_cannot_say(monkeypatch):
    with pytest.raises(Unreachable, match="cannot be asked"):  # tests are offline
        look_up(DataSource("owner/set"))

    def unknown(*_):
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise errors.RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    with pytest.raises(BadInput, match="no such text") as refused:
        look_up(DataSource("owner/set"))
    assert not isinstance(refused.value, Unreachable)
