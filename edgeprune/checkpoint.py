"""Writing a checkpoint: weights, config, tokenizer, modelling file, model card and provenance.

A checkpoint appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import inspection, machine, nonuniform, provenance, sources
from edgeprune.errors import BadInput
from edgeprune.provenance import read_provenance as read_provenance
from edgeprune.quantities import format_bytes, format_count
from edgeprune.shards import Writer
from edgeprune.sources import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

MODELLING = "modeling_edgeprune"
CARD = "README.md"
ROOM = 32_000_000
"""Bytes of disk for everything but the weights: the tokenizer is the largest."""


def check_output(folder: Path) -> None:
    """Raise BadInput unless ``folder`` can be made: absent or empty, where files may be written.

    Call it before long work.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; name another output folder with -o DIR")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty; name another output folder with -o DIR")
    place = folder if folder.exists() else folder.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadInput(
            f"{folder} cannot be made: {place} cannot be written; name another with -o DIR"
        )


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    provenance: dict[str, Any],
    source: Source,
) -> dict[str, Any]:
    """Write ``model`` to ``folder`` and return the content of its ``edgeprune.json``.

    ``provenance`` holds what was done and with which data, as plain JSON values; where the model
    came from, its widths, parameter counts and versions are added here. BadInput if the folder is
    not empty or the disk has no room; nothing is left behind in either case.
    """
    folder = Path(folder).expanduser().absolute()
    check_output(folder)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + ROOM
    with _no_room_is_told(folder, needed), _appearing_whole(folder) as unfinished:
        _check_room(folder, needed)
        with sources.quiet():
            _inherit_generation(model, source)
            model.save_pretrained(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
        return _complete(unfinished, model.config, source, provenance)


def save_parts(
    config: PreTrainedConfig,
    parts: Iterable[dict[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    provenance: dict[str, Any],
    source: Source,
    generation_config: GenerationConfig | None = None,
) -> dict[str, Any]:
    """Write the model of ``config`` as ``save`` does, from weights that come a part at a time.

    Each of ``parts`` holds some tensors under their full names, all of one type: together they are the
    model's parameters, tied ones once. They are written as they come and dropped. Several files of
    about 2 GB are made where one would be larger. ``generation_config`` is by default the source's.

    Raises:
        BadInput: as ``save``.
        ValueError: the parts are not the parameters of the model that ``config`` describes.
    """
    folder = Path(folder).expanduser().absolute()
    check_output(folder)
    skeleton = sources.build_on_meta(config)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    needed = sources.weight_bytes(config, sources.weight_width(config)) + ROOM
    with _no_room_is_told(folder, needed), _appearing_whole(folder) as unfinished:
        _check_room(folder, needed)
        dtype = _write_parts(unfinished, parts, shapes)
        with sources.quiet():
            settings = copy.deepcopy(config)
            settings.dtype = dtype
            settings.architectures = [type(skeleton).__name__]
            settings.save_pretrained(unfinished)
            if generation_config is not None:
                skeleton.generation_config = generation_config
            _inherit_generation(skeleton, source)
            if skeleton.generation_config is not None:
                skeleton.generation_config.save_pretrained(unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
        return _complete(unfinished, settings, source, provenance)


def _write_parts(
    folder: Path, parts: Iterable[dict[str, Tensor]], shapes: dict[str, tuple[int, ...]]
) -> torch.dtype:
    """Write the parts and return their type."""
    dtypes: set[torch.dtype] = set()
    with Writer(folder, list(shapes)) as writer:
        for part in parts:
            for name, tensor in part.items():
                if shapes.get(name) != tuple(tensor.shape) or name in writer.written:
                    raise ValueError(
                        f"{name} {tuple(tensor.shape)} is not what the config asks for"
                    )
                dtypes.add(tensor.dtype)
                writer.add({name: tensor})
        missing = shapes.keys() - writer.written
        if missing or len(dtypes) != 1:
            raise ValueError(f"of the parameters, {len(missing)} are missing; types: {dtypes}")
        writer.finish()
    return dtypes.pop()


# ---- whole or not at all


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder`` that takes its name when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder, ".part")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    unfinished.mkdir()
    try:
        yield unfinished
        _same_permissions(unfinished)
        sync(unfinished)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(folder.parent)


def sweep(folder: Path, ending: str) -> None:
    """Remove what processes left beside ``folder`` that were killed in the middle of it: ``.NAME.PID`` + ``ending``."""
    import psutil

    for left in folder.parent.glob(f".{folder.name}.*{ending}"):
        owner = left.name.removesuffix(ending).rpartition(".")[2]
        if owner == str(os.getpid()) or not (owner.isdigit() and psutil.pid_exists(int(owner))):
            shutil.rmtree(left, ignore_errors=True)


def _same_permissions(folder: Path) -> None:
    # safetensors makes its files readable by their owner alone, whatever the umask
    mode = (folder / CARD).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def sync(folder: Path) -> None:
    """Have the system write a folder and its files to the disk before their names change."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- room


def _check_room(folder: Path, needed: int) -> None:
    free = machine.disk_free(folder)
    if free < needed:
        raise _no_room(folder, needed, free)


@contextmanager
def _no_room_is_told(folder: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            raise _no_room(folder, needed, machine.disk_free(folder)) from error
        raise


def disk_is_full(error: Exception) -> bool:
    """Tell whether a write failed for want of room."""
    # safetensors has an error of its own for what the system said
    code = getattr(error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def _no_room(folder: Path, needed: int, free: int) -> BadInput:
    return BadInput(
        f"the disk is full: {folder} needs {format_bytes(needed)} and {format_bytes(free)} are "
        "free; make room or name a folder on another disk"
    )


# ---- content


def _inherit_generation(model: PreTrainedModel, source: Source) -> None:
    """Give a model that was built from a config the generation settings of its source."""
    from transformers import GenerationConfig

    settings = model.generation_config
    made_up = settings is None or getattr(settings, "_from_model_config", False)
    if made_up and (source.path / "generation_config.json").is_file() and not source.gguf_file:
        model.generation_config = GenerationConfig.from_pretrained(source.path)


def _complete(
    folder: Path, config: PreTrainedConfig, source: Source, made: dict[str, Any]
) -> dict[str, Any]:
    """Add what makes weights and config a checkpoint of ours; return its provenance."""
    _make_loadable(folder, pruned=bool(config.is_heterogeneous))
    record = _record(config, source, made)
    _write_json(folder / "edgeprune.json", record)
    (folder / CARD).write_text(model_card(record), encoding="utf-8")
    return record


def _make_loadable(folder: Path, *, pruned: bool) -> None:
    """Put the modelling file beside a pruned model, and nothing that refers to absent code."""
    path = folder / "config.json"
    config = sources.read_json(path)
    config.pop("auto_map", None)
    (folder / f"{nonuniform.__name__.rpartition('.')[2]}.py").unlink(missing_ok=True)
    if pruned:
        name = nonuniform.class_for(config["model_type"]).__name__
        config["auto_map"] = {"AutoModelForCausalLM": f"{MODELLING}.{name}"}
        shutil.copyfile(nonuniform.__file__, folder / f"{MODELLING}.py")
    _write_json(path, config)


def _record(config: Any, source: Source, made: dict[str, Any]) -> dict[str, Any]:
    now = inspection.describe(config)
    dense = inspection.describe(inspection.dense_config(config))
    return {
        "schema_version": provenance.SCHEMA_VERSION,
        "source": provenance.origin(source),
        "model_type": config.model_type,
        "parameters": {
            "total": now["parameters"],
            "decoder": now["decoder_parameters"],
            "dense_total": dense["parameters"],
            "dense_decoder": dense["decoder_parameters"],
        },
        "layers": [w._asdict() for w in nonuniform.layer_widths(config)],
        "dense_layers": [
            w._asdict() for w in nonuniform.layer_widths(inspection.dense_config(config))
        ],
        "versions": provenance.versions(),
        "made": made,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the model card


def model_card(record: dict[str, Any]) -> str:
    """Return the README.md of a checkpoint with this provenance."""
    sections = [
        _front_matter(record["source"], _removed(record)),
        _what_it_is(record),
        _how_to_load(),
        _widths_table(record),
        _how_it_was_made(record),
    ]
    return "\n".join(section.strip() + "\n" for section in sections)


def _removed(record: dict[str, Any]) -> float:
    """Return the share of the decoder layers' parameters that was removed."""
    counts = record["parameters"]
    return float(1 - counts["decoder"] / counts["dense_decoder"])


def _front_matter(source: dict[str, Any], removed: float) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if source["licence"]:
        lines.append(f"license: {source['licence']}")
    if source["kind"] == "hub":
        lines.append(f"base_model: {source['name']}")
    tags = ["- edgeprune", "- pruned"] if removed else ["- edgeprune"]
    return "\n".join(["---", *lines, "tags:", *tags, "---"])


def _what_it_is(record: dict[str, Any]) -> str:
    counts, source = record["parameters"], record["source"]
    removed = _removed(record)
    revision = f" (revision {source['revision']})" if source["revision"] else ""
    licence = source["licence"] or "not stated by the source: ask its author"
    name = source["name"]
    title, what = f"{name}, trained further", f"A version of {name}{revision} of the same widths."
    if removed:
        title, what = (
            f"{name}, {removed:.0%} pruned",
            f"A version of {name}{revision} whose decoder layers have different widths: {removed:.1%} of\n"
            "the parameters inside them were removed.",
        )
    return f"""
# {title}

{what}

| | dense | this model |
|---|---:|---:|
| parameters | {counts["dense_total"]:,} | {counts["total"]:,} |
| in decoder layers | {counts["dense_decoder"]:,} | {counts["decoder"]:,} |

Licence: {licence}.
"""


def _how_to_load() -> str:
    return """
## Loading

With edgeprune:

```python
import edgeprune

model = edgeprune.load("path/to/this/folder")
```

Without it, transformers runs the small modelling file in this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

To run it on a small device: `edgeprune export path/to/this/folder --onnx -o exported`.
"""


def _widths_table(record: dict[str, Any]) -> str:
    pairs = enumerate(zip(record["layers"], record["dense_layers"], strict=True))
    rows = [
        f"| {i} | {' | '.join(_of(now, dense, key) for key in now)} |" for i, (now, dense) in pairs
    ]
    return "\n".join(
        [
            "## Widths",
            "",
            "| layer | query heads | KV heads | FFN channels |",
            "|---:|---:|---:|---:|",
            *rows,
        ]
    )


def _of(now: dict[str, int], dense: dict[str, int], key: str) -> str:
    return f"{now[key]}" if now[key] == dense[key] else f"{now[key]} of {dense[key]}"


def _how_it_was_made(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    made = json.dumps(record["made"], indent=2, ensure_ascii=False)
    decoder = format_count(record["parameters"]["decoder"])
    return f"""
## How it was made

Made with {versions}; {decoder} parameters are left in the decoder layers. `edgeprune.json` has
all of it for programs.

```json
{made}
```
"""
