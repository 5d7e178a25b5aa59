"""The runner alone: what it needs, what it counts, how it refuses, and that it leaves nothing."""

from __future__ import annotations

import ast
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from exports import VOCAB_SIZE, spoil

from edgeprune.profiles import runner

SOURCE = Path(runner.__file__)
SHORT = ("--prompt", "8", "--generate", "6", "--repeats", "3", "--threads", "1")


def run(folder: Path, *options: str, file: Path = SOURCE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(file), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


class Asked:
    """A runner in worker mode."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SOURCE), str(folder), "--worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def tell(self, command: str, **arguments: object) -> None:
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, command: str, **arguments: object) -> dict:
        self.tell(command, **arguments)
        return json.loads(self.process.stdout.readline())


# ---- one file for boards


def test_the_file_is_python_3_9_and_needs_little():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime_genai"}


def test_a_copy_elsewhere_prints_one_document(tiny_export, tmp_path):
    copy = tmp_path / "board.py"
    shutil.copy(SOURCE, copy)
    done = run(tiny_export, *SHORT, file=copy)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == runner.SCHEMA_VERSION
    assert document["ratios"] is None
    settings = document["settings"]
    assert (settings["prompt"], settings["generate"], settings["repeats"]) == (8, 6, 3)
    assert (settings["threads"], settings["seed"]) == (1, runner.SEED)
    (only,) = document["runs"]
    assert only["name"] == tiny_export.name
    assert len(only["repetitions"]) == 3
    for repetition in only["repetitions"]:
        assert repetition["tokens"] == 6
        assert len(repetition["inter_token_seconds"]) == 5
        decode = repetition["decode_seconds"]
        assert sum(repetition["inter_token_seconds"]) == pytest.approx(decode, abs=1e-5)
        assert repetition["decode_tokens_per_second"] == pytest.approx(5 / decode)
        filled = repetition["prefill_seconds"]
        assert repetition["prefill_tokens_per_second"] == pytest.approx(8 / filled)
        assert repetition["time_to_first_token_seconds"] > filled
    assert set(only["summary"]) >= {*runner.PROCESS_METRICS, *runner.REPETITION_METRICS}
    speeds = [entry["decode_tokens_per_second"] for entry in only["repetitions"]]
    found = only["summary"]["decode_tokens_per_second"]
    assert found["mean"] == pytest.approx(statistics.fmean(speeds))
    assert (found["n"], found["min"], found["max"]) == (3, min(speeds), max(speeds))


def test_sizes_and_memory_are_those_of_the_files_and_the_process(tiny_export):
    document = json.loads(run(tiny_export, *SHORT).stdout)
    (only,) = document["runs"]
    graph = [path for path in tiny_export.iterdir() if path.name.startswith("model.onnx")]
    assert only["file_bytes"] == sum(path.stat().st_size for path in graph)
    assert only["folder_bytes"] == sum(path.stat().st_size for path in tiny_export.iterdir())
    assert 0 < only["memory_before_load_bytes"] < only["memory_loaded_bytes"]
    assert only["memory_loaded_bytes"] <= only["peak_memory_bytes"]
    assert only["peak_memory_bytes"] < document["device"]["memory_bytes"]


# ---- what it counts


def test_the_prompt_is_always_the_same_and_in_the_vocabulary():
    prompt = runner.prompt_tokens(1000, VOCAB_SIZE)
    assert prompt == runner.prompt_tokens(1000, VOCAB_SIZE)
    assert prompt[:10] == runner.prompt_tokens(10, VOCAB_SIZE)
    assert min(prompt) >= 0
    assert max(prompt) < VOCAB_SIZE
    assert len(set(prompt)) > 200


def test_the_end_of_text_does_not_end_a_repetition(tiny_export, tmp_path):
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_export, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = list(range(VOCAB_SIZE - 1))  # all that it could say but one
    (folder / "genai_config.json").write_text(json.dumps(config))
    session = runner.Session(folder, prompt=8, generate=12, threads=1)
    session.load()
    repetition = session.repetition()
    assert repetition["tokens"] == 12
    assert len(repetition["inter_token_seconds"]) == 11


def test_a_generation_cut_short_is_an_error(tiny_export, monkeypatch):
    session = runner.Session(tiny_export, prompt=8, generate=12, threads=1)
    session.load()
    whole = runner.Session(tiny_export, prompt=8, generate=7, threads=1)
    whole.load()
    monkeypatch.setattr(session, "_generator", whole._generator)
    with pytest.raises(runner.RunnerError, match="stopped after 7 of 12 tokens"):
        session.repetition()


def test_percentiles_are_interpolated():
    values = [float(value) for value in range(101)][::-1]
    assert [runner.percentile(values, p) for p in (0, 50, 95, 99, 100)] == [0, 50, 95, 99, 100]
    assert runner.percentile([1.0, 2.0], 50) == 1.5
    assert runner.percentile([7.0], 99) == 7.0


def test_a_single_value_has_no_spread():
    assert runner.summarise([3.0])["stdev"] is None
    assert runner.summarise([1.0, 3.0])["stdev"] == pytest.approx(2**0.5)


def test_load_of_others_is_what_is_busy_and_not_ours():
    assert runner.other_load((100.0, 1000.0), (106.0, 1010.0), own=4.0) == pytest.approx(0.2)
    assert runner.other_load((100.0, 1000.0), (104.0, 1010.0), own=4.1) == 0.0
    assert runner.other_load((100.0, 1000.0), (100.1, 1000.1), own=0.0) is None
    assert runner.other_load(None, None, own=1.0) is None


def test_cores_memory_and_names_are_known_here():
    device = runner.device()
    assert 1 <= device["physical_cores"] <= device["logical_cores"]
    assert 1 <= runner.default_threads() <= device["physical_cores"]
    assert device["cpu"]
    assert device["os"]
    assert device["versions"]["onnxruntime-genai"]


# ---- sensors

CPU = "sys/devices/system/cpu"
HOT = "throttled=0x50005"


def tree(root: Path, files: dict[str, object]) -> str:
    """Write a made-up /sys; return its root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return str(root)


def no_firmware() -> str:
    return ""


def clocks(*kilohertz: int, governor: str = "ondemand") -> dict[str, object]:
    found: dict[str, object] = {}
    for core, value in enumerate(kilohertz):
        found[f"{CPU}/cpu{core}/cpufreq/scaling_cur_freq"] = value
        found[f"{CPU}/cpu{core}/cpufreq/scaling_governor"] = governor
    return found


def rail(chip: int, name: str, **files: object) -> dict[str, object]:
    folder = f"sys/class/hwmon/hwmon{chip}"
    return {f"{folder}/name": name, **{f"{folder}/{key}": value for key, value in files.items()}}


def test_a_machine_that_tells_nothing_is_not_guessed_about(tmp_path):
    sensors = runner.Sensors(str(tmp_path), no_firmware)
    names = ("clock", "temperature", "governors", "throttling")
    assert sensors.state() == dict.fromkeys(names)
    with runner.Watch(sensors) as watch:
        pass
    for name in ("clock", "temperature", "throttled", "joules"):
        assert watch.seen[name] is None


def test_clocks_governors_and_temperature_are_read(tmp_path):
    files = {
        **clocks(600_000, 2_400_000),
        "sys/class/thermal/thermal_zone0/temp": 61_500,
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone1/temp": 100_000,
        "sys/class/thermal/thermal_zone1/type": "PMIC-Die",  # says 100 degrees, always
        "sys/class/thermal/thermal_zone2/temp": -273_150,  # switched off
        **rail(0, "k10temp", temp1_input=63_000),
        **rail(1, "nvme", temp1_input=70_000),
    }
    state = runner.Sensors(tree(tmp_path, files), no_firmware).state()
    assert state["clock"] == {"mean": 1.5e9, "min": 0.6e9, "max": 2.4e9}
    assert state["governors"] == ["ondemand"]
    assert state["temperature"] == 63.0
    assert state["throttling"] is None


def test_throttling_is_read_from_counters_coolers_and_firmware(tmp_path):
    counter = f"{CPU}/cpu1/thermal_throttle/package_throttle_count"
    root = tree(tmp_path, {counter: 3, **rail(0, "soctherm_oc", oc1_event_cnt=2)})
    before = runner.throttling(root, no_firmware)
    assert before == {"now": [], "events": 5}
    assert runner.was_throttled(before, before) is False
    tree(tmp_path, {counter: 4})
    assert runner.was_throttled(before, runner.throttling(root, no_firmware)) is True

    cooler = "sys/class/thermal/cooling_device0"
    tree(tmp_path, {f"{cooler}/type": "cpufreq-cpu0", f"{cooler}/cur_state": 0})
    tree(tmp_path, {"sys/class/thermal/cooling_device1/type": "pwm-fan"})
    tree(tmp_path, {"sys/class/thermal/cooling_device1/cur_state": 4})
    assert runner.throttling(root, no_firmware)["now"] == []
    tree(tmp_path, {f"{cooler}/cur_state": 2})
    assert runner.throttling(root, no_firmware)["now"] == ["cooling"]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("throttled=0x0\n", {"now": [], "events": 0}),
        ("throttled=0x50000", {"now": [], "events": 2}),  # since the start, not now
        (HOT, {"now": ["under-voltage", "throttled"], "events": 2}),
        ("VCHI initialization failed", None),
        ("throttled=?", None),
    ],
)
def test_a_raspberry_pis_firmware_is_understood(said, found, tmp_path):
    assert runner.throttling(str(tmp_path), lambda: said) == found


def test_a_bit_of_the_firmware_that_is_new_tells_of_throttling():
    before, after = ({"now": [], "events": count} for count in (1, 2))
    assert runner.was_throttled(before, before) is False
    assert runner.was_throttled(before, after) is True
    assert runner.was_throttled(None, after) is None


def rapl(zone: str, name: str, microjoules: int, highest: int = 1_000_000) -> dict[str, object]:
    folder = f"sys/class/powercap/intel-rapl:{zone}"
    return {
        f"{folder}/name": name,
        f"{folder}/energy_uj": microjoules,
        f"{folder}/max_energy_range_uj": highest,
    }


def test_energy_counters_are_added_and_may_begin_anew(tmp_path):
    files = {**rapl("0", "package-0", 900_000), **rapl("1", "package-1", 100_000)}
    root = tree(tmp_path, {**files, **rapl("0:0", "core", 5), **rapl("2", "psys", 5)})
    source = runner.power_source(root)
    assert source.name == "RAPL"
    assert len(source.counters) == 2
    energy = runner.Energy(source)
    energy.start()
    tree(tmp_path, {**rapl("0", "package-0", 150_000), **rapl("1", "package-1", 400_000)})
    assert energy.stop() == pytest.approx(0.25 + 0.3)


def test_counters_that_only_root_may_read_are_none(tmp_path):
    root = tree(tmp_path, rapl("0", "package-0", 1))
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert runner.power_source(root) == runner.PowerSource(None)


def test_the_rails_of_a_board_are_those_that_hold_all_its_power(tmp_path):
    jetson = {"in1_label": "VDD_IN", "in1_input": 5000, "curr1_input": 1200}
    part = {"in2_label": "VDD_CPU_GPU_CV", "in2_input": 5000, "curr2_input": 400}
    shunts = {"in4_input": 7, "curr4_input": 7}
    root = tree(tmp_path, rail(0, "ina3221", **jetson, **part, **shunts))
    source = runner.power_source(root)
    assert source.name == "power rails"
    assert runner._watts(source.rails) == pytest.approx(6.0)

    tree(tmp_path, rail(0, "ina3221", in1_label="VDD_GPU_SOC"))  # a Jetson without a whole one
    assert runner._watts(runner.power_source(root).rails) == pytest.approx(6.0 + 2.0)


def test_power_in_microwatts_is_the_machines_unless_a_graphics_card_says_it(tmp_path):
    root = tree(
        tmp_path,
        {**rail(0, "amdgpu", power1_input=99), **rail(1, "ina226", power1_input=3_500_000)},
    )
    assert runner._watts(runner.power_source(root).rails) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"status": "Discharging", "power_now": 9_000_000, "voltage_now": 1}, 9.0),
        ({"status": "Discharging", "voltage_now": 12_000_000, "current_now": -500_000}, 6.0),
        ({"status": "Charging", "power_now": 9_000_000}, None),
        ({"status": "Discharging", "power_now": 9_000_000, "scope": "Device"}, None),
        ({"status": "Discharging"}, None),
    ],
)
def test_a_battery_tells_while_it_is_in_use(files, watts, tmp_path):
    folder = "sys/class/power_supply/BAT0"
    named = {f"{folder}/{name}": value for name, value in {"type": "Battery", **files}.items()}
    source = runner.power_source(tree(tmp_path, named))
    assert source.name == (None if watts is None else "battery")
    assert (runner._watts(source.rails) if source.rails else None) == watts


def test_watts_are_integrated_over_the_time(tmp_path):
    root = tree(tmp_path, rail(0, "ina226", power1_input=2_000_000))
    energy = runner.Energy(runner.power_source(root))
    started = time.perf_counter()
    energy.start()
    while len(energy._samples) < 3:  # the thread reads on its own
        time.sleep(0.01)
    joules = energy.stop()
    assert 0 < joules <= 2.0 * (time.perf_counter() - started)
    times = [when for when, _ in energy._samples]
    assert joules == pytest.approx(2.0 * (times[-1] - times[0]))
    energy._samples = [(0.0, 1.0), (1.0, 3.0), (3.0, 3.0)]
    assert energy._integral() == pytest.approx(2.0 + 6.0)


@pytest.fixture
def board(tiny_export, tmp_path):
    """A session on a made-up board, and what writes the board's files."""
    root = tree(tmp_path, {**clocks(2_400_000), **rail(0, "ina226", power1_input=4_000_000)})
    session = runner.Session(tiny_export, prompt=8, generate=6, threads=1)
    session.sensors = runner.Sensors(root, no_firmware)
    session.load()
    return session, lambda files: tree(tmp_path, files)


def test_a_repetition_tells_what_the_board_was_like(board):
    session, _ = board
    found = session.repetition()
    assert found["clock"] == 2.4e9
    assert found["joules"] > 0
    assert found["joules_per_token"] == found["joules"] / 6
    assert found["sensors"]["before"]["governors"] == ["ondemand"]
    assert found["throttled"] is None
    assert runner.CLOCK_FELL not in found["disturbed_by"]
    summary = runner.run_of("export", session.report(), [found])["summary"]
    assert summary["clock"]["mean"] == 2.4e9
    assert summary["joules_per_token"]["mean"] == found["joules_per_token"]
    assert "temperature" not in summary  # it was not told


def test_a_lower_clock_and_throttling_disturb_a_repetition(board):
    session, write = board
    session.warm_up()
    write(clocks(2_000_000))
    assert runner.CLOCK_FELL not in session.repetition()["disturbed_by"]  # the first that counts
    write(clocks(1_850_000))
    assert runner.CLOCK_FELL not in session.repetition()["disturbed_by"]
    write(clocks(1_790_000))
    found = session.repetition()
    assert runner.CLOCK_FELL in found["disturbed_by"]
    assert found["disturbed"]
    assert runner.THROTTLED not in found["disturbed_by"]
    session.sensors.firmware = lambda: HOT
    assert session.repetition()["disturbed_by"][-2:] == [runner.THROTTLED, runner.CLOCK_FELL]
    run = runner.run_of("export", session.report(), [found, found])
    assert run["disturbed"] == 2
    assert run["disturbed_by"][runner.CLOCK_FELL] == 2


def test_a_disturbed_repetition_counts_like_the_others(board):
    session, _ = board
    samples = [session.repetition() for _ in range(3)]
    samples[1].update(disturbed=True, disturbed_by=[runner.THROTTLED])
    run = runner.run_of("export", session.report(), samples)
    assert run["summary"]["decode_tokens_per_second"]["n"] == 3
    assert run["disturbed_by"][runner.THROTTLED] == 1


def test_sustaining_repeats_until_the_time_is_over(board, monkeypatch):
    session, _ = board
    now = iter(range(100))
    monkeypatch.setattr(runner, "time", Clock(lambda: next(now)))
    counted = []
    generate = session._generate
    monkeypatch.setattr(session, "_generate", lambda: counted.append(1) or generate())
    found = session.sustain(3.5)
    assert len(counted) == 4
    assert found["decode_tokens_per_second"] > 0
    assert found["clock"] == 2.4e9


class Clock:
    """The module ``time`` with a ``monotonic`` of its own."""

    def __init__(self, monotonic) -> None:
        self.monotonic = monotonic

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


# ---- what it refuses


@pytest.mark.parametrize("fault", ["absent", "a file", "no config", "damaged config", "no graph"])
def test_what_is_no_export_is_refused_before_anything_loads(fault, tiny_export, tmp_path):
    with pytest.raises(runner.Refused) as caught:
        runner.Session(spoil(tiny_export, tmp_path / "export", fault), prompt=8, generate=8)
    assert "edgeprune export MODEL --onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["graph cut short", "weights cut short", "no weights"])
def test_damaged_files_are_refused(fault, tiny_export, tmp_path):
    done = run(spoil(tiny_export, tmp_path / "export", fault), *SHORT)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot be loaded" in last
    assert "export it again: edgeprune export MODEL --onnx" in last


def test_more_tokens_than_the_context_are_refused(tiny_export):
    with pytest.raises(runner.Refused, match=r"400 \+ 200 tokens do not fit .* context of 512"):
        runner.Session(tiny_export, prompt=400, generate=200)
    runner.Session(tiny_export, prompt=400, generate=112)


@pytest.mark.parametrize(("name", "value"), [("prompt", 0), ("generate", 1), ("threads", -1)])
def test_counts_out_of_range_are_refused(name, value, tiny_export):
    with pytest.raises(runner.Refused, match=f"--{name} must be at least"):
        runner.Session(tiny_export, **{"prompt": 8, "generate": 8, name: value})


def test_too_little_memory_is_seen_before_loading(tiny_export, monkeypatch):
    monkeypatch.setattr(runner, "available_memory", lambda: 1000)
    session = runner.Session(tiny_export, prompt=8, generate=8)
    with pytest.raises(runner.RunnerError, match="GB are free") as caught:
        session.load()
    assert caught.value.exit_code == 1


# ---- the worker


def test_a_worker_answers_line_by_line_and_quits(tiny_export):
    with Asked(tiny_export, *SHORT) as worker:
        assert worker.ask("load")["result"]["file_bytes"] > 0
        assert worker.ask("warmup")["result"]["tokens"] == 6
        assert worker.ask("measure")["result"]["tokens"] == 6
        assert worker.ask("sustain", seconds=0.01)["result"]["decode_tokens_per_second"] > 0
        report = worker.ask("report", repeats=7)["result"]
        assert report["name"] == tiny_export.name
        assert report["settings"]["repeats"] == 7
        assert "energy_sensor" in report["device"]
        assert worker.ask("quit") == {"result": {}}
        assert worker.process.wait(60) == 0


def test_a_worker_answers_a_refusal(tiny_export, tmp_path):
    with Asked(spoil(tiny_export, tmp_path / "export", "graph cut short"), *SHORT) as worker:
        answer = worker.ask("load")
    assert answer["exit_code"] == 2
    assert "cannot be loaded" in answer["error"]


def test_an_idle_worker_idles(tiny_export):
    with Asked(tiny_export, "--prompt=64", "--generate=64", "--threads=2") as worker:
        worker.ask("load")
        worker.ask("measure")
        process = psutil.Process(worker.process.pid)
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.02


def test_the_runtime_gets_the_threads_asked_for(tiny_export):
    def threads(count: int) -> int:
        with Asked(tiny_export, f"--threads={count}") as worker:
            before = psutil.Process(worker.process.pid)
            worker.ask("load")
            return before.num_threads()

    assert threads(3) - threads(1) == 2


def test_a_worker_ends_with_its_stdin_in_the_middle_of_a_repetition(tiny_export):
    with Asked(tiny_export, "--prompt=8", "--generate=500", "--threads=1") as worker:
        worker.ask("load")
        worker.tell("measure")
        worker.process.stdin.close()
        worker.process.stdin = None  # communicate() would flush it
        assert worker.process.wait(60) == 1
        assert worker.process.stdout.read() == ""
