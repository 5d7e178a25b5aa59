"""The machines that can be reached by SSH: listed, added, checked and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Header, Label, Static

from edgeprune.tui import wording
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.lists import Page, Table
from edgeprune.tui.screens.question import RemoveScreen, TrustScreen
from edgeprune.tui.widgets.fields import Entry, Field, Form, Pick
from edgeprune.tui.widgets.footer import KeyFooter
from edgeprune.tui.widgets.pairs import Pairs

if TYPE_CHECKING:
    from edgeprune.tui.app import EdgepruneApp

KINDS = ("box", "board")
COLUMNS = ("Name", "Address", "Kind", "Last check")
NO_HOSTS = """\
[b]No hosts yet.[/b]

A host is another machine that this one reaches by SSH: a box prunes and trains for you, a board is what you measure on.
Press [b]a[/b] to add one."""


class HostsScreen(Screen[None]):
    """Lists the saved hosts; below them what the check of the one under the cursor found."""

    app: EdgepruneApp
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (140, "-wide")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        # Before the table, so that it is in the footer.
        Binding(
            "enter",
            "check",
            "Check",
            id="hosts.check",
            tooltip="See what the host has, and what is missing",
            priority=True,
        ),
        Binding("a", "add", "Add", id="hosts.add", tooltip="Save another machine"),
        Binding("d,delete", "remove", "Remove", id="hosts.remove", tooltip="Take it off this list"),
        Binding("y", "copy", "Copy", id="hosts.copy", tooltip="Copy what mends the problems"),
        Binding("escape", "leave", "Back", id="hosts.leave"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._hosts: list[dict[str, Any]] = []
        self._checks: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        self._checking: set[str] = set()
        self._problem = ""

    def compose(self) -> ComposeResult:
        """Make the list and the place for what a check found."""
        yield Header()
        with Container(id="hosts-and-check"):
            yield Table(id="hosts", cursor_type="row", zebra_stripes=True)
            with Page(id="host-page"):
                yield Pairs("host-check")
        yield Static(NO_HOSTS, id="no-hosts")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Ask for the list."""
        self.sub_title = "Hosts"
        self.query_one("#no-hosts").display = False
        self.query_one(Table).add_columns(*COLUMNS)
        self.query_one(Table).focus()
        self._tell([("", "Asking for the saved hosts ...")])
        self.load()

    # ---- the list

    @work(exclusive=True, group="hosts")
    async def load(self, cursor: str = "") -> None:
        """Ask for the list; the cursor goes to that host, or stays."""
        try:
            self._hosts, self._problem = await self.app.answers.ask("hosts"), ""
        except AnswerFailed as error:
            self._hosts, self._problem = [], str(error)
        self._show(cursor)

    def _show(self, cursor: str = "") -> None:
        table = self.query_one(Table)
        cursor = cursor or self.name_here
        table.clear()
        for host in self._hosts:
            table.add_row(host["name"], host["url"], host["kind"], self._state(host["name"]))
        names = [host["name"] for host in self._hosts]
        if cursor in names:
            table.move_cursor(row=names.index(cursor), animate=False)
        self.query_one("#no-hosts").display = not names and not self._problem
        self.query_one("#hosts-and-check").display = bool(names or self._problem)
        self._follow()

    def _state(self, name: str) -> str:
        if name in self._checking:
            return "checking ..."
        if name in self._failed:
            return "✗ failed"
        return wording.host_state(self._checks[name]) if name in self._checks else "not yet"

    @property
    def host_here(self) -> dict[str, Any] | None:
        """The host under the cursor."""
        row = self.query_one(Table).cursor_row
        return self._hosts[row] if 0 <= row < len(self._hosts) else None

    @property
    def name_here(self) -> str:
        """Its name; empty where there is none."""
        return self.host_here["name"] if self.host_here else ""

    @on(DataTable.RowHighlighted)
    def _follow(self) -> None:
        """Show what is known of the host under the cursor."""
        name = self.name_here
        if name in self._checking:
            self._tell([("", f"Connecting to {name} ...")])
        elif name in self._failed:
            self._tell([("✗ failed", self._failed[name])])
        elif name in self._checks:
            self._tell(wording.host_lines(self._checks[name]))
        else:
            self._tell([("", self._problem or f"{name} was not checked yet: Enter checks it")])

    def _tell(self, pairs: list[tuple[str, str]]) -> None:
        self.query_one("#host-check", Pairs).show(pairs)

    # ---- checking

    @on(DataTable.RowSelected)
    def action_check(self) -> None:
        """Check the host under the cursor."""
        name = self.name_here
        if name and name not in self._checking:
            self.check(name)

    @work(group="check")
    async def check(self, name: str) -> None:
        """Connect to a host and see what is there."""
        self._checking.add(name)
        self._show()
        try:
            found = await ask_trusting(self.app, "host_check", name, name=name)
        except AnswerFailed as error:
            self._take(name, None, str(error))
        else:
            self._take(name, found, "its key was not accepted, so nothing is known of it")

    def _take(self, name: str, found: dict[str, Any] | None, problem: str) -> None:
        """Keep what was found, or else why nothing was."""
        self._checking.discard(name)
        for kept in (self._failed, self._checks):
            kept.pop(name, None)
        if found is None:
            self._failed[name] = problem
        else:
            self._checks[name] = found
        self._show()

    def action_copy(self) -> None:
        """Copy the commands that mend what the check found, over SSH as well (OSC 52)."""
        found = self._checks.get(self.name_here)
        commands = wording.host_mends(found) if found else []
        if commands:
            self.app.copy_to_clipboard("\n".join(commands))
            self.notify("Copied")
        else:
            self.notify("There is nothing to mend that a check has found")

    # ---- adding and removing

    def action_add(self) -> None:
        """Ask for another host."""
        self.app.push_screen(AddHostScreen(), self._added)

    def _added(self, added: tuple[str, dict[str, Any]] | None) -> None:
        if added is None:
            self.load()
            return
        name, found = added
        self._failed.pop(name, None)
        self._checks[name] = found
        self.load(name)

    def action_remove(self) -> None:
        """Ask whether the host under the cursor is to go."""
        host = self.host_here
        if host is not None:
            what = (
                f"{host['name']}  {host['url']}\n\nNothing is changed on that machine. "
                "Recipes that name it can be run again when it was added again."
            )
            name = host["name"]
            self.app.push_screen(RemoveScreen(what), lambda yes: self._remove(name, yes))

    def _remove(self, name: str, yes: bool | None) -> None:
        if yes:
            self.forget(name)

    @work(group="hosts")
    async def forget(self, name: str) -> None:
        """Take a host off the list."""
        try:
            await self.app.answers.ask("host_remove", name=name)
        except AnswerFailed as error:
            self.app.show_error(error)
        self._checks.pop(name, None)
        self._failed.pop(name, None)
        self.load()

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss()


class AddHostScreen(ModalScreen[tuple[str, dict[str, Any]] | None]):
    """Asks for a machine, connects to it, and answers with its name and what was found there."""

    app: EdgepruneApp
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "add", "Connect and add", id="add.add", priority=True),
        Binding("escape", "dismiss", "Back", id="add.back"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._called = Entry("", "host-name")
        self._url = Entry("", "host-url")
        self._kind = Pick(KINDS, KINDS[0], "host-kind")
        self._line = Static(id="host-told", classes="hint", markup=False)
        self._at_work = False

    def compose(self) -> ComposeResult:
        """Make the form."""
        with Vertical(classes="dialog"):
            yield Label("Add a host", classes="dialog-title")
            with Form():
                yield Field("Name", self._called, "short, such as pi5")
                yield Field("Address", self._url, "ssh://user@host[:port]")
                yield Field("Kind", self._kind, "a box prunes; a board measures")
            yield self._line
        yield KeyFooter()

    def on_mount(self) -> None:
        """Say what is meant."""
        self._say("Your keys, agent and ~/.ssh/config are used, as by ssh itself.")
        self._called.focus()

    def _say(self, text: str) -> None:
        if self.is_attached:
            self._line.update(text)

    def action_add(self) -> None:
        """Connect to the host, and save it if that works."""
        if not self._at_work:
            url = self._url.value.strip()
            url = url if "://" in url else f"ssh://{url}"
            self.add(self._called.value.strip(), url, self._kind.value)

    @work(exclusive=True, group="add")
    async def add(self, name: str, url: str, kind: str) -> None:
        """Add the host; what is wrong is told in place."""
        self._at_work = True
        self._say(f"Connecting to {url} ...")
        try:
            found = await ask_trusting(self.app, "host_add", url, name=name, url=url, kind=kind)
        except AnswerFailed as error:
            self._say(f"✗ {error}")
        else:
            if found is None:
                self._say("Not added: its key was not accepted")
            else:
                self.dismiss((name, found))
        finally:
            self._at_work = False


async def ask_trusting(
    app: EdgepruneApp, question: str, host: str, **args: Any
) -> dict[str, Any] | None:
    """Ask something of a host; of a key that is not known, ask the user first: None if it is refused."""
    while True:
        found: dict[str, Any] = await app.answers.ask(question, **args)
        key = found.get("unknown_key")
        if key is None:
            return found
        if not await app.push_screen_wait(TrustScreen(wording.key_text(key))):
            return None
        await app.answers.ask("host_trust", host=host, fingerprint=key["fingerprint"])
