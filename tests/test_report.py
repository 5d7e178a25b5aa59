import json
import math
import re

import pytest

from edgeprune import recipe as recipes
from edgeprune import report
from edgeprune.events import Evaluation, Note, PruneIteration, TrainStep

LAYERS = 4
DENSE = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
PRUNED = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}
SPEEDS = {
    "dense": (118e6, 900.0, 80.0, 0.15, 400e6),
    "pruned": (97e6, 1200.0, 100.0, 0.12, 350e6),
}
MEASURED = (
    "file_bytes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token_seconds",
    "peak_memory_bytes",
)


def profile_run(which):
    repetition = {"inter_token_seconds": [0.01, 0.011, 0.012], "decode_tokens_per_second": 90.0}
    return {
        "role": report.ROLES[which],
        "repetitions": [repetition] * 3,
        "disturbed": 1,
        "summary": {
            key: {"mean": mean, "stdev": 0.05 * mean if "second" in key else None}
            for key, mean in zip(MEASURED, SPEEDS[which], strict=True)
        },
    }


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
        "export-dense": {"parity": {"mean_kl": 0.2}},
        "export-pruned": {"parity": {"mean_kl": 0.3}},
        "evaluate": {"dense": perplexity(27.1), "pruned": perplexity(62.3)},
        "profile": {
            "runs": [profile_run("pruned"), profile_run("dense")],
            "ratios": {
                key: {"median": pruned / dense}
                for key, dense, pruned in zip(MEASURED, *SPEEDS.values(), strict=True)
            },
        },
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
    for quantity in report.QUANTITIES:
        dense, pruned = results["dense"][quantity.key], results["pruned"][quantity.key]
        assert results["ratios"][quantity.key] == pytest.approx(pruned / dense)
    assert results["pruned"]["layers"] == [PRUNED] * 4
    assert results["schema_version"] == report.SCHEMA_VERSION
    assert results["versions"]["torch"]
    assert results["machine"]["cores"] >= 1


def test_the_table_tells_better_from_worse(results):
    rows = {row.label: row for row in report.results_table(results)}
    assert len(rows) == len(report.QUANTITIES)
    assert rows["Parameters"] == report.Row("Parameters", "134.5M", "102.7M", "−23.7 %", True)
    assert rows["File size, int4 ONNX"].pruned == "97.0 MB"
    assert rows["Decode (tokens/s)"].change == "× 1.25"
    assert rows["Decode (tokens/s)"].better
    assert rows["Time to first token"].dense == "150 ms ± 5 %"
    assert rows["Perplexity per token"].change == "× 2.30"
    assert rows["Perplexity per token"].better is False


def test_a_difference_within_the_spread_is_neither_better_nor_worse(stages):
    stages["profile"]["ratios"]["decode_tokens_per_second"]["median"] = 1.04  # spread: 5 %
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
