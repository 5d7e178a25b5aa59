"""The engine's answers as tables for people.

Each takes the dictionary that ``--json`` prints and returns what rich can draw in 80 columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgeprune.comparison import LABELS, Comparison, cells
from edgeprune.quantities import format_bytes, format_count, format_seconds
from edgeprune.remote.hosts import Host
from edgeprune.runs import RunInfo
from edgeprune.worker import shown

FULL, EMPTY = "█", "░"
HEADS_BAR, FFN_BAR = 8, 20
"""Cells of the bars in the picture of a model's widths."""

RUN_WIDTH, COMPARED_WIDTH = 31, 16
"""Characters of a name: what is shown fits into 80 columns."""
STATE_COLOURS = {
    "running": "cyan",
    "paused": "yellow",
    "away": "cyan",
    "finished": "green",
    "failed": "red",
    "dead": "red",
}


def inspection(found: dict[str, Any]) -> RenderableType:
    """Draw ``inspection.inspect``: what a model is made of, and the widths of its layers."""
    kind = "pruned" if found["pruned"] else "dense"
    title = Text.assemble((str(found["model"]), "bold"), f"  {kind}, family {found['family']}")
    parts: list[RenderableType] = [title, _facts(_about(found)), _widths(found)]
    return Group(*parts)


def _about(found: dict[str, Any]) -> list[tuple[str, str]]:
    dense = found["dense"] or {}
    memory = found["memory"]
    tied = "one table for input and output" if found["tied_embeddings"] else "input and output"
    return [
        ("Parameters", _counted(found, dense, "parameters")),
        ("  decoder layers", _counted(found, dense, "decoder_parameters")),
        ("  embeddings", f"{format_count(found['embedding_parameters'])} ({tied})"),
        ("Can be pruned", _share(found["prunable_parameters"], found["parameters"])),
        ("Weights", " · ".join(f"{name} {format_bytes(size)}" for name, size in memory.items())),
        ("KV cache", f"{format_bytes(found['kv_cache_bytes_per_1k_tokens'])} per 1,000 tokens"),
        (
            "Shape",
            f"{found['num_hidden_layers']} layers, hidden size {found['hidden_size']:,}, "
            f"head_dim {found['head_dim']}, vocabulary {found['vocab_size']:,}",
        ),
    ]


def _counted(found: dict[str, Any], dense: dict[str, Any], key: str) -> str:
    text = format_count(found[key])
    if dense.get(key):
        text += f" of {format_count(dense[key])} ({found[key] / dense[key]:.1%} kept)"
    return text


def _share(part: int, whole: int) -> str:
    return f"{format_count(part)} ({part / whole:.0%} of all)" if whole else format_count(part)


def _widths(found: dict[str, Any]) -> RenderableType:
    layers = found["layers"]
    before = found["dense"]["layers"] if found["dense"] else _widest(layers)
    if not found["dense"] and len({_shape(layer) for layer in layers}) == 1:
        heads, kv_heads, intermediate = _shape(layers[0])
        return Text(
            f"\nEach layer has {heads} heads, {kv_heads} KV heads and intermediate size "
            f"{intermediate:,}: {format_count(layers[0]['parameters'])} parameters."
        )
    table = _table("Layer", "Heads/KV", "", "", "Intermediate size", "Parameters", left=(2, 4))
    for layer, dense in zip(layers, before, strict=True):
        heads, kv_heads, intermediate = _shape(layer)
        table.add_row(
            str(layer["index"]),
            f"{heads}/{kv_heads}",
            _bar(kv_heads, dense["num_key_value_heads"], HEADS_BAR),
            f"{intermediate:,}",
            _bar(intermediate, dense["intermediate_size"], FFN_BAR),
            format_count(layer["parameters"]),
        )
    return table


def _shape(layer: dict[str, Any]) -> tuple[int, int, int]:
    return (
        layer["num_attention_heads"],
        layer["num_key_value_heads"],
        layer["intermediate_size"],
    )


def _widest(layers: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    keys = ("num_key_value_heads", "intermediate_size")
    widest = {key: max(layer[key] for layer in layers) for key in keys}
    return [widest] * len(layers)


def _bar(value: int, whole: int, cells: int) -> Text:
    filled = round(cells * value / whole) if whole else 0
    filled = max(filled, 1) if value else 0  # little is not nothing
    return Text.assemble((FULL * filled, "cyan"), (EMPTY * (cells - filled), "dim"))


def perplexity(found: dict[str, Any]) -> RenderableType:
    """Draw the fields of ``perplexity.Perplexity``."""
    stride = found["stride"] or found["window"]
    return _facts(
        [
            ("Perplexity per token", _figure(found["token_perplexity"])),
            ("Perplexity per word", _figure(found["word_perplexity"])),
            ("Text", f"{found['tokens']:,} tokens, {found['words']:,} words"),
            ("Read in", f"windows of {found['window']}, {stride} apart, {found['dtype']}"),
            ("Took", format_seconds(found["seconds"])),
        ]
    )


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 10**6 else f"{value:.2e}"


def exported(found: dict[str, Any]) -> RenderableType:
    """Draw what ``exporters.onnx.export`` returns."""
    lines = [("File size", f"{format_bytes(found['bytes'])}, {found['precision']}")]
    parity = found["parity"]
    if parity is None:
        return _facts([*lines, ("Against PyTorch", "not compared")])
    greedy = {True: "the same", False: "differs", None: "not generated: the model is too large"}
    return _facts(
        [
            *lines,
            ("Against PyTorch", f"{parity['prompts']} prompts, {parity['positions']} positions"),
            ("  next token", f"{parity['greedy_agreement']:.1%} the same"),
            ("  KL divergence", f"{parity['mean_kl']:.2g} nats a position"),
            (
                "  logits",
                f"at most {max(parity['prompt_max_abs_diff'], parity['decode_max_abs_diff']):.2g} "
                "apart",
            ),
            ("  greedy text", greedy[parity["greedy_text_equal"]]),
        ]
    )


def profile(
    parts: Iterable[tuple[str, Sequence[Sequence[str]], Sequence[tuple[str, bool]]]],
) -> RenderableType:
    """Draw of each device ``profile.heading``, ``profile.table`` (the first row is its head) and ``remarks``."""
    drawn: list[RenderableType] = []
    for heading, (head, *body), remarks in parts:
        table = _table(*head, left=(0,))
        for row in body:
            table.add_row(*row)
        lines = [Text(line, "yellow" if is_warning else "dim") for line, is_warning in remarks]
        drawn += [Text(heading, "bold")] if heading else []
        drawn += [table, *lines]
    return Group(*drawn)


def results(rows: Iterable[Any], summary: str) -> RenderableType:
    """Draw the rows of ``report.results_table``, and what they come to."""
    table = _table("", "dense", "pruned", "change", left=(0,))
    table.columns[0].no_wrap = False  # devices may have long names
    colours = {True: "green", False: "red", None: ""}
    for row in rows:
        change = Text(row.change, colours[row.better])
        table.add_row(Text(row.label), row.dense, row.pruned, change)
    return Group(table, Text(summary))


def runs(infos: Iterable[RunInfo]) -> RenderableType:
    """Draw ``runs.list_runs``: what each run makes and how it stands."""
    table = _table("Run", "state", "now", "took", left=(0, 1, 2))
    table.padding = (0, 1, 0, 0)
    table.columns[2].no_wrap = False
    for info in infos:
        took = "" if info.seconds is None else format_seconds(info.seconds)
        state = Text(info.state, STATE_COLOURS.get(info.state, ""))
        what = ", ".join(part for part in (info.model, info.target) if part)
        run = Text(_end(shown(info.folder), RUN_WIDTH))
        if what:
            run.append(f"\n{_end(what, RUN_WIDTH)}", "dim")
        table.add_row(run, state, _standing(info), took)
    return table


def far_runs(found: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Draw ``remote.box.listing``: the runs that are on a host."""
    table = _table("Run", "state", "model", "changed", "size", left=(0, 1, 2, 3))
    for each in found:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["changed"]))
        model = _end(each["model"], RUN_WIDTH)
        table.add_row(each["run"], each["state"], model, changed, format_bytes(each["bytes"]))
    return table


def _end(text: str, width: int) -> str:
    """Return the end of ``text``: that of a path tells the most."""
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _standing(info: RunInfo) -> str:
    if info.pruned is None:
        return info.error.partition("\n")[0] or info.stage
    size, perplexity = info.pruned.file_bytes, info.pruned.token_perplexity
    figures = [
        "" if size is None else format_bytes(size),
        "" if perplexity is None else f"perplexity {_figure(perplexity)}",
    ]
    return ", ".join(figure for figure in figures if figure)


def comparison(found: Comparison) -> RenderableType:
    """Draw ``comparison.compare``: under each figure, its change against the dense model."""
    table = _table("", *(label.replace(" ", "\n", 1) for label in LABELS), left=(0,))
    table.padding = (0, 1, 0, 0)
    colours = {True: "green", False: "red", None: ""}
    for run in found.runs:
        figures = cells(run)
        mark = "★ " if run.on_front else "  "
        name = _end(run.name, COMPARED_WIDTH)
        table.add_row(Text(mark + name, "bold"), *(cell.value for cell in figures))
        changes = (Text(cell.change, colours[cell.better]) for cell in figures)
        table.add_row(Text(f"  {_end(run.info.target, COMPARED_WIDTH)}", "dim"), *changes)
    return Group(table, Text("★ on the Pareto front of file size, decode speed and perplexity"))


def machine(found: dict[str, Any]) -> RenderableType:
    """Draw ``doctor.examine``."""
    facts, libraries = _facts(_machine(found)), _libraries(found["libraries"])
    return Group(facts, libraries, *_problems(found["problems"]))


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    system, compute = found["system"], found["compute"]
    lines = [
        ("System", f"{system['os']}, {system['architecture']}, Python {system['python']}"),
        ("Processor", f"{system['processor']}, {system['cores']} cores"),
        ("  features", ", ".join(system["features"]) or "none that matter here"),
        (
            "Memory",
            f"{format_bytes(system['memory_bytes'])}, "
            f"{format_bytes(system['memory_available_bytes'])} available",
        ),
        ("Disk", f"{format_bytes(system['disk_free_bytes'])} free here"),
    ]
    if compute:
        speeds = ", ".join(
            f"{name} {speed:,.0f}" for name, speed in compute["matmul_gflops"].items()
        )
        real = "real" if compute["bf16_is_real"] else "emulated: not used"
        lines += [
            ("GPU", ", ".join(each["name"] for each in compute["accelerators"]) or "none"),
            ("Computes in", f"{compute['dtype']} on {compute['device']} (bfloat16 is {real})"),
            ("  matrix product", f"{speeds} GFLOP/s, {compute['threads']} threads"),
        ]
    bundled, hub = found["bundled_model"], found["hub"]
    lines += [
        ("Bundled model", f"{bundled['name']} {bundled['installed'] or '(not installed)'}"),
        ("Hub", "in reach" if hub["reachable"] else "out of reach"),
    ]
    return lines


def _libraries(libraries: dict[str, dict[str, str | None]]) -> Table:
    table = _table("Library", "installed", "tested", "needed", left=(0, 1, 2, 3))
    for name, version in libraries.items():
        # A "+cpu" says which build it is, not which version.
        installed = version["installed"]
        differs = version["tested"] not in (None, (installed or "").partition("+")[0])
        table.add_row(
            name,
            Text(installed or "missing", "" if installed else "bold red"),
            Text(version["tested"] or "", "yellow" if differs else ""),
            version["required"],
        )
    return table


def hosts(saved: Iterable[Host]) -> RenderableType:
    """Draw ``remote.hosts.list_hosts``."""
    table = _table("Host", "address", "kind", "Python there", left=(0, 1, 2, 3))
    for each in saved:
        table.add_row(each.name, each.url, each.kind, each.python)
    return table


def host(found: dict[str, Any]) -> RenderableType:
    """Draw ``remote.check.examine``."""
    lines = [*_there(found), *_sensed(found)] if found["host"]["kind"] == "board" else _there(found)
    return Group(_facts(lines), *_problems(found["problems"]))


def _there(found: dict[str, Any]) -> list[tuple[str, str]]:
    system, device, storage = found["system"], found["device"], found["storage"]
    libc = f", glibc {system['libc']}" if system["libc"] else ""
    processor = system["board"] or device["cpu"]
    total, free = device["memory_bytes"], device["memory_available_bytes"]
    memory = f"{format_bytes(total)}, {format_bytes(free)} available" if total else "not known"
    python = found["python"]["version"]
    return [
        ("Host", f"{found['host']['url']}, a {found['host']['kind']}"),
        ("System", f"{system['os']}, {system['architecture']}{libc}, Python {python}"),
        ("Processor", f"{processor}, {device['physical_cores']} cores"),
        ("  features", ", ".join(system["features"]) or "none that matter here"),
        ("Memory", memory),
        ("Disk", f"{format_bytes(storage['free_bytes'])} free for {storage['folder']}"),
        ("GPU", _cards(found["graphics"])),
    ]


def _cards(graphics: dict[str, Any]) -> str:
    names = [
        card["name"] + (f" {format_bytes(card['memory_bytes'])}" if card["memory_bytes"] else "")
        for card in graphics["cards"]
    ]
    versions = {"driver": graphics["driver"], "CUDA": graphics["cuda"], "": graphics["jetson"]}
    said = [f"{name} {version}".strip() for name, version in versions.items() if version]
    return ", ".join([*names, *said]) or "none"


def _sensed(found: dict[str, Any]) -> list[tuple[str, str]]:
    device, load, heat = found["device"], found["system"]["load"], found["temperature"]
    return [
        ("Clock governor", ", ".join(device["governors"] or ["not told"])),
        ("Temperature", "not told" if heat is None else f"{heat:.0f} °C"),
        ("Throttling", "not told" if found["throttling"] is None else "told"),
        ("Power", device["energy_sensor"] or "no sensor that can be read"),
        ("Load", "not told" if load is None else f"{load:.1f}"),
    ]


def _problems(problems: Iterable[dict[str, Any]]) -> list[Text]:
    marks = {True: ("error: ", "bold red"), False: ("note: ", "yellow")}
    return [
        Text.assemble(marks[each["required"]], each["what"], "\n      ", (each["mend"], "bold"))
        for each in problems
    ] or [Text("Nothing is missing.", "green")]


def _facts(pairs: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, value)
    return grid


def _table(*headings: str, left: Sequence[int]) -> Table:
    """Return an empty table whose columns are right-aligned, but for those of ``left``."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if index in left else "right", overflow="fold", no_wrap=True
        )
    return table
