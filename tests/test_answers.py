"""The answers process as the app has it: a process at the end of two pipes."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from sshd import Sshd
from sshd import sshd as sshd

from edgeprune import answers, control, lock, runs, worker
from edgeprune.events import Note
from edgeprune.log import read_kinds
from edgeprune.remote import hosts
from edgeprune.sources import load_config, resolve
from edgeprune.tui import wording

FAKE = Path(__file__).with_name("fake_worker.py")
# an answers process whose runs cost nothing, on a model that need not exist
WITH_FAKE_RUNS = f"""
import sys
from edgeprune import answers, run
run.WORKER = (sys.executable, {str(FAKE)!r})
run._source_problems = lambda source: print("chatter of a library", flush=True) or []
answers.main()
"""
RECIPE = '[source]\nmodel = "m"\n[prune]\nsparsity = 0.3\n'


class Asked:
    """An answers process; ``ask`` returns what it said to one question, parts first."""

    def __init__(self, *command):
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.number = 0

    def send(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def begin(self, question, **args):
        self.number += 1
        self.send(json.dumps({"id": self.number, "ask": question, "args": args}))
        return self.number

    def next(self):
        return json.loads(self.process.stdout.readline())

    def ask(self, question, **args):
        number = self.begin(question, **args)
        said = [self.next()]
        while "part" in said[-1]:
            said.append(self.next())
        assert {each["id"] for each in said} == {number}
        return said

    def end(self):
        self.process.stdin.close()
        code = self.process.wait(60)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    process = Asked("-m", "edgeprune.answers")
    yield process
    assert process.end() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")


def test_questions_asked_together_are_answered_each_with_its_number(asked, model):
    numbers = {
        asked.begin("card", model=str(model)): "card",
        asked.begin("outlook", model=str(model), target={"sparsity": 0.4}): "outlook",
        asked.begin("search", text="smol"): "search",
        asked.begin("models"): "models",
    }
    said = [asked.next() for _ in numbers]
    found = {numbers[each["id"]]: each for each in said}
    assert found["card"]["answer"]["inspection"]["model"] == "tiny"
    assert found["outlook"]["answer"]["recipe_target"] == {"sparsity": 0.4}
    assert "cannot be reached" in found["search"]["error"]
    assert found["search"]["exit_code"] == 1
    assert isinstance(found["models"]["answer"], list)


@pytest.mark.parametrize(
    ("question", "args", "words"),
    [
        ("nonsense", {}, "there is no question 'nonsense'; there are models, search, card"),
        ("card", {}, "card: missing a required argument: 'model'"),
        ("card", {"model": "no/such.gguf"}, "no such model"),
        ("outlook", {"model": "x", "wrong": 1}, "outlook: "),
        ("preflight", {"recipe": "not TOML", "folder": "x"}, "not valid TOML"),
        ("resume", {"folder": "no/such/run"}, "no run to go on with here"),
    ],
)
def test_what_cannot_be_answered_is_told_and_the_next_question_is_served(
    asked, question, args, words
):
    (told,) = asked.ask(question, **args)
    assert words in told["error"]
    assert told["exit_code"] == 2


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"ask": "models"}', '{"id": 1, "ask": 5}'])
def test_a_line_that_is_no_question_gets_an_error(asked, line):
    asked.send(line)
    told = asked.next()
    assert told["error"].startswith("not a question")
    assert told["exit_code"] == 2


def test_the_checks_of_a_run_come_one_by_one(asked, model, tmp_path):
    recipe = f'[source]\nmodel = "{model}"\n[prune]\nsparsity = 0.3\n[evaluate]\nwindow = 128\n'
    *parts, last = asked.ask("preflight", recipe=recipe, folder=str(tmp_path / "run"))
    checks = [each["part"] for each in parts]
    assert {tuple(check) for check in checks} == {("name", "title", "state", "text", "mend")}
    assert checks[0]["name"] == "model"
    assert last["answer"] == {"ok": True}
    *_, last = asked.ask("preflight", recipe=recipe, folder=str(model))
    assert last["answer"] == {"ok": False}


def test_a_runs_model_is_exported_again(asked, tmp_path):
    run = tmp_path / "run"
    pruned = tiny.save("llama", run / worker.PRUNED, num_hidden_layers=1)
    output = tmp_path / "again"
    *parts, last = asked.ask("export", folder=str(run), precision="fp32", output=str(output))
    assert last["answer"]["folder"] == str(output)
    parameters = sum(p.numel() for p in tiny.model("llama", num_hidden_layers=1).parameters())
    assert last["answer"]["file_bytes"] > 4 * parameters
    assert load_config(resolve(pruned)).num_hidden_layers == 1
    assert (output / "model.onnx").is_file()
    assert parts
    assert all(set(each["part"]) == {"done", "total", "note"} for each in parts)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"error": "no precision 'int3'", "exit_code": 2},
            {"error": "no precision 'int3'", "exit_code": 2},
        ),
        (
            {"part": 5},
            {
                "error": "the export's process ended without a word (out of memory?)",
                "exit_code": 1,
            },
        ),
    ],
)
def test_an_export_that_fails_is_told_as_its_process_told_it(monkeypatch, said, expected):
    code = f"import json; input(); print(json.dumps({said!r}))"
    monkeypatch.setattr(answers, "ALONE_COMMAND", (sys.executable, "-c", code))
    told = []
    answers.Server(told.append)._reply(
        b'{"id": 1, "ask": "export", "args": {"folder": "a", "precision": "b", "output": "c"}}'
    )
    assert told[-1] == {"id": 1, **expected}


def test_a_started_run_outlives_the_process(tmp_path):
    folder = tmp_path / "run"
    process = Asked("-c", WITH_FAKE_RUNS)
    # its second stage waits for a file, so that the run is at work until it is told
    folder.mkdir()
    (folder / worker.RECIPE).write_text(RECIPE)
    worker.write_state(folder, {})
    (folder / "misdeed").write_text("wait")
    *_, last = process.ask("resume", folder=str(folder))
    pid = last["answer"]["pid"]
    assert last["answer"] == {"folder": str(folder), "pid": pid}
    assert process.end() == 0
    try:
        assert lock.is_held(folder)
        assert runs.describe(folder).pid == pid
        (folder / "go").touch()
        assert control.attach(folder)["second"] == {"value": 2}
    finally:
        control.stop(folder)


def test_a_run_is_started_from_the_text_of_a_recipe(tmp_path):
    process = Asked("-c", WITH_FAKE_RUNS)
    (refused,) = process.ask("start", recipe=RECIPE + "[nonsense]\n", folder=str(tmp_path / "run"))
    assert "nonsense: unknown key" in refused["error"]
    *_, last = process.ask("start", recipe=RECIPE, folder=str(tmp_path / "run"))
    assert last["answer"]["folder"] == str(tmp_path / "run")
    assert control.attach(tmp_path / "run")["first"] == {"value": 1}
    assert process.end() == 0
    assert not read_kinds(tmp_path / "run" / worker.EVENTS, Note)[1:]


def test_a_slow_question_holds_up_no_other():
    said, told = [], threading.Event()

    def say(line):
        said.append(line)
        told.set()

    server = answers.Server(say, alone=True)
    released = threading.Event()
    server._questions |= {"slow": lambda part: released.wait(), "quick": lambda part: "here"}

    def lines():
        yield b'{"id": 1, "ask": "slow"}'
        yield b'{"id": 2, "ask": "quick"}'
        told.wait()

    server.serve(lines())
    assert said == [{"id": 2, "answer": "here"}]
    released.set()


def test_work_that_nobody_waits_for_any_more_is_interrupted_at_its_next_word():
    said, begun, closed = [], threading.Event(), threading.Event()
    server = answers.Server(said.append, alone=True)

    def work(part):
        server._must_finish()
        emit = server._unless_closing(lambda event: said.append(event.text))
        emit(Note(text="before"))
        begun.set()
        closed.wait()
        emit(Note(text="after"))

    def lines():
        yield b'{"id": 1, "ask": "work"}'
        begun.wait()
        threading.Timer(0, closed.set).start()

    server._questions["work"] = work
    server._closing = closed
    server.serve(lines())
    assert said == ["before", {"id": 1, "error": "stopped", "exit_code": 1}]


# ---- other machines


@pytest.fixture
def asked_of_hosts(sshd):
    """An answers process that has the home and the settings of this test."""
    process = Asked("-m", "edgeprune.answers")
    yield process
    assert process.end() == 0


def test_a_host_is_added_when_its_key_is_trusted_then_checked_and_removed(
    asked_of_hosts, sshd: Sshd
):
    def ask(question, **args):
        *_, last = asked_of_hosts.ask(question, **args)
        return last.get("answer", last)

    sshd.forget_key()
    new = {"name": "box", "url": sshd.url, "kind": "board"}
    key = ask("host_add", **new)["unknown_key"]
    assert key == {
        **{"machine": f"[127.0.0.1]:{sshd.port}", "algorithm": "ssh-ed25519"},
        "fingerprint": sshd.fingerprint,
    }
    assert ask("hosts") == []
    refused = ask("host_trust", host=sshd.url, fingerprint="SHA256:another")
    assert (refused["exit_code"], sshd.known_hosts.exists()) == (2, False)
    assert ask("host_trust", host=sshd.url, fingerprint=key["fingerprint"]) is None
    found = ask("host_add", **new)
    assert {"system", "python", "storage", "graphics", "device", "problems"} <= set(found)
    assert ask("hosts") == [new]
    assert "is saved already" in ask("host_add", **new)["error"]
    assert ask("host_check", name="box")["device"].keys() == found["device"].keys()
    assert wording.host_lines(found)
    assert ask("host_remove", name="box") is None
    assert ask("hosts") == []


def test_a_host_that_cannot_be_reached_is_not_saved(asked_of_hosts, sshd: Sshd):
    sshd.stop()
    for name, url, words in (
        ("box", sshd.url, "cannot be reached"),
        ("a b", sshd.url, "is no name for a host"),
        ("box", "https://x", "is no host"),
    ):
        (told,) = asked_of_hosts.ask("host_add", name=name, url=url)
        assert words in told["error"]
    assert asked_of_hosts.ask("hosts")[-1]["answer"] == []
    (told,) = asked_of_hosts.ask("host_check", name="gone")
    assert (told["exit_code"], "no such host" in told["error"]) == (2, True)


def test_the_checks_of_a_run_elsewhere_ask_the_machines(
    asked_of_hosts, sshd: Sshd, model, tmp_path
):
    hosts.add(sshd.host)
    recipe = (
        f'[source]\nmodel = "{model}"\n[prune]\nsparsity = 0.3\n[evaluate]\nwindow = 128\n'
        '[where]\non = "far"\n[profile]\ndevices = ["far"]\n'
    )
    *parts, _ = asked_of_hosts.ask("preflight", recipe=recipe, folder=str(tmp_path / "run"))
    checks = {each["part"]["name"]: each["part"] for each in parts}
    for name in ("box", "device-far"):
        assert checks[name]["text"].startswith("far: "), checks[name]
        assert "of memory" in checks[name]["text"]
    assert {"prune-memory", "train-memory"}.isdisjoint(checks)
    sshd.stop()
    *parts, last = asked_of_hosts.ask("preflight", recipe=recipe, folder=str(tmp_path / "run"))
    lost = parts[-1]["part"]
    assert (lost["state"], lost["mend"]) == ("failed", "edgeprune hosts check far")
    assert last["answer"] == {"ok": False}
