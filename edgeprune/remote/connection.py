"""A link to a host: commands, functions and files over there, as ordinary calls here.

asyncssh lives in a thread of its own, which also notices a dead link while nobody asks anything. What it has to tell
in between (lines, progress, the question for a passphrase) is told in the caller's thread.
"""

from __future__ import annotations

import asyncio
import codecs
import inspect
import json
import posixpath
import queue
import re
import secrets
import shlex
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent import futures
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import asyncssh

from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.remote import far_call, login
from edgeprune.remote.background import Background, Told
from edgeprune.remote.hosts import Host
from edgeprune.remote.login import UnknownHostKey as UnknownHostKey
from edgeprune.remote.login import Unreachable as Unreachable
from edgeprune.remote.words import harmless

OLDEST_PYTHON = (3, 9)
"""What functions over there are written for."""
BLOCK, REQUESTS = 261_120, 16
"""Bytes of a file in a request, and requests on their way at a time: as fast as sftp, as measured."""
STDERR_TAIL = 8192
"""Bytes of the end of a process's stderr that are kept."""
CLOSE_SECONDS = 5

_T = TypeVar("_T")
_File = asyncssh.SFTPClientFile
Progressed = Callable[[int], object]


_SAY_ID = 'echo "$0 $$" >&2; exec "$@"'


@dataclass(frozen=True)
class _Command:
    """A process over there, and its id, which is that of its process group, too."""

    process: asyncssh.SSHClientProcess[bytes]
    id: int


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (negative: the signal that ended it), and all it wrote."""

    code: int
    output: str


def connect(host: Host, ask: Callable[[str], str] | None = None) -> Link:
    """Log in to ``host``. ``ask`` is called for the passphrase of a key; without it, only an agent unlocks keys.

    Raises:
        Unreachable: if it does not answer; trying again may help.
        UnknownHostKey: if its key is in no known_hosts file; see ``trust``.
        BadInput: if its key has changed, no key of the user's is accepted, or ~/.ssh/config is of no use.
        EdgepruneError: if the server speaks nothing that is safe enough.
    """
    background = Background()
    try:
        hops = background.call(lambda told: login.log_in(host, _asker(background, ask, told)))
    except BaseException:
        background.end()
        raise
    return Link(host, background, hops)


def _asker(
    background: Background, ask: Callable[[str], str] | None, told: Told
) -> login.Ask | None:
    if ask is None:
        return None
    return lambda prompt: background.ask(partial(ask, prompt), told)


def trust(host: Host, fingerprint: str) -> None:
    """Add the key that ``UnknownHostKey`` showed to the user's known_hosts, only if it is still the one shown.

    Raises:
        UnknownHostKey: if the host shows another key now.
        Unreachable, BadInput, EdgepruneError: as ``connect``.
    """
    background = Background()
    try:
        login.abort(background.call(lambda _told: login.log_in(host, trusted=fingerprint)))
    except UnknownHostKey as error:
        if error.fingerprint != fingerprint:
            raise
    finally:
        background.end()


class Link:
    """A connection to ``host``; a context manager that closes it.

    Every method raises Unreachable once the link is broken: then it is of no more use, and a new one is needed.
    """

    def __init__(
        self, host: Host, background: Background, hops: list[asyncssh.SSHClientConnection]
    ) -> None:
        self.host = host
        self._background = background
        self._hops = hops
        self._connection = hops[-1]
        self._sftp: asyncssh.SFTPClient | None = None

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the link. Commands that are at work on it are left to the end of their input."""
        if self._background.is_alive():
            self._background.begin(self._close())
            self._background.end()

    # ---- functions and commands

    def far(self, module: ModuleType, function: str, /, **arguments: Any) -> Any:
        """Call ``function`` of a ``far_*`` module over there: its text is sent, its result comes back as JSON.

        Raises:
            BadInput: for its ValueError, a full disk there, or no fit Python there.
            EdgepruneError: for whatever else it raises.
        """
        mark = f"edgeprune-{secrets.token_hex(8)} "
        name = module.__name__.rpartition(".")[2]
        source = inspect.getsource(module)
        sent = {"name": name, "source": source, "function": function, "arguments": arguments}
        argv = [self.host.python, "-I", "-c", "import sys;exec(sys.stdin.readline())"]
        input = f"{_first_line(mark)}\n{json.dumps(sent)}".encode("ascii")
        out: list[str] = []
        err: list[str] = []
        with self._mended():
            code = self._background.call(
                lambda _told: self._run(argv, input, out.append, err.append)
            )
        return self._answer(code, out, err, mark, function)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        on_line: Callable[[str], object] | None = None,
        timeout: float | None = None,
    ) -> Done:
        """Run a command and wait for its end; what it writes to stdout and stderr is one text.

        ``on_line`` is called with each line as it comes, without its end. After ``timeout`` seconds the command is
        killed: EdgepruneError.
        """
        lines: list[str] = []

        async def work(told: Told) -> int:
            def hear(line: str) -> None:
                line = harmless(line)
                if lines and not lines[-1].endswith("\n"):
                    lines[-1] += "\n"  # the other stream's last line
                lines.append(line)
                if on_line is not None:
                    told(partial(on_line, line.removesuffix("\n")))

            async with asyncio.timeout(timeout):
                return await self._run(argv, input, hear, hear)

        with self._mended():
            try:
                return Done(self._background.call(work), "".join(lines))
            except TimeoutError:
                what = f"{argv[0]} took longer than {timeout:g} s and was ended"
                raise EdgepruneError(f"{self.host.name}: {what}") from None

    def open(self, argv: Sequence[str]) -> LineProcess:
        """Start a command that is talked to in lines."""
        with self._mended():
            command = self._background.call(lambda _told: self._start(argv))
        return LineProcess(self, argv[0], command)

    # ---- files

    def upload(self, local: Path, far: str, *, offset: int, progress: Progressed) -> None:
        """Write what ``local`` has from byte ``offset`` on into the file ``far``, from there on.

        ``progress`` is called with the bytes that ``far`` has by then. What a broken link leaves there is whole from
        its beginning on: its size is the next ``offset``.

        Raises:
            BadInput: if the disk over there is full.
        """
        with self._mended():
            self._background.call(lambda told: self._upload(local, far, offset, progress, told))

    def download(self, far: str, local: Path, *, offset: int, progress: Progressed) -> None:
        """Write what the file ``far`` has from byte ``offset`` on into ``local``, from there on; as ``upload``.

        Raises:
            BadInput: if there is no such file.
            OSError: if ``local`` cannot be written.
        """
        with self._mended():
            self._background.call(lambda told: self._download(far, local, offset, progress, told))

    def read(self, far: str, offset: int, limit: int = 1 << 20) -> bytes:
        """Return what the file ``far`` has from byte ``offset`` on, at most ``limit`` bytes.

        Empty if there is nothing new, or no such file.
        """
        with self._mended():
            return self._background.call(lambda _told: self._read(far, offset, limit))

    # ---- in the thread of the link

    async def _start(self, argv: Sequence[str]) -> _Command:
        """Start a command, which first says its id: servers do not pass signals on to what root runs."""
        mark = secrets.token_hex(8)
        line = shlex.join(["sh", "-c", _SAY_ID, mark, *argv])
        process = await self._connection.create_process(
            f"exec {line}", encoding=None, request_pty=False
        )
        said = b""
        while text := await process.stderr.readline():
            said += text
            if found := re.search(rb"%s (\d+)" % mark.encode(), text):
                return _Command(process, int(found[1]))
        await process.wait_closed()
        if process.returncode is None:
            raise asyncssh.ConnectionLost("the command was cut off")
        why = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise EdgepruneError(f"{self.host.name}: it runs no commands: {why or 'it says nothing'}")

    async def _run(
        self,
        argv: Sequence[str],
        input: bytes,
        hear: Callable[[str], object],
        hear_error: Callable[[str], object],
    ) -> int:
        command = await self._start(argv)
        process = command.process
        try:
            with suppress(BrokenPipeError):  # it may end without reading
                process.stdin.write(input)
                process.stdin.write_eof()
            await asyncio.gather(
                _hear(process.stdout, hear),
                _hear(process.stderr, hear_error),
                process.wait_closed(),
            )
        except BaseException:
            await self._end(command)
            raise
        if process.returncode is None:
            raise asyncssh.ConnectionLost("the command was cut off")
        return process.returncode

    async def _end(self, command: _Command) -> None:
        """Kill a command and what it started, but for what has left its group."""
        if command.process.returncode is None:
            with suppress(asyncssh.Error, OSError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    kill = shlex.join(["kill", "-KILL", "--", f"-{command.id}"])
                    await self._connection.run(kill, request_pty=False)
                    await command.process.wait_closed()
        command.process.close()

    async def _files(self) -> asyncssh.SFTPClient:
        if self._sftp is None:
            try:
                self._sftp = await self._connection.start_sftp_client()
            except (asyncssh.SFTPError, asyncssh.ChannelOpenError) as error:
                if self._connection.is_closed():
                    raise
                raise BadInput(
                    f"{self.host.name}: its server offers no SFTP; install it there: "
                    "sudo apt install openssh-sftp-server"
                ) from error
        return self._sftp

    async def _upload(
        self, local: Path, far: str, offset: int, progress: Progressed, told: Told
    ) -> None:
        files = await self._files()
        flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT
        with local.open("rb") as source:
            source.seek(offset)
            try:
                async with files.open(far, flags, encoding=None, block_size=0) as target:
                    # The server writes in the order of asking: a broken link leaves no gap.
                    writes = (target.write(part, at) for at, part in _parts(source, offset))
                    async with aclosing(_in_turn(writes)) as sizes:
                        async for size in sizes:
                            offset += size
                            told(partial(progress, offset))
            except asyncssh.SFTPFailure as error:
                raise await self._unwritten(files, far, error) from error

    async def _unwritten(
        self, files: asyncssh.SFTPClient, far: str, error: asyncssh.SFTPFailure
    ) -> EdgepruneError:
        """Return why a file could not be written: SFTP has no word for a full disk."""
        name = self.host.name
        with suppress(asyncssh.SFTPError):
            disk = await files.statvfs(posixpath.dirname(far) or ".")
            if disk.bavail * disk.frsize < BLOCK * REQUESTS:
                return BadInput(f"{name}: its disk is full ({far}); free some space there")
        return EdgepruneError(f"{name}: {far} could not be written: {one_line(error)}")

    async def _download(
        self, far: str, local: Path, offset: int, progress: Progressed, told: Told
    ) -> None:
        files = await self._files()
        async with files.open(far, "rb", encoding=None, block_size=0) as source:
            end = (await source.stat()).size or 0
            reads = (_read(source, at, min(BLOCK, end - at)) for at in range(offset, end, BLOCK))
            with local.open("r+b" if local.exists() else "xb") as target:
                target.seek(offset)
                async with aclosing(_in_turn(reads)) as parts:
                    async for part in parts:
                        target.write(part)
                        told(partial(progress, target.tell()))

    async def _read(self, far: str, offset: int, limit: int) -> bytes:
        files = await self._files()
        try:
            async with files.open(far, "rb", encoding=None, block_size=0) as source:
                return await _read(source, offset, limit)
        except asyncssh.SFTPNoSuchFile:
            return b""

    async def _close(self) -> None:
        login.abort(self._hops)

    # ---- what it means

    def _answer(self, code: int, out: list[str], err: list[str], mark: str, function: str) -> Any:
        name, python = self.host.name, self.host.python
        marked = [line for line in out if line.startswith(mark)]
        if not marked:
            said = harmless("".join(err or out).strip().rpartition("\n")[2])
            if code in (126, 127):
                raise BadInput(
                    f"{name} has no {python} that can be run ({said}); install it there: "
                    "sudo apt install python3 python3-venv, or name another with --python"
                )
            if any("nknown option: -I" in line for line in err):
                raise self._too_old("2")
            raise EdgepruneError(f"{name}: {function} ended with exit code {code}: {said}")
        answer = harmless(json.loads(marked[-1].removeprefix(mark)))
        if "old" in answer:
            raise self._too_old(answer["old"])
        if "error" in answer:
            message = one_line(ValueError(answer["error"]), 500)
            raise self._failure(answer["kind"], message, function)
        return answer["result"]

    def _too_old(self, version: str) -> BadInput:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return BadInput(
            f"{self.host.name}: its {self.host.python} is Python {version}, too old: {wanted} or newer is needed; "
            "name another with --python"
        )

    def _failure(self, kind: str, message: str, function: str) -> EdgepruneError:
        name = self.host.name
        if kind == "input":
            return BadInput(f"{name}: {message}")
        if kind == "full":
            return BadInput(f"{name}: its disk is full ({message}); free some space there")
        return EdgepruneError(f"{name}: {function} failed: {message}")

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """Turn asyncssh's errors into ours."""
        name = self.host.name
        try:
            yield
        except (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost) as error:
            raise Unreachable(f"{name}: the link broke: {one_line(error)}") from error
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPPermissionDenied) as error:
            raise BadInput(f"{name}: {one_line(error)}") from error
        except asyncssh.SFTPError as error:
            raise EdgepruneError(f"{name}: {one_line(error)}") from error
        except (asyncssh.Error, ConnectionError, futures.CancelledError) as error:
            raise Unreachable(f"{name}: the link broke: {one_line(error)}") from error


class LineProcess:
    """A command over there that reads and writes lines, within the life of its link."""

    def __init__(self, link: Link, name: str, command: _Command) -> None:
        self._link = link
        self._name = name
        self._command = command
        self._process = command.process
        self._lines: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()
        self._errors: deque[str] = deque()
        link._background.begin(self._listen())
        link._background.begin(self._listen_to_errors())

    def write_line(self, line: str) -> None:
        """Give the command a line. EdgepruneError if it has ended."""
        with self._link._mended():
            try:
                self._link._background.call(lambda _told: self._write(f"{line}\n".encode()))
            except BrokenPipeError:
                if self._link._connection.is_closed():
                    raise
                said = self.stderr_tail().strip().rpartition("\n")[2]
                raise EdgepruneError(
                    f"{self._link.host.name}: {self._name} has ended: {said}"
                ) from None

    def read_line(self, timeout: float) -> str:
        """Return the next line, its end included; "" if the command has closed its output.

        Raises:
            TimeoutError: if none comes within ``timeout`` seconds.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"{self._name}: no line within {timeout:g} s") from None
        if not line or isinstance(line, Exception):
            self._lines.put(line)  # the end stays the end
        if isinstance(line, Exception):
            with self._link._mended():
                raise line
        return line

    def stderr_tail(self) -> str:
        """Return the end of what the command has written to stderr so far."""
        return str(harmless("".join(self._errors)[-STDERR_TAIL:]))

    def close(self) -> None:
        """Kill the command if it still runs, and all that it started and that did not leave its group."""
        with suppress(Unreachable), self._link._mended():
            self._link._background.call(lambda _told: self._link._end(self._command))

    async def _write(self, data: bytes) -> None:
        self._process.stdin.write(data)
        await self._process.stdin.drain()

    async def _listen(self) -> None:
        try:
            await _hear(self._process.stdout, self._lines.put)
        except (asyncssh.Error, OSError) as error:
            self._lines.put(error)
        except asyncio.CancelledError:
            self._lines.put(asyncssh.ConnectionLost("it was closed"))
            raise
        else:
            self._lines.put("")

    async def _listen_to_errors(self) -> None:
        with suppress(asyncssh.Error, OSError):
            await _hear(self._process.stderr, self._keep)

    def _keep(self, line: str) -> None:
        self._errors.append(line)
        while len(self._errors) > 1 and sum(map(len, self._errors)) > 2 * STDERR_TAIL:
            self._errors.popleft()


# ---- processes


def _first_line(mark: str) -> str:
    """Return the line of Python, of any version, that makes the call which follows it."""
    said = f'{mark}{{"old": "%s"}}\n'
    check = f"sys.version_info<{OLDEST_PYTHON}and(sys.stdout.write({said!r}%sys.version.split()[0]),sys.exit())"
    return f"import sys;{check};exec({inspect.getsource(far_call)!a});call({mark!r})"


async def _hear(reader: asyncssh.SSHReader[bytes], heard: Callable[[str], object]) -> None:
    """Hand on the lines that come, each with its end; the last may have none."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    begun: list[str] = []
    while data := await reader.read(1 << 16):
        *ends, rest = decoder.decode(data).split("\n")
        for end in ends:
            heard("".join([*begun, end, "\n"]))
            begun.clear()
        begun.append(rest)
    last = "".join([*begun, decoder.decode(b"", final=True)])
    if last:
        heard(last)


# ---- parts of files


def _parts(source: Any, offset: int) -> Iterator[tuple[int, bytes]]:
    while part := source.read(BLOCK):
        yield offset, part
        offset += len(part)


async def _read(source: _File, offset: int, size: int) -> bytes:
    """Return ``size`` bytes from ``offset`` on, fewer only at the end of the file."""
    found = b""
    while len(found) < size:
        part: bytes = await source.read(min(BLOCK, size - len(found)), offset + len(found))
        if not part:
            break
        found += part
    return found


async def _in_turn(works: Iterable[Awaitable[_T]]) -> AsyncGenerator[_T, None]:
    """Yield what the works come to, in their order, several of them on their way at a time."""
    pending: deque[asyncio.Future[_T]] = deque()
    try:
        for work in works:
            pending.append(asyncio.ensure_future(work))
            if len(pending) == REQUESTS:
                yield await pending.popleft()
        while pending:
            yield await pending.popleft()
    finally:
        for left in pending:
            left.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
