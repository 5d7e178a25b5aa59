"""The lines of a run's dashboard, made of its picture."""

from __future__ import annotations

import math
from collections.abc import Iterable

from textual.content import Content

from edgeprune.quantities import format_bytes, format_count, format_seconds
from edgeprune.runs import RunInfo
from edgeprune.tui.picture import Gauge, Picture, Stage, State, cause

SIGNS: dict[State, str] = {
    "waiting": "·",
    "at work": "▶",
    "done": "✓",
    "failed": "✗",
    "stopped": "■",
}
STYLES: dict[State, str] = {
    "waiting": "dim",
    "at work": "$text-primary",
    "done": "$text-success",
    "failed": "$text-error",
    "stopped": "$text-warning",
}
STATES = {
    "running": ("▶ running", "$text-success"),
    "paused": ("‖ paused", "$text-warning"),
    "finished": ("✓ finished", "$text-success"),
    "failed": ("✗ failed", "$text-error"),
    "stopped": ("■ stopped", "$text-warning"),
    "dead": ("✗ died", "$text-error"),
    "away": ("→ away", "$text-warning"),
    "missing": ("? missing", "$text-error"),
}
BAR = 16
Part = tuple[str, str]


def bar(share: float, width: int) -> str:
    """Return ``share`` of the whole as a bar; neither end is shown before it is reached."""
    filled = math.floor(share * width)
    if share > 0:
        filled = max(1, filled)
    return "█" * filled + "░" * (width - filled)


def about(info: RunInfo, doing: str, box: str = "") -> Content:
    """Return the line that says which run this is and how it stands.

    ``doing`` is what it was just told to do, ``box`` the other machine that does it, if one does.
    """
    text, style = STATES.get(info.state, (f"? {info.state}", "$text-warning"))
    where = f"on {box}" if box else ""
    what = " · ".join(part for part in (info.name, info.model, info.target, where) if part)
    told: list[Part] = [(f"  {doing}", "bold $text-warning")] if doing else []
    return Content.assemble((text, f"bold {style}"), *told, f"  {what}")


def in_a_line(stages: Iterable[Stage], alive: bool) -> Content:
    """Return all stages in one line: a sign and the name."""
    parts = []
    for stage in stages:
        state = _state(stage, alive)
        parts.append(Content.assemble((f"{SIGNS[state]}{stage.name}", STYLES[state])))
    return Content(" ").join(parts)


def _state(stage: Stage, alive: bool) -> State:
    """A stage whose worker is gone is not at work, though nobody said so."""
    return "failed" if stage.state == "at work" and not alive else stage.state


def at_work(picture: Picture, now: float) -> Content:
    """Return the line of the stage at work: its bar, how far it is, and the time left."""
    stage = picture.at_work
    if stage is None:
        return Content("")
    gauge = stage.gauge
    parts: list[Part] = [(stage.title, "bold"), *_course(gauge, now)]
    if gauge is not None:
        parts.append((f"  {gauge.amount}", ""))
        parts.append((f"  {gauge.note}", "dim"))
    return Content.assemble(*parts)


def _course(gauge: Gauge | None, now: float) -> list[Part]:
    if gauge is None:
        return []
    left = gauge.left(now)
    parts: list[Part] = []
    if gauge.share is not None:
        parts.append(
            (f"  {bar(gauge.share, BAR)} {math.floor(100 * gauge.share)}%", "$text-primary")
        )
    return [*parts, ("" if left is None else f", {format_seconds(left)} left", "")]


def clocks(
    picture: Picture, now: float, running: bool, memory: int | None, box: str = ""
) -> Content:
    """Return the line of what the run takes: time so far and to come, and memory here."""
    parts = [f"{format_seconds(picture.worked(now))} of work"]
    if running:
        left = picture.left(now)
        known = "time left unknown" if left is None else f"at least {format_seconds(left)} left"
        later = f", then {picture.waiting} stages" if picture.waiting else ""
        parts.append(f"{known}{later}")
        where = "memory here" if box else "memory"
        parts.append(f"{where} {'unknown' if memory is None else format_bytes(memory)}")
    return Content(" · ".join(parts))


def stages(picture: Picture, now: float, alive: bool) -> Content:
    """Return the stages one a line: sign, title, and how long each took or how far it is."""
    width = max((len(stage.title) for stage in picture.stages), default=0)
    return Content("\n").join([_stage(stage, width, now, alive) for stage in picture.stages])


def _stage(stage: Stage, width: int, now: float, alive: bool) -> Content:
    state = _state(stage, alive)
    text = f"{SIGNS[state]} {stage.title:{width}}"
    if state == "at work":
        return Content.assemble((text, f"bold {STYLES[state]}"), *_course(stage.gauge, now))
    parts = ["" if stage.seconds is None else format_seconds(stage.seconds)]
    if state != "done" or stage.seconds is None:
        parts.append(state)
    return Content.assemble((text, STYLES[state]), "".join(f"  {part}" for part in parts if part))


def figures(picture: Picture) -> Content:
    """Return what pruning and training have come to, and what of that is missing."""
    lines = []
    if picture.iteration:
        left = format_count(picture.decoder_parameters or 0)
        loss = picture.pruning_loss.last
        lines.append(
            f"Pruning: iteration {picture.iteration} of {picture.iterations}, "
            f"{left} left in the decoder layers" + ("" if loss is None else f", loss {loss:.3f}")
        )
    training = [
        f"{name} {value:{form}}"
        for name, value, form in (
            ("loss", picture.training_loss.last, ".3f"),
            ("held-out perplexity", picture.perplexity.last, ".4g"),
            ("learning rate", picture.learning_rate.last, ".2g"),
            ("tokens/s", picture.speed.last, ",.0f"),
            ("share of peak", picture.peak_share.last, ".0%"),
        )
        if value is not None
    ]
    if training:
        lines.append(f"Training: {', '.join(training)}")
    if picture.gaps:
        lines.append(f"Log: {picture.gaps} lines were damaged and left out")
    return Content("\n".join(lines))


def end(info: RunInfo, picture: Picture, last_words: str, box: str = "") -> Content:
    """Return how a run ended and what to do; nothing while it is at work."""
    if info.state == "finished":
        problem = [(f"\n{info.error}", "$text-error")] if info.error else []
        return Content.assemble(
            ("Finished: press Enter for the results", "bold $text-success"), *problem
        )
    if info.state == "missing":
        return Content.assemble((info.error, "$text-error"), f"\nThen: {info.next}")
    if info.state == "stopped":
        return Content(f"Stopped; what is finished is kept. Press r to go on, or type: {info.next}")
    if info.state == "away":
        return Content(
            f"Nothing here watches it; on {box} it goes on. Press a to attach again, s to stop it, or type: {info.next}"
        )
    return _failed(info, picture, last_words) if info.state in ("failed", "dead") else Content("")


def _failed(info: RunInfo, picture: Picture, last_words: str) -> Content:
    why, remedy = cause(info.error, last_words)
    at = next((s.title for s in picture.stages if s.state in ("failed", "at work")), info.stage)
    what = f"{at}: {info.error}" if at else info.error
    said = f"\nLast words: {last_words}" if last_words and last_words not in info.error else ""
    return Content.assemble(
        (f"Failed: {what}", "$text-error"),
        f"\nLikely cause: {why}\nWhat to do: {remedy}{said}\nPress r to go on, or type: {info.next}",
    )
