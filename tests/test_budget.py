"""The budget is met for any target, and what clipping takes away goes to the other layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.budget import LayerChoice, choose, layer_targets, limits, removable_parameters
from edgeprune.groups import HALVES, LayerGroups


def groups_of(kv_heads, channels, kv_cost, channel_cost):
    count = {"attention": kv_heads, "mlp": channels}
    cost = {"attention": kv_cost, "mlp": channel_cost}
    return LayerGroups(
        parts={half: [] for half in HALVES},
        count=count,
        cost=cost,
        removable=dict.fromkeys(HALVES, True),
        parameters=sum(count[h] * cost[h] for h in HALVES) + 100,
    )


def choices_of(layers, multiple, seed, kept=None):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, groups in enumerate(layers):
        scores = {
            h: torch.rand(groups.count[h], generator=generator) * groups.cost[h] for h in HALVES
        }
        keeps = kept[i] if kept else groups.everything()
        scores = {h: scores[h][keeps.of(h)] for h in HALVES}
        made.append(LayerChoice.of(groups, limits(groups, multiple, False), keeps, scores))
    return made


LAYERS = [groups_of(3, 256, 4000, 48), groups_of(3, 256, 4000, 48), groups_of(8, 512, 1500, 48)]


@given(
    planned=st.lists(st.floats(0, 500), min_size=3, max_size=3),
    importance=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    amplitude=st.floats(0, 0.5),
    share=st.floats(0, 1),
)
def test_layer_targets_add_up_and_never_fall_back(planned, importance, amplitude, share):
    prunable, most = [1000, 2000, 3000], [900, 1900, 2500]
    total = sum(planned) + share * (sum(most) - sum(planned))
    targets = layer_targets(planned, prunable, most, importance, amplitude, total)
    assert sum(targets) == pytest.approx(total, abs=1e-3)
    for before, now, limit in zip(planned, targets, most, strict=True):
        assert before <= now <= limit


def test_more_important_layers_lose_less_by_the_amplitude():
    """Equation 6, where no clip interferes: the difference of two layers is A (I_a - I_b)."""
    targets = layer_targets([100.0, 100.0], [1000, 1000], [1000, 1000], [-1.0, 1.0], 0.02, 300.0)
    assert targets[0] - targets[1] == pytest.approx(2 * 0.02 * 1000, abs=1e-6)


def test_what_the_clip_takes_is_given_to_others():
    targets = layer_targets([0.0, 0.0], [1000, 1000], [10, 1000], [0.0, 0.0], 0.02, 500.0)
    assert targets == pytest.approx([10, 490], abs=1e-6)


@given(
    share=st.floats(0.001, 0.93),
    multiple=st.sampled_from([1, 8, 32, 48]),
    seed=st.integers(0, 1000),
    tilt=st.floats(0, 1),
)
def test_the_total_is_met_to_one_step(share, multiple, seed, tilt):
    most = [removable_parameters(g, limits(g, multiple, False)) for g in LAYERS]
    total = math.ceil(share * sum(most))
    weights = [1 - tilt, 1.0, 1 + tilt]
    targets = [share * m * w for m, w in zip(most, weights, strict=True)]
    kept = choose(choices_of(LAYERS, multiple, seed), targets, multiple, total)
    removed = sum(g.removed_parameters(k) for g, k in zip(LAYERS, kept, strict=True))
    assert removed >= total
    # above by less than the smallest step that could be given back
    assert removed - total < max(4000, multiple * 48)
    for groups, keeps in zip(LAYERS, kept, strict=True):
        width = len(keeps.mlp)
        assert width == groups.count["mlp"] or width % multiple == 0
        assert width >= min(multiple, groups.count["mlp"])


@given(seed=st.integers(0, 200), shares=st.tuples(st.floats(0.01, 0.9), st.floats(0.01, 0.9)))
def test_more_sparsity_never_gives_more_parameters(seed, shares):
    most = [removable_parameters(g, limits(g, 8, False)) for g in LAYERS]
    removed = []
    for share in sorted(shares):
        total = math.ceil(share * sum(most))
        kept = choose(choices_of(LAYERS, 8, seed), [share * m for m in most], 8, total)
        removed.append(sum(g.removed_parameters(k) for g, k in zip(LAYERS, kept, strict=True)))
    # both are met to a step of 8 * 48; closer shares than that may fall on either side
    assert removed[0] <= removed[1] + 8 * 48


def test_within_a_layer_the_least_important_per_parameter_goes_first():
    groups = groups_of(2, 64, 1000, 10)
    scores = {"attention": torch.tensor([1.0, 1e6]), "mlp": torch.full((64,), 1.0)}
    choice = LayerChoice.of(groups, limits(groups, 8, False), groups.everything(), scores)
    choice.spend(1000)
    # 1 / 1000 a parameter for KV head 0, 1 / 10 for each channel
    assert choice.gone == {"attention": 1, "mlp": 0}
    assert choice.result().attention.tolist() == [1]


def test_a_layer_to_leave_alone_keeps_everything():
    limit = limits(LAYERS[0], 32, True)
    assert removable_parameters(LAYERS[0], limit) == 0


def test_widths_stay_multiples_over_many_iterations():
    kept = [g.everything() for g in LAYERS]
    planned = [0.0] * 3
    most = [removable_parameters(g, limits(g, 32, False)) for g in LAYERS]
    prunable = [g.prunable for g in LAYERS]
    for t in range(1, 11):
        total = 0.7 * sum(most) * t / 10
        planned = layer_targets(planned, prunable, most, [0.5, -1.0, 0.5], 0.02, total)
        kept = choose(
            choices_of(LAYERS, 32, t, kept), planned, 32, math.ceil(total) if t == 10 else None
        )
        assert all(len(k.mlp) % 32 == 0 for k in kept)
    removed = sum(g.removed_parameters(k) for g, k in zip(LAYERS, kept, strict=True))
    assert 0 <= removed - 0.7 * sum(most) < 4000
