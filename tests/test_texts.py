import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgeprune.errors import BadInput
from edgeprune.texts import read_texts, text_hash

DOCUMENTS = ["The first document.\nTwo lines.", "Größe, naïve, 漢字: the second."]


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_json_lines(column="text"):
    return "\n".join(json.dumps({column: d, "meta": 1}) for d in DOCUMENTS).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("column", ["text", "page", "content"])
def test_json_lines(tmp_path, name, column):
    assert list(read_texts(write(tmp_path / name, as_json_lines(column)))) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "wiki.valid.raw", "wiki.valid.raw.gz"])
def test_plain_text_is_one_document_to_the_byte(tmp_path, name):
    text = "\n\n".join(DOCUMENTS) + "\n"
    assert list(read_texts(write(tmp_path / name, text.encode()))) == [text]


@pytest.mark.parametrize(
    "value",
    [
        DOCUMENTS,
        [{"text": d} for d in DOCUMENTS],
        {"data": [{"content": d} for d in DOCUMENTS], "version": 1},
    ],
)
def test_json(tmp_path, value):
    path = write(tmp_path / "a.json", json.dumps(value).encode())
    assert list(read_texts(str(path))) == DOCUMENTS


def test_parquet(tmp_path):
    pq.write_table(pa.table({"id": [1, 2], "text": DOCUMENTS}), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.parquet")) == DOCUMENTS


def test_builtin_texts_are_english_and_do_not_overlap():
    calibration, held_out = list(read_texts("builtin")), list(read_texts("builtin-heldout"))
    paragraphs = [{p for d in part for p in d.split("\n\n")} for part in (calibration, held_out)]
    assert not paragraphs[0] & paragraphs[1]
    for documents in (calibration, held_out):
        assert sum(map(len, documents)) > 100_000
        assert " the " in documents[0]
    assert text_hash(calibration) == text_hash(read_texts("builtin")) != text_hash(held_out)


def test_blank_documents_are_left_out(tmp_path):
    lines = b'{"text": ""}\n\n{"text": "  "}\n{"text": "here"}\n'
    assert list(read_texts(write(tmp_path / "a.jsonl", lines))) == ["here"]


def test_json_lines_are_streamed(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n{"text": "bad\n')
    documents = read_texts(path)
    assert next(documents) == "good"
    with pytest.raises(BadInput, match="line 2"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt.gz", b"", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "is empty"),
        ("a.txt", bytes(range(256)) * 20, "is binary"),
        ("a.jsonl", b"\x80\x02}q\x00X\x05\x00" * 50, "is binary"),
        ("a.txt.gz", b"not gzip at all", "cannot be read"),
        ("a.jsonl", b'{"title": "x"}\n', "no text column"),
        ("a.jsonl", b"[1, 2]\n", "no text column"),
        ("a.json", b"{]", "not valid JSON"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as parquet"),
    ],
)
def test_bad_file_is_refused_in_one_line(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if says == "is empty" and name == "a.txt.gz" else data)
    with pytest.raises(BadInput, match=says) as refused:
        read_texts(path)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)


def test_a_gzip_that_was_cut_is_refused(tmp_path):
    whole = gzip.compress(b"words and words " * 5000)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        read_texts(tmp_path / "a.txt.gz")


def test_parquet_without_a_text_column(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"no text column.*id, body"):
        read_texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("spec", ["no/such/file.txt", "./nothing", "missing.jsonl.gz", "."])
def test_missing_file(spec):
    with pytest.raises(BadInput, match=r"there is no file|is a folder"):
        read_texts(spec)


@pytest.mark.parametrize("spec", ["nobody/no-such-data-set", "nobody/none:en:validation"])
def test_unknown_data_set(spec):
    with pytest.raises(BadInput, match="neither a file nor a data set"):
        read_texts(spec)


@pytest.mark.parametrize("spec", [":en", "a:b:c:d"])
def test_spec_that_names_nothing(spec):
    with pytest.raises(BadInput, match=r"name\[:config\]\[:split\]"):
        read_texts(spec)


def test_wikitext_is_read_to_the_byte(shared):
    (text,) = read_texts(shared / "data" / "text" / "wiki.valid.raw.gz")
    assert len(text.encode()) == 1_146_846
