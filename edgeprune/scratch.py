"""What a repair has finished, in a folder: it goes on from there when the process was killed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from edgeprune.blocks import Weights
from edgeprune.repair import Streams

# The residual streams are large: they are written this often, in seconds, so that no more than this is done twice.
INTERVAL = 20.0


class Scratch:
    """Repaired projections of each layer, and the residual streams from which the next one goes on.

    Args:
        folder: made if absent; nobody else writes there.
        what: names the work; files of other work are not used.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self._folder, self._what = folder, what
        self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    def streams(self, sequences: int) -> Streams | None:
        """Where an earlier process on as many sequences stands; None if there was none or its file is unreadable."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / "streams.safetensors", framework="pt") as file:
                if (file.metadata() or {}).get("what") != self._what:
                    return None
                layer = int(file.get_tensor("layer"))
                count = int(file.get_tensor("batches"))
                pruned, dense = (
                    [file.get_tensor(f"{name}.{n}") for n in range(count)]
                    for name in ("pruned", "dense")
                )
        except (SafetensorError, OSError):
            return None
        whole = all(self._of(i).is_file() for i in range(layer))
        whole &= sum(len(each) for each in pruned) == sequences
        return Streams(layer, pruned, dense) if whole else None

    def keep(self, fixed: Weights, streams: Streams, dtype: torch.dtype) -> None:
        """Write the projections of the layer before ``streams``, and now and then the streams."""
        self._write(
            self._of(streams.layer - 1),
            {name: w.to("cpu", dtype).contiguous() for name, w in fixed.items()},
        )
        if time.monotonic() - self._saved < INTERVAL:
            return
        tensors = {
            "layer": torch.tensor(streams.layer),
            "batches": torch.tensor(len(streams.dense)),
        }
        for name, stream in (("pruned", streams.pruned), ("dense", streams.dense)):
            tensors |= {f"{name}.{n}": each.cpu().contiguous() for n, each in enumerate(stream)}
        self._write(self._folder / "streams.safetensors", tensors)
        self._saved = time.monotonic()

    def fixed(self, index: int) -> Weights:
        """Return the repaired projections of a layer."""
        from safetensors.torch import load_file

        return load_file(self._of(index))

    def _of(self, index: int) -> Path:
        return self._folder / f"layer-{index:04}.safetensors"

    def _write(self, path: Path, tensors: Weights) -> None:
        from safetensors.torch import save_file

        unfinished = path.with_name(path.name + ".tmp")
        save_file(tensors, unfinished, metadata={"what": self._what})
        unfinished.replace(path)
