"""What recovery trains on: sources of text with weights, and their rows as documents.

A row becomes a document by the first of these that it has; a row that has none is skipped and counted:

1. chat messages (``messages``, ``conversations`` or ``conversation``), rendered with the model's chat template;
2. a question and its answer in columns of their own (``instruction`` or ``question``, ``output`` or ``response``, with
   or without ``input`` or ``context`` and ``system_prompt``), rendered as a chat of one turn;
3. a plain text (``text``, ``page`` or ``content``).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune import hub, texts
from edgeprune.errors import BadInput, one_line

CHATS = ("messages", "conversations", "conversation")
QUESTIONS, ANSWERS, EXTRAS = (
    ("instruction", "question"),
    ("output", "response"),
    ("input", "context"),
)
SYSTEM = "system_prompt"
COLUMNS = (*CHATS, *QUESTIONS, *ANSWERS, *EXTRAS, SYSTEM, *texts.COLUMNS)
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# So many rows without a single document, and the rest is not worth reading.
MOST_USELESS = 10_000
# Tokens that are never trained on: enough for a loss to 0.01 nats.
HELD_OUT = 20_000
# About how much text there is, before anything is read: of prose, more characters make a token, of code fewer.
CHARACTERS_A_TOKEN = 4
BUILTIN_TOKENS = 60_000
UNPACKED = {".gz": 3, ".parquet": 2}

Message = dict[str, str]


@dataclass(frozen=True)
class DataSource:
    """A text to train on: ``spec`` as ``texts.read_texts`` takes it, and its share of the tokens beside the others'."""

    spec: str
    weight: float = 1.0
    licence: str = ""
    """"" where it is not known."""


# The data of the paper's recovery (arXiv 2502.03460), weights in tokens. The licences are those that the data sets'
# own pages name; OpenHermes-2.5's names none.
ADAPT_PRUNER = (
    DataSource("Open-Orca/OpenOrca", 1.80e9, "MIT"),
    DataSource("allenai/WildChat-1M", 0.66e9, "ODC-BY 1.0"),
    DataSource(
        "lmsys/lmsys-chat-1m",
        0.49e9,
        "LMSYS-Chat-1M Dataset License Agreement (gated: accept it on the data set's page first)",
    ),
    DataSource("teknium/OpenHermes-2.5", 0.49e9, "none stated: see the data set's page"),
    DataSource("HuggingFaceH4/ultrachat_200k:default:train_sft", 0.20e9, "MIT"),
    DataSource("openbmb/UltraInteract_sft", 0.18e9, "MIT"),
    DataSource("O1-OPEN/OpenO1-SFT", 74e6, "Apache-2.0"),
    DataSource(
        "yahma/alpaca-cleaned",
        12e6,
        "CC BY 4.0 (the Alpaca data that it was made from: CC BY-NC 4.0)",
    ),
    DataSource("databricks/databricks-dolly-15k", 3.6e6, "CC BY-SA 3.0"),
)
MIXTURES = {"adapt-pruner": ADAPT_PRUNER}


# ---- what the user wrote


def parse_sources(specs: Sequence[str]) -> list[DataSource]:
    """Return the sources that ``SOURCE``, ``SOURCE=WEIGHT`` or the name of a mixture write.

    A mixture that stands alone brings its own weights (``adapt-pruner``: tokens); beside others it needs a weight,
    which its sources share. BadInput for a file that is not there, a weight that is no number above 0, a source that is
    named twice, or no source at all.
    """
    if not specs:
        raise BadInput(
            f"there is nothing to train on: give a file, a data set of the Hub, or {_names()}"
        )
    sources = [each for spec in specs for each in _parsed(spec, alone=len(specs) == 1)]
    seen: set[str] = set()
    for source in sources:
        path = _checked(source.spec)
        name = str(path.resolve()) if path else source.spec
        if name in seen:
            raise BadInput(f"{source.spec} is named twice; name it once, with the weight of both")
        seen.add(name)
    return sources


def once_over(specs: Sequence[str]) -> float:
    """Return about how many tokens can be read before the first of the sources, by their weights, begins anew.

    Told by the sizes of files; infinite for data sets of the Hub. BadInput as ``parse_sources``.
    """
    sources = parse_sources(specs)
    whole = sum(source.weight for source in sources)
    return min(_tokens_in(source.spec) * whole / source.weight for source in sources)


def _tokens_in(spec: str) -> float:
    if texts.is_builtin(spec):
        return BUILTIN_TOKENS
    path = texts.local_file(spec)
    if path is None:
        return math.inf
    return path.stat().st_size * UNPACKED.get(path.suffix, 1) / CHARACTERS_A_TOKEN


def _names() -> str:
    return " or ".join(f"the mixture {name}" for name in MIXTURES)


def _parsed(spec: str, *, alone: bool) -> Sequence[DataSource]:
    name, weight = _weighted(spec)
    if name not in MIXTURES:
        return [DataSource(name, 1.0 if weight is None else weight, _known_licence(name))]
    mixture = MIXTURES[name]
    if weight is None and not alone:
        raise BadInput(
            f"beside other sources the mixture {name} needs a weight; write it like {name}=4"
        )
    scale = 1.0 if weight is None else weight / sum(each.weight for each in mixture)
    return [replace(each, weight=each.weight * scale) for each in mixture]


def _weighted(spec: str) -> tuple[str, float | None]:
    name, equals, number = spec.rpartition("=")
    if not equals or Path(spec).expanduser().is_file():
        return spec, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0 and name):
        raise BadInput(
            f"'{spec}' gives no weight above 0; write it like {name or 'SOURCE'}=2, or leave the "
            "source out"
        )
    return name, weight


def _known_licence(spec: str) -> str:
    if texts.is_builtin(spec):
        return "PSF License 2 (Python's own help)"
    name = spec.partition(":")[0]
    known = (each for mixture in MIXTURES.values() for each in mixture)
    return next((each.licence for each in known if each.spec.partition(":")[0] == name), "")


def _checked(spec: str) -> Path | None:
    """Return the file of a source, None where it has none; BadInput if there cannot be such a source."""
    if texts.is_builtin(spec):
        return None
    path = texts.local_file(spec)
    if path is None and not hub.ID.fullmatch(texts.split_spec(spec)[0]):
        raise BadInput(
            f"'{spec}' is neither a file, nor {_names()}, nor named like a data set of the Hub; "
            "check the spelling"
        )
    return path


# ---- what the Hub says


class Unreachable(BadInput):
    """The Hub could not be asked about a data set."""


def look_up(source: DataSource) -> tuple[DataSource, str | None]:
    """Return a source with its licence where that can be told, and its commit where it is a data set of the Hub.

    BadInput if there is no such data set, Unreachable if the Hub does not answer.
    """
    if texts.is_builtin(source.spec) or texts.local_file(source.spec):
        return source, None
    from huggingface_hub import HfApi, errors

    name = texts.split_spec(source.spec)[0]
    try:
        found = HfApi().dataset_info(name)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise BadInput(
            f"no such text: '{name}' is neither a file, nor {_names()}, nor a data set of the Hub; "
            "check the spelling, or `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the network fails in many ways
        raise Unreachable(
            f"'{name}' is no file, and the Hub cannot be asked for a data set of that name "
            f"({one_line(error)}); check the spelling and the network"
        ) from error
    stated = found.card_data.get("license") if found.card_data else None
    licence = ", ".join(stated) if isinstance(stated, list) else str(stated or "")
    page = f"not known: see https://huggingface.co/datasets/{name}"
    return replace(source, licence=source.licence or licence or page), found.sha


# ---- rows into documents


@dataclass
class Skipped:
    """Rows that held no document: how many, and the columns seen."""

    rows: int = 0
    columns: set[str] = field(default_factory=set)


def documents(
    source: DataSource,
    tokenizer: Any,
    *,
    revision: str | None = None,
    skipped: Skipped | None = None,
) -> Iterator[str]:
    """Yield the documents of a source, none of them blank, in its own order and never all in memory.

    A plain text longer than ``texts.LONGEST_ROW`` characters is several documents, cut at ends of lines. Chats are
    rendered with the tokenizer's chat template, special tokens included; without one they are ``Role: text``
    paragraphs.

    Args:
        source: what to read.
        tokenizer: a tokenizer of transformers.
        revision: the commit of a data set of the Hub; None for the newest.
        skipped: counts the rows without a document.

    Raises:
        BadInput: there is no such source, it is damaged, or none of its rows (of the first 10,000) holds a document.
        EdgepruneError: the Hub failed on the way.
    """
    skipped = skipped or Skipped()
    first, found = skipped.rows, 0
    for row in texts.read_rows(source.spec, COLUMNS, revision=revision):
        document = document_of(row, tokenizer)
        if document:
            found += 1
            yield from document
            continue
        skipped.rows += 1
        if not found:
            skipped.columns.update(_columns_of(row))
            if skipped.rows - first >= MOST_USELESS:
                break
    if not found:
        raise _nothing_in(source.spec, skipped)


def _columns_of(row: Any) -> list[str]:
    return [str(name) for name in row] if isinstance(row, dict) else []


def _nothing_in(spec: str, skipped: Skipped) -> BadInput:
    has = (
        f"its columns are {', '.join(sorted(skipped.columns))}"
        if skipped.columns
        else "no row has a column"
    )
    return BadInput(
        f"{spec} holds no text to train on in {skipped.rows:,} rows: {has}; give it text, messages, or "
        "instruction and output"
    )


def document_of(row: Any, tokenizer: Any) -> list[str]:
    """Return the document of a row, in pieces where it is a long plain text; [] if the row holds none."""
    messages = (_chat(row) or _answered(row)) if isinstance(row, dict) else None
    if messages:
        chat = _rendered(messages, tokenizer)
        return [chat] if chat else []
    text = _plain(row)
    if len(text) <= texts.LONGEST_ROW:
        return [text] if text.strip() else []
    return [piece for piece in texts.split_rows(io.StringIO(text, newline="")) if piece.strip()]


def _plain(row: Any) -> str:
    """Return the plain text of a row, "" if it has none."""
    if isinstance(row, str):
        return row
    return _first(row, texts.COLUMNS) if isinstance(row, dict) else ""


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return the first of the columns that holds a text which is not blank, else ""."""
    held = (row.get(column) for column in columns)
    return next((each for each in held if isinstance(each, str) and each.strip()), "")


def _chat(row: Mapping[str, Any]) -> list[Message] | None:
    """Return a row's chat; None if it has none, or one of its turns is not whole."""
    turns: list[Any] = next((row[name] for name in CHATS if isinstance(row.get(name), list)), [])
    messages = [_message(turn) for turn in turns]
    # an empty system prompt says nothing; any other empty turn is a hole
    whole = [m for m in messages if m and (m["content"] or m["role"] != "system")]
    return whole if None not in messages and all(m["content"] for m in whole) else None


def _answered(row: Mapping[str, Any]) -> list[Message] | None:
    """Return a row's question and answer as a chat; None if it lacks either."""
    question, answer = _first(row, QUESTIONS), _first(row, ANSWERS)
    if not question or not answer:
        return None
    extra, system = _first(row, EXTRAS), _first(row, (SYSTEM,))
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": f"{question}\n\n{extra}" if extra else question},
        {"role": "assistant", "content": answer},
    ]


def _message(turn: Any) -> Message | None:
    if not isinstance(turn, dict):
        return None
    role, content = (turn.get("role") or turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": ROLES.get(role, role), "content": content if content.strip() else ""}


def _rendered(messages: list[Message], tokenizer: Any) -> str:
    """Return a chat as the text that the model is trained on, "" if its template refuses such a chat."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(f"{each['role'].capitalize()}: {each['content']}" for each in messages)
    text = _templated(messages, tokenizer) or _templated(_without_system(messages), tokenizer)
    # what a template writes after the token that ends the text would never be the model's to write
    end, bare = tokenizer.eos_token, text.rstrip()
    return bare if end and bare.endswith(end) else text


def _templated(messages: list[Message], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:  # roles that do not alternate, or that the model does not know
        return ""


def _without_system(messages: list[Message]) -> list[Message]:
    """Put the system prompt before the first question, for models that have no such role."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, first, *others = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
