"""The command line as its users meet it: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer.main
from narration import EVENTS

import edgeprune.inspection
from edgeprune import cli, console
from edgeprune.__main__ import main
from edgeprune.errors import BadInput, EdgepruneError, Interrupted

COMMANDS = ("prune", "inspect", "ppl", "export", "profile", "run", "demo", "doctor")
QUICK = (
    "--sparsity",
    "0.4",
    "--iterations",
    "2",
    "--samples",
    "4",
    "--repair-samples",
    "4",
    "--length",
    "16",
)


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line in this process."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Result:
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Let `edgeprune inspect` fail in a given way."""

    def fail(error: BaseException) -> None:
        def inspect(*_: object, **__: object) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(edgeprune.inspection, "inspect", inspect)

    return fail


# ---- help and usage


def test_help_is_quick() -> None:
    command = [sys.executable, "-m", "edgeprune", "--help"]
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Its own work, not its waiting: other programs may be busy.
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.4


def test_alone_it_says_what_there_is(call) -> None:
    done = call()
    assert done.code == 0
    assert "needs a terminal" in done.err
    assert all(name in done.out for name in COMMANDS)


def test_help_tells_the_exit_codes(call) -> None:
    done = call("--help")
    assert (done.code, done.err) == (0, "")
    assert "0 done, 1 failed, 2 bad input" in done.out


def test_version(call) -> None:
    assert call("--version").out == f"edgeprune {edgeprune.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_can_be_typed(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]
    examples = [
        line.strip() for line in command.help.splitlines() if line.strip().startswith("edgeprune ")
    ]
    assert examples
    for example in examples:
        program, sub, *arguments = shlex.split(example)
        assert (program, sub) == ("edgeprune", name)
        command.make_context(sub, arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nonsense", "No such command 'nonsense'"),
        ("inspect", "Missing argument 'MODEL'"),
        ("inspect x --nonsense", "No such option"),
        ("prune x", "Missing option '-o'"),
        ("prune x -o y", "give one target"),
        ("prune x -o y --sparsity 0.3 --params 9M", "give one target"),
        ("prune x -o y --sparsity much", '--sparsity: "much" is not a fraction'),
        ("prune x -o y --sparsity 120%", "below 1"),
        ("prune x -o y --params 9X", '--params: "9X"'),
        ("prune x -o y --memory lots", '--memory: "lots"'),
        ("prune x -o y --sparsity 0.3 --method best", "--method"),
        ("prune x -o y --sparsity 0.3 --iterations 0", "--iterations"),
        ("prune x -o y --sparsity 0.3 --iterations few", "--iterations"),
        ("prune x -o y --sparsity 0.3 --skip-layers first", "--skip-layers"),
        ("ppl x --window 1", "--window"),
        ("export x -o y", "add --onnx"),
        ("export x -o y --onnx --precision int3", "--precision"),
        ("profile x --repeats 0", "--repeats"),
        ("run", "name a recipe and a folder"),
        ("run recipe.toml", "name a recipe and a folder"),
        ("run recipe.toml --resume z", "--resume takes all from the folder"),
    ],
)
def test_misuse_is_told_in_one_line(
    call, arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments.split())
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: ")
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


# ---- how a command ends


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadInput("no such thing; type another"), 2, "no such thing; type another"),
        (EdgepruneError("the work failed"), 1, "the work failed"),
        (Interrupted("stopped; go on with: x"), 130, "stopped; go on with: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left", "/disk/x"), 2, "the disk is full: /disk/x"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("odd\nvalue"), 1, "unexpected ValueError: odd value"),
    ],
)
def test_every_end_is_one_line_and_a_code(call, failing, error, code: int, said: str) -> None:
    failing(error)
    done = call("inspect", "x")
    assert (done.code, done.out) == (code, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"error: {said}")


def test_several_problems_are_a_line_each(call, failing) -> None:
    failing(BadInput("first\nsecond"))
    assert call("inspect", "x").errors == ["error: first", "error: second"]


def test_traceback_on_demand(call, failing, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(ValueError("odd"))
    assert "Traceback" not in call("inspect", "x").err
    monkeypatch.setenv("EDGEPRUNE_TRACEBACK", "1")
    assert "Traceback" in call("inspect", "x").err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeprune", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert err == b""


def test_ctrl_c_ends_a_command_at_work() -> None:
    code = (
        "import sys, time, types; "
        "engine = types.ModuleType('edgeprune.inspection'); "
        "engine.inspect = lambda *_, **__: (print('working', flush=True), time.sleep(60)); "
        "sys.modules['edgeprune.inspection'] = engine; "
        "from edgeprune.__main__ import main; sys.exit(main(['inspect', 'x']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: interrupted\n")


# ---- answers


def test_inspect_for_people_and_programs(call, dense: Path) -> None:
    shown = call("inspect", dense)
    assert (shown.code, shown.err) == (0, "")
    assert "Parameters" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    found = json.loads(call("inspect", dense, "--json").out)
    assert found["layers"][0]["intermediate_size"] == 128
    assert found["parameters"] > found["decoder_parameters"]


def test_the_whole_way(call, dense: Path, tmp_path: Path) -> None:
    pruned, exported, whole = (tmp_path / name for name in ("pruned", "exported", "whole"))
    done = call("prune", dense, "-o", pruned, *QUICK)
    assert done.code == 0, done.err
    assert "█" in done.out
    assert f"edgeprune export {pruned}" in done.err

    found = json.loads(call("inspect", pruned, "--json").out)
    assert found["pruned"]
    assert found["decoder_parameters"] <= 0.6 * found["dense"]["decoder_parameters"]

    scored = call("ppl", pruned, "--max-tokens", 200, "--window", 32, "--json")
    assert json.loads(scored.out)["tokens"] == 200
    assert "windows of 32" in call("ppl", dense, "--max-tokens", 200, "--window", 32).out

    for model, output in ((pruned, exported), (dense, whole)):
        done = call("export", model, "--onnx", "-o", output, "--precision", "fp32")
        assert done.code == 0, done.err
        assert "greedy text    the same" in done.out

    options = ("--prompt", 8, "--generate", 8, "--repeats", 1)
    done = call("profile", exported, "--against", whole, *options)
    assert done.code == 0, done.err
    assert "Decode (tokens/s)" in done.out
    assert len(json.loads(call("profile", exported, *options, "--json").out)["runs"]) == 1


def test_no_output_folder_is_overwritten(call, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    for arguments in (
        ("prune", dense, "-o", tmp_path, *QUICK),
        ("export", dense, "--onnx", "-o", tmp_path),
    ):
        done = call(*arguments)
        assert (done.code, len(done.errors)) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["inspect {}", "ppl {}", "export {} --onnx -o out"])
def test_no_such_model(call, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*command.format("./not-there").split())
    assert (done.code, done.out, len(done.errors)) == (2, "", 1)
    assert "not-there" in done.err
    assert list(tmp_path.iterdir()) == []


def test_doctor(call, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune import doctor

    monkeypatch.setattr(doctor, "MEASURE_SECONDS", 0.01)
    shown = call("doctor")
    assert "Processor" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    found = json.loads(call("doctor", "--json").out)
    assert found["system"]["cores"] >= 1
    assert found["compute"]["matmul_gflops"]["float32"] > 0
    assert found["libraries"]["torch"]["installed"]
    assert all(problem["mend"] for problem in found["problems"])
    missing = [problem["what"] for problem in found["problems"] if problem["required"]]
    assert shown.code == (1 if missing else 0), missing


def test_answers_are_as_wide_as_the_terminal_is_now(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (100, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        console.show("word " * 50)
        longest = max(map(len, capsys.readouterr().out.splitlines()))
        assert width - 5 <= longest <= width


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    console.json_document({"x": [float("nan"), float("inf"), 1.5], "p": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"x": [None, None, 1.5], "p": "a"}


# ---- progress


def test_progress_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_INTERVAL", 0.0)
    with console.progress() as emit:
        for event in EVENTS:
            emit(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    lines = err.splitlines()
    assert lines[0] == "2/3 Prune ..."
    assert lines[1] == "2/3 Prune: 5/40 layer passes, iteration 1 of 4"
    assert lines[2] == "warning: [a] note"
    assert lines[3].startswith("2/3 Prune: 15/40 layer passes, iteration 2 of 4, loss 3.50, 92.1M")
    assert lines[3].endswith("left")
    assert lines[4] == "2/3 Prune: done in 1 min 23 s"


def test_progress_on_a_terminal_is_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, seen = terminal()
    try:
        program = (
            "from edgeprune import console; from narration import EVENTS\n"
            "with console.progress() as emit:\n"
            "    for event in EVENTS: emit(event); hasattr(emit, 'drawing') and emit.drawing.refresh()\n"
        )
        environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}
        subprocess.run(
            [sys.executable, "-c", program],
            stderr=screen,
            check=True,
            env={**environment, "PYTHONPATH": str(Path(__file__).parent)},
        )
    finally:
        os.close(screen)
    raw = drain(seen)
    text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", raw)
    assert "━" in text
    assert "iteration 2 of 4, loss 3.50" in text
    assert "✓ 2/3 Prune  1 min 23 s" in text
    assert "warning: [a] note" in text
    assert "\x1b[3" not in raw  # NO_COLOR


def terminal() -> tuple[int, int]:
    """Return a terminal for a program to write to, and what to read its screen from."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    reader, writer = pty.openpty()
    return writer, reader


def drain(reader: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # how Linux says that the other end is closed
            part = b""
        if not part:
            os.close(reader)
            return b"".join(parts).decode()
        parts.append(part)
