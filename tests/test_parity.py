"""The check of an export against PyTorch catches what is wrong, wherever it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from exporting import build

from edgeprune.exporters import parity
from edgeprune.exporters.parity import Answer, compare

VOCABULARY = 50


@pytest.fixture
def answers() -> list[Answer]:
    random = np.random.default_rng(0)
    return [
        Answer(
            prompt=[1] * 5,
            generated=[2] * 4,
            logits=(3 * random.standard_normal((8, VOCABULARY))).astype(np.float32),
        )
        for _ in range(2)
    ]


def said(answers: list[Answer], noise: float = 0.0) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [
        a.logits + noise * random.standard_normal(a.logits.shape).astype(np.float32)
        for a in answers
    ]


def judge(answers, logits, precision="fp32", text_equal=True, tokenizer_equal=True):
    return compare(answers, logits, precision, text_equal, tokenizer_equal)


def test_the_same_logits_pass(answers: list[Answer]) -> None:
    result = judge(answers, said(answers))
    assert result.failure is None
    assert result.positions == 16
    assert result.mean_kl == pytest.approx(0, abs=1e-9)
    assert result.greedy_agreement == 1


@pytest.mark.parametrize(
    ("position", "where"), [(0, "the prompt"), (4, "the prompt"), (5, "decoding")]
)
def test_one_wrong_logit_is_found(answers: list[Answer], position: int, where: str) -> None:
    logits = said(answers)
    logits[1][position, 7] += 2e-3
    assert where in str(judge(answers, logits).failure)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_nonsense_is_told_from_rounding(answers: list[Answer], precision: str) -> None:
    rounding = {"fp16": 0.01, "int8": 0.1, "int4": 0.5}[precision]
    assert judge(answers, said(answers, rounding), precision, text_equal=False).failure is None
    shifted = [np.roll(a.logits, 1, axis=0) for a in answers]
    assert "diverge" in str(judge(answers, shifted, precision).failure)
    flat = [np.zeros_like(a.logits) for a in answers]
    if precision != "int4":
        assert "diverge" in str(judge(answers, flat, precision).failure)


def test_logits_that_are_no_numbers(answers: list[Answer]) -> None:
    logits = said(answers)
    logits[0][3, 3] = np.nan
    result = judge(answers, logits, "int4")
    assert "not finite" in str(result.failure)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["mean_kl"] is None


def test_other_text_and_other_tokens_fail(answers: list[Answer]) -> None:
    assert "text" in str(judge(answers, said(answers), text_equal=False).failure)
    assert "tokens" in str(judge(answers, said(answers), tokenizer_equal=False).failure)


def test_an_export_that_does_not_run(tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    answers = parity.reference(model, tiny.tokenizer())
    folder = build(model, tmp_path / "out", "fp32")
    (folder / "model.onnx.data").write_bytes(b"")
    result = parity.check(folder, answers, "fp32")
    assert "cannot run" in str(result.failure)
    assert result.mean_kl is None


def test_the_reference_is_pytorch_step_by_step() -> None:
    answers = parity.reference(tiny.model("qwen2"), tiny.tokenizer())
    assert len(answers) == len(parity.PROMPTS)
    for answer in answers:
        assert len(answer.generated) == parity.GENERATED
        assert answer.logits.shape == (len(answer.prompt) + parity.GENERATED - 1, tiny.VOCAB_SIZE)
        start = len(answer.prompt) - 1
        assert answer.logits[start:].argmax(-1).tolist() == answer.generated
