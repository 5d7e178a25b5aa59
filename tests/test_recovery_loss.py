"""The chunked loss is torch's on full logits, gradients included; the schedule is the one that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from edgeprune.errors import BadInput
from edgeprune.recovery import loss as module
from edgeprune.recovery.loss import Head, Recorded, Teaching, cross_entropy, head_loss
from edgeprune.recovery.schedule import Schedule
from edgeprune.recovery.settings import Training, defaults_for

TOKENS, HIDDEN, VOCABULARY = 37, 12, 50


def parts(seed=0, bias=True, hidden=HIDDEN):
    chance = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(TOKENS, hidden, generator=chance),
        torch.randn(VOCABULARY, hidden, generator=chance),
    ]
    made += [torch.randn(VOCABULARY, generator=chance)] if bias else []
    return [each.requires_grad_() for each in made]


def labels():
    chosen = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))
    chosen[::5] = -100
    return chosen


@pytest.fixture(params=[1, 7, 1000])
def _rows_at_a_time(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", request.param * VOCABULARY * 4)


@pytest.mark.usefixtures("_rows_at_a_time")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
@pytest.mark.parametrize(
    ("weight", "temperature"), [(0.0, 1.0), (0.4, 1.0), (0.7, 2.5), (1.0, 0.5)]
)
def test_the_chunked_loss_is_torchs(bias, divisor, weight, temperature):
    ours, theirs = parts(bias=bias), parts(bias=bias)
    teachers = [each.detach() for each in parts(seed=1, bias=False, hidden=HIDDEN + 3)]
    teaching = Teaching(teachers[0], Head(teachers[1], None, 2.0), weight, temperature)
    total, found = head_loss(
        ours[0],
        Head(*ours[1:], *([None] * (not bias)), divisor),
        labels(),
        teaching if weight else None,
    )
    (total * 2).backward()

    kept = labels() != -100
    logits = functional.linear(*theirs)[kept] / divisor
    wanted = functional.cross_entropy(logits, labels()[kept], reduction="sum")
    assert float(found[0]) == pytest.approx(wanted.item(), rel=1e-5)
    if weight:
        target = functional.log_softmax((teachers[0] @ teachers[1].T)[kept] / 2.0 / temperature, -1)
        divergence = functional.kl_div(
            functional.log_softmax(logits / temperature, -1),
            target,
            log_target=True,
            reduction="sum",
        )
        assert float(found[1]) == pytest.approx(divergence.item(), rel=1e-5, abs=1e-4)
        wanted = (1 - weight) * wanted + weight * temperature**2 * divergence
    (wanted * 2).backward()
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def recorded(teachers, kept, weight, temperature):
    logits = teachers[0] @ teachers[1].T / temperature
    top = logits.log_softmax(-1).topk(kept)
    return Recorded(top.indices.int(), top.values, weight, temperature)


@pytest.mark.usefixtures("_rows_at_a_time")
@pytest.mark.parametrize("kept", [1, 5, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize(("weight", "temperature"), [(0.4, 1.0), (1.0, 2.5)])
def test_the_loss_of_a_recorded_teacher_is_its_formulas(kept, weight, temperature):
    """All tokens that were not recorded are one event: the divergence from full logits by autograd, in float64."""
    ours = parts()
    teachers = [each.detach() for each in parts(seed=1, bias=False)]
    teaching = recorded(teachers, kept, weight, temperature)
    total, found = head_loss(ours[0], Head(*ours[1:], 3.0), labels(), teaching)
    (total * 2).backward()

    theirs = [each.detach().double().requires_grad_() for each in parts()]
    rows = labels() != -100
    logits = functional.linear(*theirs)[rows] / 3.0
    taught = (teachers[0].double() @ teachers[1].T.double())[rows] / temperature
    ids = teaching.ids[rows].long()
    p, q = taught.softmax(-1), (logits / temperature).softmax(-1)
    terms = (p.gather(1, ids) * (p.gather(1, ids) / q.gather(1, ids)).log()).sum()
    whole = (p * (p / q).log()).sum()
    if kept < VOCABULARY:
        p, q = (each.scatter(1, ids, 0.0).sum(-1) for each in (p, q))
        terms = terms + (p * (p / q).log()).sum()
        assert terms.item() <= whole.item() + 1e-9
    else:
        torch.testing.assert_close(terms, whole)
    assert float(found[1]) == pytest.approx(terms.item(), rel=1e-5, abs=1e-4)
    cost = (1 - weight) * functional.cross_entropy(logits, labels()[rows], reduction="sum")
    (2 * (cost + weight * temperature**2 * terms)).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_and_a_teacher_that_are_sure_leave_finite_gradients(dtype):
    """No probability is left for the others on one side, on both, or half precision makes it more than all."""
    weight = (torch.eye(VOCABULARY) * 500).to(dtype).requires_grad_()
    hidden = torch.eye(VOCABULARY)[:4].to(dtype).requires_grad_()
    ids = torch.tensor([[0, 1], [0, 1], [2, 3], [5, 4]])
    sure, unsure, over = [0.0, -65504.0], [-2.0, -3.0], [-0.6, -0.7]
    log_probabilities = torch.tensor([sure, unsure, over, unsure]).half()
    total, found = head_loss(
        hidden, Head(weight), torch.arange(4), Recorded(ids, log_probabilities, 0.5, 1.0)
    )
    total.backward()
    assert float(found[1]) >= 0
    for each in (total, found, hidden.grad, weight.grad):
        assert each.isfinite().all()


def test_a_batch_without_labels_costs_nothing():
    ours = parts()
    total, _ = head_loss(ours[0], Head(*ours[1:]), torch.full((TOKENS,), -100))
    total.backward()
    assert float(total) == 0
    assert all(not each.grad.any() for each in ours)


def test_bfloat16_gradients_come_near():
    exact, rounded = (
        parts(bias=False),
        [each.detach().bfloat16().requires_grad_() for each in parts(bias=False)],
    )
    for each in (exact, rounded):
        head_loss(each[0], Head(each[1]), labels())[0].backward()
    for a, b in zip(rounded, exact, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()


@pytest.mark.usefixtures("_rows_at_a_time")
def test_the_measured_loss_is_torchs():
    hidden, weight, bias = parts()
    wanted = functional.cross_entropy(
        functional.linear(hidden, weight, bias), labels(), reduction="sum"
    )
    torch.testing.assert_close(cross_entropy(hidden, Head(weight, bias), labels()), wanted.detach())


def test_the_schedule_warms_up_stays_and_decays():
    rates = [Schedule(100, 2e-5, 2e-6, 0.05, 0.1).rate(step) for step in range(100)]
    assert rates[:6] == pytest.approx([4e-6, 8e-6, 1.2e-5, 1.6e-5, 2e-5, 2e-5])
    assert set(rates[5:90]) == {2e-5}
    assert rates[90:] == pytest.approx([2e-5 - 1.8e-6 * n for n in range(1, 11)])


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_short_schedule_stays_within_its_bounds(steps):
    schedule = Schedule(steps, 1.0, 0.1, 0.05, 0.1)
    assert all(0 < schedule.rate(step) <= 1 for step in range(steps))
    assert Schedule(steps, 1.0, 0.1, 0.0, 0.0).rate(steps - 1) == 1.0


@pytest.mark.parametrize("tokens", [1, 10_000, 1_000_000, 5_000_000, 50_000_000, 10**10])
def test_small_budgets_get_enough_updates(tokens):
    made = defaults_for(tokens)
    made.check()
    assert made.steps >= min(1000, tokens // 512)
    assert made.batch <= 128
    assert (made.learning_rate, made.decay) in [(2e-5, 0.1), (2e-4, 0.9)]
    if tokens >= 10**10:
        assert made == Training(tokens)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"distill": 1.5},
        {"teacher_top_k": 8},
        {"teacher_top_k": 65_536, "distill": 0.5},
        {"teacher_top_k": -1, "distill": 0.5},
        {"learning_rate": float("nan")},
        {"min_learning_rate": 1.0},
        {"warmup": 0.95},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Training(**{"tokens": 1000, **wrong}).check()
