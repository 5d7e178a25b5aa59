"""A pruned model is the dense one with the removed groups zeroed, in every family."""

from __future__ import annotations

import pytest
import torch

from edgeprune.families import family_of
from edgeprune.groups import HALVES, Kept, cut, describe_layers, part_index, sum_by_group
from edgeprune.pruned import cut_model
from tests import tiny


def kept_of(model, seed=0, *, lose_attention_of=None):
    """Keep a random part of each layer, another one in each; perhaps no attention in one of them."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for i, groups in enumerate(describe_layers(model.config)):
        kv_heads, channels = groups.count["attention"], groups.count["mlp"]
        heads = 1 + int(torch.randint(kv_heads, (1,), generator=generator))
        heads = 0 if i == lose_attention_of and groups.removable["attention"] else heads
        width = 16 * (1 + int(torch.randint(channels // 16, (1,), generator=generator)))
        kept.append(
            Kept(
                torch.randperm(kv_heads, generator=generator)[:heads].sort().values,
                torch.randperm(channels, generator=generator)[:width].sort().values,
            )
        )
    return kept


@torch.no_grad()
def zero_removed(model, kept):
    """Zero the rows and columns of the removed groups in the dense model itself."""
    family = family_of(model.config)
    for layer, groups, keeps in zip(
        model.model.layers, describe_layers(model.config), kept, strict=True
    ):
        parameters = dict(layer.named_parameters())
        for half in HALVES:
            gone = torch.ones(groups.count[half], dtype=torch.bool)
            gone[keeps.of(half)] = False
            for (name, dim), index in part_index(groups.parts[half], gone.nonzero()[:, 0]).items():
                parameters[name].index_fill_(dim, index, 0.0)
        if family.wide_qk_norm and len(keeps.attention):
            # this norm's mean runs over all heads; over the kept ones it is larger by their share
            share = len(keeps.attention) / groups.count["attention"]
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.mul_(share**0.5)
                norm.variance_epsilon /= 1.0 / share


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lose_attention_of", [None, 0, 1])
def test_pruned_model_equals_the_dense_one_with_those_groups_zeroed(family, lose_attention_of):
    dense = tiny.model(family)
    kept = kept_of(dense, lose_attention_of=lose_attention_of)
    pruned = cut_model(dense, describe_layers(dense.config), kept)
    zero_removed(dense, kept)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, dense(ids).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_costs_and_counts_add_up_to_the_real_parameters(family):
    dense = tiny.model(family)
    groups = describe_layers(dense.config)
    kept = kept_of(dense)
    pruned = cut_model(dense, groups, kept)
    for before, after, g, k in zip(
        dense.model.layers, pruned.model.layers, groups, kept, strict=True
    ):
        assert g.parameters == sum(p.numel() for p in before.parameters())
        assert g.parameters - g.removed_parameters(k) == sum(p.numel() for p in after.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_generation_with_the_cache_equals_generation_without(family):
    dense = tiny.model(family)
    pruned = cut_model(dense, describe_layers(dense.config), kept_of(dense, lose_attention_of=0))
    ids = torch.arange(3, 20)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    cached = pruned.generate(ids, use_cache=True, **options)
    assert cached.shape[1] == ids.shape[1] + 12
    assert torch.equal(cached, pruned.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama", "granite", "phi3"])
def test_a_query_head_is_credited_to_its_own_kv_head(family):
    """With one query head's output columns marked, the mark arrives at KV head ``h // G``."""
    model = tiny.model(family, num_attention_heads=8, num_key_value_heads=2)
    groups = describe_layers(model.config)[0]
    shapes = {name: p.shape for name, p in model.model.layers[0].named_parameters()}
    for head in range(8):
        scores = {name: torch.zeros(shape) for name, shape in shapes.items()}
        scores["self_attn.o_proj.weight"][:, head * 16 : (head + 1) * 16] = 1.0
        found = sum_by_group(scores, groups.parts["attention"], 2, 2)
        assert found.argmax() == head // 4
        assert found.count_nonzero() == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_group_sums_of_a_cut_layer_are_the_dense_sums_of_the_kept_groups(family):
    model = tiny.model(family)
    kept = kept_of(model)[0]
    groups = describe_layers(model.config)[0]
    dense = {name: p.detach().abs() for name, p in model.model.layers[0].named_parameters()}
    smaller = cut(dense, groups, kept)
    for half in HALVES:
        count = groups.count[half]
        whole = sum_by_group(dense, groups.parts[half], count, count)
        part = sum_by_group(smaller, groups.parts[half], count, len(kept.of(half)))
        torch.testing.assert_close(part, whole[kept.of(half)])


def test_pruning_twice_equals_pruning_once():
    """A pruned model is a source like any other."""
    dense = tiny.model("qwen3")
    first, second = kept_of(dense, 1, lose_attention_of=1), kept_of(dense, 2)
    once = cut_model(dense, describe_layers(dense.config), first)
    again = [
        Kept(*(torch.arange(min(len(a.of(h)), len(b.of(h)))) for h in HALVES))
        for a, b in zip(first, second, strict=True)
    ]
    twice = cut_model(once, describe_layers(once.config), again)
    direct = [Kept(*(a.of(h)[b.of(h)] for h in HALVES)) for a, b in zip(first, again, strict=True)]
    at_once = cut_model(dense, describe_layers(dense.config), direct)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(twice(ids).logits, at_once(ids).logits)
