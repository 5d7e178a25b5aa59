"""A real run on a real SSH server: a tiny model from the recipe to the results, the link cut on its way."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import tiny
import wheelhouse
from sshd import sshd as sshd

import edgeprune
from edgeprune import worker
from edgeprune.__main__ import main
from edgeprune.events import Progress, StageStarted
from edgeprune.log import LogReader, read_events
from edgeprune.remote import address, hosts

RECIPE = """
[source]
model = "little"
[prune]
sparsity = 0.3
iterations = 2
samples = 4
length = 32
repair_samples = 4
calibration = "letters.txt"
width_multiple = 8
[export]
precision = "int4"
[profile]
prompt = 8
generate = 8
repeats = 2
[evaluate]
text = "letters.txt"
window = 64
max_tokens = 512
"""
MOMENTS = ("uploading", "pruning", "fetching")


def moment(event: object) -> str:
    """Return at which of the moments the link is to be cut the run is now."""
    if isinstance(event, Progress) and event.unit == "bytes":
        return {"send": "uploading", "fetch": "fetching"}.get(event.stage, "")
    return "pruning" if isinstance(event, StageStarted) and event.stage == "prune" else ""


def test_from_the_recipe_to_the_results(sshd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.save("llama", tmp_path / "little")
    (tmp_path / "letters.txt").write_text("All that is sent is sent once, and told once. " * 400)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    no_index = sshd.home / ".config" / "pip" / "pip.conf"
    no_index.parent.mkdir(parents=True)
    no_index.write_text("[global]\nindex-url = http://127.0.0.1:9/simple\n")
    wheels = wheelhouse.make(tmp_path / "wheels")
    hosts.add(hosts.Host(**{**vars(sshd.host), "wheelhouse": str(wheels)}))
    cut: list[str] = []
    over = threading.Event()

    def cut_at_each_moment() -> None:
        reader = LogReader(tmp_path / "run" / worker.EVENTS)
        while not over.is_set():
            for event in reader.poll():
                if moment(event) and moment(event) not in cut:
                    cut.append(moment(event))
                    sshd.cut()
            time.sleep(0.01)

    cutter = threading.Thread(target=cut_at_each_moment)
    cutter.start()
    try:
        code = main(["run", "recipe.toml", "-o", "run", "--on", sshd.host.name, "--json"])
    finally:
        over.set()
        cutter.join()
    said = capsys.readouterr()
    assert code == 0, said.err
    assert set(cut) == set(MOMENTS)

    results = json.loads(said.out)
    assert results["pruned"]["decoder_parameters"] <= 0.7 * results["dense"]["decoder_parameters"]
    assert results["pruned"]["decode_tokens_per_second"] > 0
    assert results["pruned"]["token_perplexity"] > 1
    assert list(results["devices"]) == ["local"]
    assert str(sshd.home) not in (tmp_path / "run" / "report.html").read_text("utf-8")
    edgeprune.load(tmp_path / "run" / worker.PRUNED)

    far = sshd.root / "runs" / address.read(tmp_path / "run").run / "run"
    assert told(tmp_path / "run") == said_there(far), "no event lost, none doubled, in order"
    for name in (worker.PRUNED, worker.EXPORT_DENSE, worker.EXPORT_PRUNED):
        assert contents(tmp_path / "run" / name) == contents(far / name)


def told(folder: Path) -> list[dict[str, object]]:
    events = [e.to_json() for e in read_events(folder / worker.EVENTS) if e.far_offset]
    return [{k: v for k, v in event.items() if k != "far_offset"} for event in events]


def said_there(folder: Path) -> list[dict[str, object]]:
    """Return what the far log has to tell until the last stage that is followed ends."""
    events = [e.to_json() for e in read_events(folder / worker.EVENTS)]
    last = next(
        i
        for i, e in enumerate(events)
        if (e["kind"], e.get("stage")) == ("stage_finished", "evaluate")
    )
    frame = ("run_started", "stage_started", "stage_finished")
    return [event for event in events[:last] if event["kind"] not in frame]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
