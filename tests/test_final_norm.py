"""The final norm's refit: nearer to the dense model's predictions, by the gradient that it says."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from edgeprune.blocks import Ends
from edgeprune.final_norm import _Goal, refit_norm
from edgeprune.repair import Streams
from tests import tiny

CPU = torch.device("cpu")


def streams_of(model, sequences=64, noise=0.5):
    """What two models could leave after their last layer: one stream, and the same with noise in it."""
    chance = torch.Generator().manual_seed(0)
    shape = (8, 16, model.config.hidden_size)
    dense = [torch.randn(shape, generator=chance) for _ in range(sequences // 8)]
    pruned = [each + noise * torch.randn(shape, generator=chance) for each in dense]
    return Streams(len(model.model.layers), pruned, dense)


def divergence(model, streams, weight=None):
    """Mean KL divergence in nats of what the head makes of both streams, ``weight`` being the norm's for one."""

    def predict(stream):
        return (model.lm_head(model.model.norm(stream)) / scaling).log_softmax(-1).flatten(0, 1)

    scaling = getattr(model.config, "logits_scaling", 1.0)
    with torch.no_grad():
        goal = predict(torch.cat(streams.dense))
        if weight is not None:
            model.model.norm.weight.copy_(weight)
        return kl_div(
            predict(torch.cat(streams.pruned)), goal, log_target=True, reduction="batchmean"
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_refitted_norm_predicts_nearer_to_the_dense_model(family):
    model = tiny.model(family)
    streams = streams_of(model)
    weight = refit_norm(Ends(model, torch.float32, CPU), streams)
    assert weight is not None
    before = divergence(model, streams)
    assert divergence(model, streams, weight) < 0.97 * before


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_its_loss_and_gradient_are_those_of_the_divergence(family):
    model = tiny.model(family)
    ends, streams = Ends(model, torch.float32, CPU), streams_of(model)
    scaling = getattr(model.config, "logits_scaling", 1.0)
    factors = torch.linspace(0.5, 1.5, model.config.hidden_size, requires_grad=True)
    with torch.no_grad():
        normed = [model.model.norm(torch.cat(each)) for each in (streams.pruned, streams.dense)]
        goal = (model.lm_head(normed[1]) / scaling).log_softmax(-1).flatten(0, 1)
        found, gradient = _Goal.of(ends, streams).loss(factors)
        start, _ = _Goal.of(ends, streams).loss(torch.ones_like(factors))
    predicted = (model.lm_head(normed[0] * factors) / scaling).log_softmax(-1).flatten(0, 1)
    exact = kl_div(predicted, goal, log_target=True, reduction="batchmean")
    torch.testing.assert_close(
        gradient, torch.autograd.grad(exact, factors)[0], atol=1e-6, rtol=1e-4
    )
    change = float(exact.detach() - divergence(model, streams))  # the constant cancels
    assert found - start == pytest.approx(change, abs=1e-4)


def test_what_is_right_already_stays():
    model = tiny.model("llama")
    streams = streams_of(model, noise=0.0)
    weight = refit_norm(Ends(model, torch.float32, CPU), streams)
    if weight is not None:
        torch.testing.assert_close(weight, model.model.norm.weight, atol=1e-3, rtol=1e-3)


def test_too_few_tokens_change_nothing():
    model = tiny.model("llama")
    streams = streams_of(model, sequences=8)
    few = Streams(1, [streams.pruned[0][:1, :3]], [streams.dense[0][:1, :3]])
    assert refit_norm(Ends(model, torch.float32, CPU), few) is None


def test_a_norm_that_fits_nothing_else_is_not_taken():
    model = tiny.model("llama")
    streams = streams_of(model, sequences=8)
    skew = torch.linspace(0.3, 3.0, model.config.hidden_size)
    # the last quarter, on which it is judged, is off the other way round
    streams.pruned[0][:6] = streams.dense[0][:6] * skew
    streams.pruned[0][6:] = streams.dense[0][6:] / skew
    assert refit_norm(Ends(model, torch.float32, CPU), streams) is None
