"""The list of hosts with an engine that gives fixed answers: added, checked, removed, and asked for their keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pilots import piloted, seen, told, until
from textual.pilot import Pilot
from wizardry import EXAMINED, HOSTS, KEY, Engine

from edgeprune.tui import wording
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.screens.hosts import AddHostScreen, HostsScreen
from edgeprune.tui.screens.keys import KeysScreen
from edgeprune.tui.screens.question import RemoveScreen, TrustScreen
from edgeprune.tui.screens.start import StartScreen

SIZES = ((80, 24), (200, 60))
FIT = {**EXAMINED, "problems": []}


class Saved(Engine):
    """An engine that knows what is saved; hosts show the key ``KEY`` until it is trusted."""

    def __init__(self, known: bool = True, **replies: Any) -> None:
        self.saved = list(HOSTS)
        self.known = known
        own = {
            "hosts": lambda **_: list(self.saved),
            "host_add": self.add,
            "host_check": lambda **_: EXAMINED if self.known else {"unknown_key": KEY},
            "host_trust": self.trust,
            "host_remove": self.remove,
        }
        super().__init__(**own | replies)

    def add(self, on_part: object, name: str, url: str, kind: str) -> Any:
        if any(host["name"] == name for host in self.saved):
            return AnswerFailed(f"{name} is saved already; take another name", 2)
        if not self.known:
            return {"unknown_key": KEY}
        self.saved.append({"name": name, "url": url, "kind": kind})
        return FIT

    def trust(self, on_part: object, host: str, fingerprint: str) -> None:
        assert fingerprint == KEY["fingerprint"]
        self.known = True

    def remove(self, on_part: object, name: str) -> None:
        self.saved = [host for host in self.saved if host["name"] != name]


def hosts(
    act: Callable[[Pilot[Any]], Any], engine: Engine | None = None, size: tuple[int, int] = (80, 24)
) -> Engine:
    """Open the list of hosts, and ``act`` there."""
    engine = engine or Saved()

    async def run(pilot: Pilot[Any]) -> None:
        await until(pilot, lambda: "New run" in seen(pilot.app))
        await pilot.press("h")
        await until(pilot, lambda: "Asking" not in seen(pilot.app) and at(pilot, HostsScreen))
        await act(pilot)

    piloted(run, EdgepruneApp(engine), size)
    return engine


def at(pilot: Pilot[Any], screen: type) -> bool:
    return isinstance(pilot.app.screen, screen) and pilot.app.screen.is_mounted


async def sees(pilot: Pilot[Any], *texts: str) -> None:
    def words() -> str:
        return " ".join(seen(pilot.app).replace("│", " ").split())

    await until(pilot, lambda: all(text in words() for text in texts), " and ".join(texts))


async def fill_in(pilot: Pilot[Any], name: str, url: str, *kind: str) -> None:
    await until(pilot, lambda: at(pilot, AddHostScreen))
    await pilot.press(*name, "down", *url, "down", *kind)


@pytest.mark.parametrize("size", SIZES)
def test_a_check_tells_what_is_missing_with_what_mends_it(size: tuple[int, int]) -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await sees(pilot, "lab-4090 ssh://anna@lab.example:2222 box not yet", "pi5 ssh://pi@")
        await pilot.press("y")
        await until(pilot, lambda: "nothing to mend" in told(pilot.app))
        await pilot.press("j", "enter")
        await sees(pilot, "board ✗ 1 missing", "✗ missing its python3 cannot make virtual")
        await sees(pilot, "-> sudo apt install python3-venv", "! to see its clocks follow")
        await sees(pilot, "Memory 8.20 GB, 7.40 GB free", "52 °C, not throttled", "GPU none")
        await pilot.press("y")
        assert pilot.app.clipboard.splitlines() == wording.host_mends(EXAMINED)
        await pilot.press("k")
        await sees(pilot, "lab-4090 was not checked yet")
        await pilot.press("escape")
        await until(pilot, lambda: at(pilot, StartScreen))

    engine = hosts(act, size=size)
    assert engine.last("host_check") == {"name": "pi5"}


def test_without_hosts_it_says_how_to_add_one() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await sees(pilot, "No hosts yet.", "Press a to add one")
        await pilot.press("enter", "d", "y", "a")
        await fill_in(pilot, "pi5", "pi@10.0.0.7", "right")
        await sees(pilot, "box [board]")
        await pilot.press("enter")
        await sees(pilot, "pi5 ssh://pi@10.0.0.7 board ✓ ready")

    engine = Saved()
    engine.saved = []
    hosts(act, engine)
    assert engine.last("host_add") == {"name": "pi5", "url": "ssh://pi@10.0.0.7", "kind": "board"}


def test_what_is_wrong_with_a_new_host_is_told_in_place() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("a")
        await fill_in(pilot, "pi5", "ssh://pi@elsewhere")
        await pilot.press("enter")
        await sees(pilot, "✗ pi5 is saved already; take another name")
        await pilot.press("up", "up", "end", "2", "enter")
        await sees(pilot, "pi52 ssh://pi@elsewhere box ✓ ready")
        await pilot.press("a", "escape")
        await until(pilot, lambda: at(pilot, HostsScreen))

    hosts(act)


def test_a_key_that_is_not_known_is_accepted_by_a_yes_alone() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("a")
        await fill_in(pilot, "new", "ssh://10.0.0.7")
        for answer in ("escape", "y"):
            await pilot.press("enter")
            await until(pilot, lambda: at(pilot, TrustScreen))
            await sees(pilot, "10.0.0.7 was never reached", "ssh-ed25519", KEY["fingerprint"])
            await sees(pilot, "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
            await pilot.press("enter", "space")
            assert at(pilot, TrustScreen)
            await pilot.press(answer)
            await until(pilot, lambda: not at(pilot, TrustScreen))
            if answer == "escape":
                await sees(pilot, "Not added: its key was not accepted")
                assert "host_trust" not in dict(engine.asked)
        await sees(pilot, "new ssh://10.0.0.7 box ✓ ready")

    engine = Saved(known=False)
    hosts(act, engine)
    assert engine.last("host_trust") == {
        "host": "ssh://10.0.0.7",
        "fingerprint": KEY["fingerprint"],
    }


def test_a_saved_host_whose_key_is_not_known_is_asked_about_when_it_is_checked() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("enter")
        await until(pilot, lambda: at(pilot, TrustScreen))
        await pilot.press("escape")
        await sees(pilot, "box ✗ failed", "its key was not accepted")
        await pilot.press("enter")
        await until(pilot, lambda: at(pilot, TrustScreen))
        await pilot.press("y")
        await sees(pilot, "box ✗ 1 missing")

    engine = hosts(act, Saved(known=False))
    assert engine.last("host_trust")["host"] == "lab-4090"


def test_a_host_that_shows_another_key_by_then_is_not_trusted() -> None:
    another = AnswerFailed("lab-4090: the key of 10.0.0.7 is not known yet: SHA256:else", 2)

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("enter")
        await until(pilot, lambda: at(pilot, TrustScreen))
        await pilot.press("y")
        await sees(pilot, "✗ failed lab-4090: the key of 10.0.0.7 is not known yet: SHA256:else")

    hosts(act, Saved(known=False, host_trust=another))


def test_removing_asks_first() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("j")
        for answer in ("escape", "enter"):
            await sees(pilot, "pi5 ssh://pi@10.0.0.7")
            await pilot.press("d")
            await until(pilot, lambda: at(pilot, RemoveScreen))
            await sees(pilot, "Take this host off the list?", "pi5 ssh://pi@10.0.0.7")
            await pilot.press(answer)
            await until(pilot, lambda: at(pilot, HostsScreen))
        await until(pilot, lambda: "pi5" not in seen(pilot.app))
        await sees(pilot, "lab-4090")

    engine = hosts(act)
    assert [args for asked, args in engine.asked if asked == "host_remove"] == [{"name": "pi5"}]


def test_what_fails_is_told() -> None:
    fails = {
        "host_check": AnswerFailed("lab-4090: 10.0.0.7 does not answer within 20 s"),
        "host_remove": AnswerFailed("hosts.toml: cannot be written: read-only"),
    }

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("enter")
        await sees(pilot, "✗ failed lab-4090: 10.0.0.7 does not answer within 20 s")
        await pilot.press("d", "enter")
        await sees(pilot, "hosts.toml: cannot be written")
        await pilot.press("escape")
        await sees(pilot, "box not yet")

    hosts(act, Saved(**fails))


def test_a_list_that_cannot_be_read_is_told() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await sees(pilot, "hosts.toml is damaged")

    hosts(act, Saved(hosts=AnswerFailed("hosts.toml is damaged; mend it, or delete it", 2)))


def test_a_check_that_takes_long_holds_up_nothing() -> None:
    gate = asyncio.Event()

    async def slow(on_part: object, name: str) -> Any:
        if name == "lab-4090":
            await gate.wait()
        return FIT

    async def act(pilot: Pilot[Any]) -> None:
        await pilot.press("enter", "enter")
        await sees(pilot, "checking ...", "Connecting to lab-4090")
        await pilot.press("j", "enter")
        await sees(pilot, "board ✓ ready", "checking ...")
        await pilot.press("f1")
        await until(pilot, lambda: at(pilot, KeysScreen))
        gate.set()
        await pilot.press("escape")
        await sees(pilot, "box ✓ ready", "board ✓ ready")

    engine = hosts(act, Saved(host_check=slow))
    assert [args["name"] for asked, args in engine.asked if asked == "host_check"] == [
        "lab-4090",
        "pi5",
    ]


def test_what_is_not_known_of_a_host_is_said() -> None:
    device = {**EXAMINED["device"], "memory_bytes": None, "cpu": None, "governors": None}
    cards = [{"name": "RTX 4090", "memory_bytes": 24 * 10**9, "free_bytes": None}]
    graphics = {**EXAMINED["graphics"], "cards": cards, "driver": "550.1", "cuda": None}
    found = {
        **{**EXAMINED, "device": device, "graphics": graphics, "temperature": None},
        **{"throttling": None, "problems": EXAMINED["problems"][1:]},
    }
    said = dict(wording.host_lines(found))
    assert said["Memory"] == "unknown, 7.40 GB free"
    assert said["Processor"].startswith("unknown, 4 cores (aarch64, asimd")
    assert said["GPU"] == "RTX 4090 (24.0 GB), driver 550.1"
    assert said["Clocks"] == "governor unknown, temperature unknown, throttling unknown"
    assert wording.host_state(found) == "! 1 to see"
