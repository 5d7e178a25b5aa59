"""The engine asked over a pipe, for a screen that does not import it: ``python -m edgeprune.answers``.

Each line of the standard input is a question, ``{"id": n, "ask": name, "args": {...}}``. Lines of the standard output
answer it: any number of ``{"id": n, "part": ...}``, then ``{"id": n, "answer": ...}`` or ``{"id": n, "error": text,
"exit_code": 1 or 2}``. Each question has a thread of its own, so that a slow one holds up no other; what builds models
takes turns. What libraries print goes to the standard error. The process ends with its input; a run that it started
does not.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edgeprune import library, recipe, run, runs, worker
from edgeprune.errors import BadInput, EdgepruneError, Interrupted
from edgeprune.events import Emit, Event, Note, Progress
from edgeprune.recipe import Recipe
from edgeprune.remote import hosts
from edgeprune.remote.hosts import Host

Part = Callable[[Any], None]

ALONE = "--alone"
"""Of a process that does for another one what needs a process of its own."""
ALONE_COMMAND = (sys.executable, "-m", "edgeprune.answers", ALONE)
PATIENCE = {False: 1.5, True: 30.0}
"""Seconds that work which must not be left half done has to end when the input has ended; by ``alone``."""


class Server:
    """Answers questions; ``say`` is given each line as plain JSON values, one at a time.

    Args:
        say: writes a line.
        alone: there is nobody else to answer, so that nothing is prepared and nothing handed on.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None], alone: bool = False) -> None:
        self._say = say
        self._alone = alone
        self._saying = threading.Lock()
        self._building = threading.Lock()
        """Held while models are built: transformers changes torch's default type for that, in all threads."""
        self._hub_ready, self._engine_ready = threading.Event(), threading.Event()
        self._closing = threading.Event()
        self._unfinished: list[threading.Thread] = []
        self._questions: dict[str, Callable[..., Any]] = {
            "models": self._models,
            "search": self._search,
            "card": self._card,
            "outlook": self._outlook,
            "preflight": self._preflight,
            "start": self._start,
            "resume": self._resume,
            "stop_away": self._stop_away,
            "export": self._export if alone else self._export_elsewhere,
            "hosts": self._hosts,
            "host_check": self._host_check,
            "host_add": self._host_add,
            "host_trust": self._host_trust,
            "host_remove": self._host_remove,
        }

    def serve(self, lines: Iterable[bytes]) -> None:
        """Answer what is asked until the lines end; what is not answered then never is."""
        threading.Thread(target=self._prepare, daemon=True).start()
        for line in lines:
            thread = threading.Thread(target=self._reply, args=(line,), daemon=True)
            thread.start()
        self._closing.set()
        deadline = time.monotonic() + PATIENCE[self._alone]
        for thread in list(self._unfinished):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _prepare(self) -> None:
        """Import, one after the other, what the first questions will need: threads that import at once may collide."""
        with suppress(Exception):  # told where it is missed
            import huggingface_hub

            _ = huggingface_hub.HfApi, huggingface_hub.scan_cache_dir, huggingface_hub.constants
        self._hub_ready.set()
        if not self._alone:
            with suppress(Exception):
                import transformers

                from edgeprune import outlook, preflight  # noqa: F401

                _ = transformers.AutoConfig, transformers.AutoModelForCausalLM
        self._engine_ready.set()

    # ---- a question

    def _reply(self, line: bytes) -> None:
        number: Any = None
        try:
            number, ask, arguments = _parsed(line)
            told = {"answer": self._answer(ask, arguments, number)}
        except EdgepruneError as error:
            code = error.exit_code if isinstance(error, BadInput) else 1
            told = {"error": str(error), "exit_code": code}
            number = _number(line) if number is None else number
        except Exception as error:  # a bug: all of it in the log, and the others are still answered
            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
        self._tell(number, told)

    def _answer(self, ask: str, arguments: dict[str, Any], number: Any) -> Any:
        answer = self._questions.get(ask)
        if answer is None:
            known = ", ".join(self._questions)
            raise BadInput(f"there is no question '{ask}'; there are {known}")

        def part(value: Any) -> None:
            self._tell(number, {"part": value})

        try:
            inspect.signature(answer).bind(part, **arguments)
        except TypeError as error:
            raise BadInput(f"{ask}: {error}") from None
        return answer(part, **arguments)

    def _tell(self, number: Any, told: dict[str, Any]) -> None:
        with self._saying:
            self._say({"id": number, **told})

    # ---- what is here

    def _models(self, _part: Part) -> list[dict[str, Any]]:
        self._hub_ready.wait()
        recent = dict.fromkeys(info.model for info in runs.list_runs() if info.model)
        return [asdict(model) for model in library.local_models(list(recent))]

    def _search(self, _part: Part, text: str, limit: int = 20) -> list[dict[str, Any]]:
        self._hub_ready.wait()
        return [asdict(model) for model in library.search(text, limit)]

    # ---- what would become of it

    def _card(self, _part: Part, model: str, trust_remote_code: bool = False) -> dict[str, Any]:
        self._engine_ready.wait()
        from edgeprune import outlook

        outlook.find(model, trust_remote_code)  # the Hub may be slow, and others need not wait
        with self._building:
            return outlook.card(model, trust_remote_code)

    def _outlook(self, _part: Part, model: str, **arguments: Any) -> dict[str, Any]:
        self._engine_ready.wait()
        from edgeprune import outlook

        try:
            inspect.signature(outlook.outlook).bind(model, **arguments)
        except TypeError as error:
            raise BadInput(f"outlook: {error}") from None
        outlook.find(model)
        with self._building:
            return outlook.outlook(model, **arguments)

    def _preflight(self, part: Part, recipe: str, folder: str) -> dict[str, Any]:
        self._engine_ready.wait()
        from edgeprune import preflight

        ok = True
        for check in preflight.checks(_read(recipe), Path(folder).absolute(), turn=self._building):
            part(asdict(check))
            ok = ok and check.state != "failed"
        return {"ok": ok}

    # ---- work

    def _start(self, part: Part, recipe: str, folder: str) -> dict[str, Any]:
        self._hub_ready.wait()
        self._must_finish()
        started = run.start(_read(recipe), folder, _notes(part))
        return {"folder": started.folder, "pid": started.pid}

    def _resume(self, part: Part, folder: str) -> dict[str, Any]:
        self._must_finish()
        started = run.restart(folder, _notes(part))
        return {"folder": started.folder, "pid": started.pid}

    def _stop_away(self, _part: Part, folder: str) -> dict[str, Any]:
        """Stop what another machine does for a run that nothing here watches; ``told``: it was at work."""
        self._must_finish()
        from edgeprune.remote import address, box

        far = address.read(Path(folder))
        if far is None:
            raise BadInput(f"{folder} is not done by another machine; see: edgeprune runs")
        return {"told": box.stop_unwatched(Path(folder), far)}

    def _must_finish(self) -> None:
        self._unfinished.append(threading.current_thread())

    def _export(self, part: Part, folder: str, precision: str, output: str) -> dict[str, Any]:
        self._engine_ready.wait()
        from edgeprune.exporters.onnx import export

        self._must_finish()
        path = Path(output).absolute()
        emit = self._unless_closing(_progress(part))
        made = export(str(Path(folder) / worker.PRUNED), path, precision=precision, emit=emit)
        return {"folder": str(path), "file_bytes": made["bytes"]}

    def _unless_closing(self, emit: Emit) -> Emit:
        """Interrupt the work at its next word when nobody waits for it any more, so that it clears away its files."""

        def pass_on(event: Event) -> None:
            if self._closing.is_set():
                raise Interrupted("stopped")
            emit(event)

        return pass_on

    def _export_elsewhere(
        self, part: Part, folder: str, precision: str, output: str
    ) -> dict[str, Any]:
        """Let a process of its own export, which gives its memory back; its input ends with this process."""
        arguments = {"folder": folder, "precision": precision, "output": output}
        question = json.dumps({"id": 1, "ask": "export", "args": arguments}) + "\n"
        with subprocess.Popen(
            ALONE_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(question.encode())
            process.stdin.flush()
            for told in map(json.loads, process.stdout):
                if "part" in told:
                    part(told["part"])
                elif "error" in told:
                    raise (BadInput if told["exit_code"] == 2 else EdgepruneError)(told["error"])
                else:
                    return dict(told["answer"])
        raise EdgepruneError("the export's process ended without a word (out of memory?)")

    # ---- other machines

    def _hosts(self, _part: Part) -> list[dict[str, Any]]:
        return [
            {"name": host.name, "url": host.url, "kind": host.kind} for host in hosts.list_hosts()
        ]

    def _host_check(self, _part: Part, name: str) -> dict[str, Any]:
        return _examined(hosts.find(name))

    def _host_add(
        self, _part: Part, name: str, url: str, kind: hosts.Kind = "box"
    ) -> dict[str, Any]:
        """Save a host that can be reached and has a key that is known."""
        user, address, port = hosts.parse_url(url)
        host = hosts.Host(name=name, address=address, user=user, port=port, kind=kind)
        if any(each.name == name for each in hosts.list_hosts()):
            raise BadInput(f"{name} is saved already; take another name, or remove that one first")
        hosts.refuse(host, replace=True)
        found = _examined(host)
        if "unknown_key" not in found:
            hosts.add(host)
        return found

    def _host_trust(self, _part: Part, host: str, fingerprint: str) -> None:
        from edgeprune.remote.connection import trust

        trust(hosts.find(host), fingerprint)

    def _host_remove(self, _part: Part, name: str) -> None:
        hosts.remove(name)


def _examined(host: Host) -> dict[str, Any]:
    """Return what there is on a host, or its key, if that is not known yet, as ``unknown_key``."""
    from edgeprune.remote import check
    from edgeprune.remote.connection import UnknownHostKey, connect

    try:
        with connect(host) as link:
            return check.examine(link)
    except UnknownHostKey as error:
        return {
            "unknown_key": {
                "machine": error.machine,
                "algorithm": error.algorithm,
                "fingerprint": error.fingerprint,
            }
        }


def _parsed(line: bytes) -> tuple[Any, str, dict[str, Any]]:
    try:
        question = json.loads(line)
        number, ask, arguments = question["id"], question["ask"], question.get("args") or {}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadInput('not a question; write {"id": 1, "ask": "models", "args": {}}') from None
    if not isinstance(ask, str) or not isinstance(arguments, dict):
        raise BadInput("not a question: ask must be a name, and args an object")
    return number, ask, arguments


def _number(line: bytes) -> Any:
    """Return the id of a line that is otherwise no question, None if it has none."""
    with suppress(ValueError, LookupError, TypeError):
        return json.loads(line)["id"]
    return None


def _read(text: str) -> Recipe:
    return recipe._with_local_files(recipe.parse_toml(text), Path.cwd())


def _notes(part: Part) -> Emit:
    def pass_on(event: Event) -> None:
        if isinstance(event, Note):
            part(event.text)

    return pass_on


def _progress(part: Part) -> Emit:
    done = {"done": 0, "total": 0}

    def pass_on(event: Event) -> None:
        if isinstance(event, Progress):
            done.update(done=event.done, total=event.total)
            part({**done, "note": event.note or event.stage})
        elif isinstance(event, Note):
            part({**done, "note": event.text})

    return pass_on


def main(alone: bool = False) -> None:
    """Answer on the standard output what is asked on the standard input, and end the process with it."""
    replies: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anybody prints from now on is no answer

    def say(line: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # who does not listen has ended the input as well
            replies.write(json.dumps(line, default=str) + "\n")
            replies.flush()

    Server(say, alone).serve(sys.stdin.buffer)
    # Threads that nobody waits for may be deep inside a library: an ordinary end would wait for them, or crash.
    os._exit(0)


if __name__ == "__main__":
    main(alone=ALONE in sys.argv)
