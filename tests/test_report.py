import json
import math
import re

import made_runs
import pytest

from edgeprune import recipe as recipes
from edgeprune import report
from edgeprune.events import Evaluation, Note, PruneIteration, TrainStep

LAYERS = 4
ENERGY = report.ON_DEVICES[-1].key
DENSE = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
PRUNED = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}


def perplexity(value):
    return {"token_perplexity": value, "word_perplexity": 3 * value, "tokens": 9000, "window": 512}


@pytest.fixture
def stages():
    shape = {"parameters": 134_515_008, "decoder_parameters": 106_202_880, "layers": [DENSE] * 4}
    small = {"parameters": 102_654_144, "decoder_parameters": 74_342_016, "layers": [PRUNED] * 4}
    source = {"name": "/home/ada/models/smol<b>", "kind": "folder", "revision": None}
    return {
        "source": {"source": source, "inspection": shape},
        "prune": {"summary": {"seed": 0}, "inspection": small},
        "export-dense": {"bytes": 118e6, "parity": {"mean_kl": 0.2}},
        "export-pruned": {"bytes": 97e6, "parity": {"mean_kl": 0.3}},
        "evaluate": {"dense": perplexity(27.1), "pruned": perplexity(62.3)},
        "profile": {"devices": {"local": made_runs.document()}},
    }


@pytest.fixture
def results(stages):
    return report.build_results(recipes.demo(), stages)


def iteration(number, loss):
    return PruneIteration(
        iteration=number,
        of=2,
        loss=loss,
        decoder_parameters=1,
        layer_importance=[-1.0, 0.0, 0.5, 1.0],
        layer_sparsity=[0.3, 0.2, 0.1, 0.0],
        num_key_value_heads=[3] * LAYERS,
        intermediate_size=[1536] * LAYERS,
        seconds=1.0,
    )


EVENTS = [Note(text="hello"), iteration(1, 3.0), iteration(2, 3.5), iteration(2, 3.4)]


def test_results_have_every_figure_of_both_models_and_their_ratio(results):
    for quantity in report.QUANTITIES[:-1]:
        dense, pruned = results["dense"][quantity.key], results["pruned"][quantity.key]
        assert results["ratios"][quantity.key] == pytest.approx(pruned / dense)
    assert results["pruned"][ENERGY] is results["ratios"][ENERGY] is None
    assert results["pruned"]["layers"] == [PRUNED] * 4
    assert results["schema_version"] == report.SCHEMA_VERSION
    assert results["versions"]["torch"]
    assert results["machine"]["cores"] >= 1


def test_the_table_tells_better_from_worse(results):
    rows = {row.label: row for row in report.results_table(results)}
    assert len(rows) == len(report.QUANTITIES) - 1  # the energy is not known
    assert rows["Parameters"] == report.Row("Parameters", "134.5M", "102.7M", "−23.7 %", True)
    assert rows["File size, int4 ONNX"].pruned == "97.0 MB"
    assert rows["Decode (tokens/s)"].change == "× 1.25"
    assert rows["Decode (tokens/s)"].better
    assert rows["Time to first token"].dense == "150 ms ± 5 %"
    assert rows["Perplexity per token"].change == "× 2.30"
    assert rows["Perplexity per token"].better is False


def test_a_difference_within_the_spread_is_neither_better_nor_worse(stages):
    document = stages["profile"]["devices"]["local"]
    document["ratios"]["decode_tokens_per_second"]["median"] = 1.04  # spread: 5 %
    rows = {r.label: r for r in report.results_table(report.build_results(recipes.demo(), stages))}
    assert rows["Decode (tokens/s)"].better is None
    assert rows["Prefill (tokens/s)"].better is True


def test_a_figure_that_is_not_finite_or_missing_is_null_and_a_dash(stages):
    stages["evaluate"]["pruned"]["token_perplexity"] = math.inf
    stages["evaluate"]["pruned"]["word_perplexity"] = None
    results = report.build_results(recipes.demo(), stages)
    read = json.loads(report.to_json(results))
    assert read["pruned"]["token_perplexity"] is None
    assert read["ratios"]["token_perplexity"] is None
    assert read == results
    rows = {row.label: row for row in report.results_table(results)}
    for label in ("Perplexity per token", "Perplexity per word"):
        assert (rows[label].pruned, rows[label].change, rows[label].better) == ("–", "", None)
    assert report.render(results, EVENTS)


def test_the_summary_says_what_was_won_and_lost(results):
    said = report.summary(results)
    assert said.startswith("30% of the parameters in the decoder layers are gone")
    assert "97.0 MB instead of 118.0 MB" in said
    assert "decodes 25% faster" in said
    assert said.endswith("Perplexity went from 27.10 to 62.30.")


def test_the_page_needs_nothing_else(results):
    page = report.render(results, EVENTS)
    assert len(page) < 1_000_000
    assert page.count("<svg") == 3
    assert not re.search(r"<script|<link|@import|<iframe", page)
    for address in re.findall(r"(?:src|href)=\"([^\"]*)\"", page):
        assert address.startswith(("#", "data:"))
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", page)  # every stand-in colour became a variable
    assert "<h2>Recipe</h2>" in page
    assert "sparsity = 0.3" in page


def test_the_page_escapes_names_and_keeps_the_folders_of_this_machine_to_itself(results):
    results["settings"]["source"]["model"] = results["model"]["name"]
    page = report.render(results, EVENTS)
    assert "smol&lt;b&gt;" in page
    assert "smol<b>" not in page
    assert "/home/ada" not in page


def test_an_iteration_done_twice_counts_once():
    assert [(e.iteration, e.loss) for e in report._iterations(EVENTS)] == [(1, 3.0), (2, 3.4)]


def test_training_has_a_plot_with_its_cuts(results):
    def step(number, loss):
        return TrainStep(
            step=number,
            of=3,
            loss=loss,
            lm_loss=loss,
            learning_rate=1e-4,
            gradient_norm=1.0,
            tokens=64 * number,
            tokens_per_second=10.0,
            seconds_left=0.0,
        )

    held_out = Evaluation(step=3, loss=3.5, perplexity=33.1, tokens=64)
    # the second update was done twice, since its worker was killed
    cut = next(event for event in EVENTS if isinstance(event, PruneIteration))
    events = [cut, step(1, 5.0), step(2, 4.5), cut, step(2, 4.4), step(3, 4.0), held_out]
    assert report._training(events) == ([(1, 5.0), (2, 4.4), (3, 4.0)], [(3, 3.5)], [2])
    assert report.render(results, events).count("<svg") == 4


def test_a_recipe_that_trains_is_shown_without_the_folders_of_this_machine(results):
    recover = {"data": ["/home/ada/notes.txt=2", "builtin"], "tokens": 1000}
    settings = recipes.parse(
        {"source": {"model": "m"}, "prune": {"sparsity": 0.3}, "recover": recover}
    )
    page = report.render(results | {"settings": settings.model_dump()}, EVENTS)
    assert "notes.txt=2" in page
    assert "/home/ada" not in page


def test_without_iterations_the_page_leaves_their_plot_out(results):
    assert report.render(results, []).count("<svg") == 2


# ---- devices


def energy(joules):
    return {"mean": joules, "stdev": 0.02 * joules}


@pytest.fixture
def boards(stages):
    """Results of this machine, of a board that measures energy and heat, and of one that says little."""
    pi = made_runs.document(
        speed=12.0, dense_speed=8.0, device={"cpu": "<Cortex>", "governors": ["performance"]}
    )
    for run, joules in zip(pi["runs"], (0.4, 0.6), strict=True):
        run["summary"][ENERGY] = energy(joules)
        run |= {"disturbed": 2, "disturbed_by": {"throttled": 2}}
        run["sensors"] = {"before": {"temperature": 41.2}, "after": None}
        for number, each in enumerate(run["repetitions"]):
            each |= {"temperature": 50.0 + number, "throttled": number > 2, "clock": 2.4e9}
    pi["ratios"][ENERGY] = {"median": 2 / 3}
    pi["sustained"] = {
        "minutes": 10.0,
        "samples": [
            {"seconds": 30.0 * i, "decode_tokens_per_second": 12.0 - i, "temperature": 60.0 + i}
            | {"clock": 2.4e9, "throttled": i > 3}
            for i in range(6)
        ],
        "first_minute": 11.5,
        "last_minute": 7.5,
        "ratio": 7.5 / 11.5,
    }
    nano = made_runs.document(speed=80.0, sweep=[{"threads": 1}, {"threads": 2}])
    for run in nano["runs"]:
        run["disturbed"] = 0
    stages["profile"]["devices"] |= {"pi5": pi, "nano": nano}
    return report.build_results(recipes.demo(), stages)


def test_devices_stand_side_by_side_in_the_recipes_order(boards):
    rows = {row.label: row for row in report.results_table(boards)}
    labels = [label for label in rows if label.startswith("Decode (")]
    assert labels == [f"Decode (tokens/s), {name}" for name in ("local", "pi5", "nano")]
    assert rows["Decode (tokens/s), pi5"].pruned == "12 ± 5 %"
    assert rows["Decode (tokens/s), pi5"].change == "× 1.50"
    assert rows["Decode (tokens/s), pi5"].better
    assert rows["Decode (tokens/s), nano"].better is None
    assert [label for label in rows if "Energy" in label] == ["Energy per token, pi5"]
    assert rows["Energy per token, pi5"].pruned == "400 mJ ± 2 %"
    assert (rows["Energy per token, pi5"].change, rows["Energy per token, pi5"].better) == (
        "−33.3 %",
        True,
    )
    assert rows["Sustained decode, first → last minute, pi5"] == report.Row(
        "Sustained decode, first → last minute, pi5", "", "11.5 → 7.5", "× 0.65", None
    )
    assert "Parameters" in rows


def test_the_first_device_stands_for_the_run(boards, results, stages):
    for which in (*report.MODELS, "ratios"):
        assert boards[which] == results[which]
    devices = {name: boards["devices"][name] for name in ("pi5", "local")}
    stages["profile"] = {"devices": devices}
    turned = report.build_results(recipes.demo(), stages)
    assert turned["pruned"]["decode_tokens_per_second"] == 12.0
    assert turned["pruned"][ENERGY] == 0.4
    assert turned["ratios"][ENERGY] == pytest.approx(2 / 3)
    assert turned["pruned"]["file_bytes"] == 97e6
    assert report.summary(turned).count("50% faster on pi5 and 25% faster on this machine.") == 1


def test_the_page_tells_of_each_device(boards):
    page = report.render(boards, EVENTS)
    assert page.count("<svg") == 2 + 3 + 1
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", page)
    for heading in ("Devices", "Latency, local", "Latency, nano", "Speed over time, pi5"):
        assert f"<h2>{heading}</h2>" in page
    assert "&lt;Cortex&gt;" in page
    facts = dict(report.device_facts(boards["devices"]))
    assert facts["Processor"] == ["A Processor", "<Cortex>", "A Processor"]
    assert facts["Cores"][0] == "2, 4 logical"
    assert facts["Governor"] == ["–", "performance", "–"]
    assert facts["Temperature"] == ["–", "41 to 54 °C", "–"]
    assert facts["Clock"] == ["–", "2.40 GHz", "–"]
    assert facts["Throttled"] == ["–", "in 4 of 10 repetitions", "–"]
    assert facts["Threads used"] == ["2", "2", "2, the fastest of 1, 2"]
    assert "Energy by" not in facts
    said = report.conditions(boards)
    assert "Other programs were busy during 2 of the 10 repetitions of both on local." in said
    assert "The processor was throttled during 4 of the 10 repetitions of both on pi5." in said
    assert "on nano" not in said


def test_a_single_device_elsewhere_is_named_once(stages):
    stages["profile"] = {"devices": {"pi5": made_runs.document()}}
    results = report.build_results(recipes.demo(), stages)
    assert "decodes 25% faster on pi5." in report.summary(results)
    assert not any("pi5" in row.label for row in report.results_table(results))


def test_without_devices_nothing_is_said_of_speed(stages):
    stages["profile"] = {"devices": {}}
    results = json.loads(report.to_json(report.build_results(recipes.demo(), stages)))
    assert (
        results["pruned"]["decode_tokens_per_second"]
        is results["ratios"]["peak_memory_bytes"]
        is None
    )
    assert results["ratios"]["file_bytes"] == pytest.approx(97 / 118)
    assert [row.label for row in report.results_table(results)][
        -1
    ] == "KL of the export, nats/token"
    said = report.summary(results)
    assert "97.0 MB instead of 118.0 MB. Perplexity" in said
    page = report.render(results, EVENTS)
    assert page.count("<svg") == 2
    assert "Speed was not measured." in page
    assert "<h2>Devices</h2>" not in page


def test_the_machine_is_the_one_that_pruned(stages):
    there = {"processor": "EPYC", "cores": 64, "memory_bytes": 10**11, "features": []}
    stages["source"] |= {"machine": there, "versions": {"torch": "1"}}
    results = report.build_results(recipes.demo(), stages)
    assert (results["machine"], results["versions"]) == (there, {"torch": "1"})
    assert results["devices"]["local"]["device"]["cpu"] == "A Processor"


def test_results_and_stages_of_the_version_before_are_read(stages, results):
    document = stages["profile"]["devices"]["local"]
    old = {key: value for key, value in results.items() if key != "devices"}
    old |= {"schema_version": 1, "profile": document}
    assert report.current(old) == results
    assert report.current(results) == results
    again = report.build_results(recipes.demo(), stages | {"profile": document})
    assert again["devices"] == results["devices"]
