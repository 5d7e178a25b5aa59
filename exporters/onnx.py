"""Write a model as a folder that onnxruntime-genai runs, and check it against PyTorch."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeprune import machine
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.events import Emit, Note, Progress, StageFinished, StageStarted, ignore
from edgeprune.exporters import builder, parity
from edgeprune.exporters.sizes import file_bytes
from edgeprune.exporters.storage import STORAGE
from edgeprune.nonuniform import layer_widths
from edgeprune.sources import Source, load_config, load_tokenizer, opened, quiet, resolve

SCHEMA_VERSION = 1
MANIFEST = "edgeprune_export.json"
MODEL_FILES = ("model.onnx", "model.onnx.data")
# Bytes of memory for each value of the largest matrix while it is converted and quantized.
MATRIX_BYTES = 4
# What the runtime takes to run an export, as a share of its files.
RUNTIME_SHARE = 1.2
_STAGE = "export"
_LIBRARIES = ("edgeprune", "onnxruntime-genai", "onnxruntime", "torch", "transformers")


def export(
    model: str,
    output: Path,
    *,
    precision: str = "int4",
    check: bool = True,
    memory: int | None = None,
    emit: Emit = ignore,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Export ``model`` to the folder ``output``; return what its ``edgeprune_export.json`` says.

    ``precision`` is int4, int8, fp16 or fp32: how weights are stored. The folder appears under its
    name only when it is complete and, with ``check``, agrees with PyTorch; else EdgepruneError, and
    an export that disagrees is kept as ``<output>.failed-parity``. A model whose float32 weights need
    more than ``memory`` bytes (by default ``mapped.budget``) stays in its files, and is compared along
    a fixed text instead of one that it generates. BadInput, before any work, for what cannot be
    exported or written.
    """
    output = Path(output)
    _check_precision(precision)
    _check_free(output)
    started = time.monotonic()
    source = resolve(model, revision=revision, trust_remote_code=trust_remote_code, emit=emit)
    config = load_config(source)
    with quiet():
        builder.check_supported(config)
        size = file_bytes(config, precision)
        _check_disk(output, size)
        _check_memory(config, size, check)
        emit(StageStarted(stage=_STAGE, title=f"Exporting {source.title} to ONNX, {precision}"))
        with _building(output) as folder:
            manifest = _build(source, folder, precision, check, memory, emit)
            failure = (manifest["parity"] or {}).get("failure")
            destination = _publish(folder, _failed_name(output) if failure else output)
    if failure:
        raise EdgepruneError(
            f"the export does not agree with PyTorch: {failure}; it is kept as {destination}"
        )
    emit(
        StageFinished(
            stage=_STAGE,
            seconds=time.monotonic() - started,
            result={"bytes": manifest["bytes"], "parity": manifest["parity"]},
        )
    )
    return manifest


# ---- refusing before any work


def _check_precision(precision: str) -> None:
    if precision not in STORAGE:
        raise BadInput(f"no precision '{precision}'; give one of {', '.join(STORAGE)}")


def _check_free(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise BadInput(f"{output} is not empty; give a new folder, or remove it first")
    if output.exists() and not output.is_dir():
        raise BadInput(f"{output} is a file; give the name of a new folder")


def _check_disk(output: Path, needed: int) -> None:
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed * 1.02 + 16e6:
        raise BadInput(
            f"the export needs {needed / 1e6:,.0f} MB, {existing} has {free / 1e6:,.0f} MB free; "
            "give a folder on another disk, or a smaller --precision"
        )


def _check_memory(config: Any, size: int, check: bool) -> None:
    table = config.vocab_size * config.hidden_size * MATRIX_BYTES
    needed = max(table, size * RUNTIME_SHARE if check else 0)
    free = machine.memory().available
    if needed > free:
        advice = (
            " or leave the comparison with PyTorch out with --no-check" if needed > table else ""
        )
        raise BadInput(
            f"the export needs {needed / 1e6:,.0f} MB of memory and {free / 1e6:,.0f} MB are free; "
            f"close other programs{advice}"
        )


# ---- building


def _build(
    source: Source, folder: Path, precision: str, check: bool, memory: int | None, emit: Emit
) -> dict[str, Any]:
    with opened(source, memory=memory, dtype=torch.float32, emit=emit) as model:
        answers = _write(model, load_tokenizer(source), folder, precision, check, emit)
        config, parameters = model.config, model.num_parameters()
    del model  # its memory is wanted for the comparison
    result = None
    if check:
        emit(Note(text="comparing with PyTorch"))
        result = parity.check(folder, answers, precision).to_json()
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "source": {"model": source.title, "kind": source.kind, "revision": source.revision},
        "model_type": config.model_type,
        "precision": precision,
        "parameters": parameters,
        "layers": [widths._asdict() for widths in layer_widths(config)],
        "versions": {name: version(name) for name in _LIBRARIES},
        "bytes": sum((folder / name).stat().st_size for name in MODEL_FILES),
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
        "parity": result,
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    precision: str,
    check: bool,
    emit: Emit,
) -> list[parity.Answer]:
    """Write all but the manifest; return what PyTorch says, for the comparison."""
    answers = parity.reference(model, tokenizer) if check else []
    # written without judging it: published models carry settings that transformers refuses to save
    model.generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    layers = model.config.num_hidden_layers

    def on_layer(done: int) -> None:
        emit(Progress(stage=_STAGE, done=done, total=layers, unit="layers"))

    builder.build(model, tokenizer, folder, STORAGE[precision], on_layer)
    return answers


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing under the final name only what is whole


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``output``, which is gone afterwards whatever happens."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    except OSError as error:
        raise BadInput(f"{output} cannot be written: {one_line(error)}") from error
    try:
        yield temporary
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BadInput(
                f"the disk of {output} is full; free space on it, or give a folder on another disk"
            ) from error
        raise EdgepruneError(f"{output} could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(folder: Path, name: Path) -> Path:
    folder.chmod(0o755)  # a temporary folder is its owner's alone
    if name.is_dir():
        name.rmdir()  # empty, or _check_free had refused it
    folder.rename(name)
    return name


def _failed_name(output: Path) -> Path:
    """The first of OUTPUT.failed-parity, OUTPUT.failed-parity-2, ... that is not taken."""
    base = output.with_name(f"{output.name}.failed-parity")
    name, number = base, 1
    while name.exists():
        number += 1
        name = base.with_name(f"{base.name}-{number}")
    return name
