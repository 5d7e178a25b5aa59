"""Files of tensors that belong to one piece of work: whole or absent, and of no use to any other work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class UnusableError(Exception):
    """Why a file cannot be gone on from, as the end of a sentence that begins with its name."""


def write(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Write ``tensors`` to ``path`` for the work that ``what`` names; its folder is made if absent."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, unfinished, metadata={"what": what})
    unfinished.replace(path)


def check(path: Path, what: str) -> None:
    """Raise UnusableError unless ``path`` is a whole file of the work that ``what`` names; reads the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("what") != what:
                raise UnusableError("belongs to other work")
    except (SafetensorError, OSError) as error:
        raise UnusableError(f"is damaged ({error})") from error


def read(path: Path, what: str) -> dict[str, Tensor]:
    """Return the tensors that ``write`` wrote; raises what ``check`` raises."""
    from safetensors import SafetensorError, safe_open

    check(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            # cloned into torch's own memory: some matrix products round otherwise where data is aligned otherwise
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnusableError(f"is damaged ({error})") from error
