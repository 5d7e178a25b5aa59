"""What a run has finished inside an iteration or of the repair, in a folder: it goes on from there if it is killed."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from edgeprune import tensor_files
from edgeprune.blocks import Weights
from edgeprune.events import Emit, ignore
from edgeprune.repair import Streams
from edgeprune.waiting import Waiting

# The residual streams are large: they are written this often, in seconds, so that no more than this is done twice.
INTERVAL = 20.0


class Scratch:
    """Repaired projections of each layer and the residual streams from which the next one goes on; the same of a pass.

    Args:
        folder: made if absent; nobody else writes there.
        what: names the work; files of other work are not used.
        lasting: whether another process can find the folder.
    """

    def __init__(self, folder: Path, what: str, *, lasting: bool = True) -> None:
        self._folder, self._what, self._lasting = folder, what, lasting
        self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    # ---- the pass of an iteration

    def waiting(self, hold: int | None, which: str, emit: Emit = ignore) -> Waiting:
        """Return where a pass's layer inputs wait, ``hold`` bytes of them in memory; ``which`` names the pass."""
        what = f"{self._what}\n{which}" if self._lasting else None
        return Waiting(hold, self._folder / "pass", what, every=INTERVAL, emit=emit)

    # ---- the repair

    def streams(self, sequences: int) -> Streams | None:
        """Where an earlier process on as many sequences stands; None if there was none or its file is unreadable."""
        try:
            found = tensor_files.read(self._folder / "streams.safetensors", self._what)
        except tensor_files.UnusableError:
            return None
        layer, count = int(found["layer"]), int(found["batches"])
        pruned, dense = (
            [found[f"{name}.{n}"] for n in range(count)] for name in ("pruned", "dense")
        )
        whole = all(self._of(i).is_file() for i in range(layer))
        whole &= sum(len(each) for each in pruned) == sequences
        return Streams(layer, pruned, dense) if whole else None

    def keep(self, fixed: Weights, streams: Streams, dtype: torch.dtype) -> None:
        """Write the projections of the layer before ``streams``, and now and then the streams."""
        weights = {name: w.to("cpu", dtype) for name, w in fixed.items()}
        tensor_files.write(self._of(streams.layer - 1), weights, self._what)
        if not self._lasting or time.monotonic() - self._saved < INTERVAL:
            return
        tensors = {
            "layer": torch.tensor(streams.layer),
            "batches": torch.tensor(len(streams.dense)),
        }
        for name, stream in (("pruned", streams.pruned), ("dense", streams.dense)):
            tensors |= {f"{name}.{n}": each for n, each in enumerate(stream)}
        tensor_files.write(self._folder / "streams.safetensors", tensors, self._what)
        self._saved = time.monotonic()

    def fixed(self, index: int) -> Weights:
        """Return the repaired projections of a layer."""
        from safetensors.torch import load_file

        return load_file(self._of(index))

    def keep_norm(self, weight: Tensor | None, dtype: torch.dtype) -> None:
        """Write the final norm's new weight, or that it keeps the old one."""
        weights = {} if weight is None else {"model.norm.weight": weight.to("cpu", dtype)}
        tensor_files.write(self._folder / "norm.safetensors", weights, self._what)

    def norm(self) -> Weights:
        """Return the final norm's new weight under its name in the model; nothing if it keeps the old one."""
        return tensor_files.read(self._folder / "norm.safetensors", self._what)

    def _of(self, index: int) -> Path:
        return self._folder / f"layer-{index:04}.safetensors"
