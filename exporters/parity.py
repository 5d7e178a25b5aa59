"""Does an export compute what PyTorch computes? Logits and greedy text on fixed prompts.

The export is asked through onnxruntime-genai's own Generator, so that what is checked is what will
run: a whole prompt at once, then one token after another against the KV cache, and free greedy
generation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgeprune import mapped
from edgeprune.errors import one_line

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Question: Why is the sky blue?\nAnswer:",
    "In 1815, after a long and costly war, the two kingdoms signed a treaty that",
)
# What follows every prompt where the model is too large to generate from.
CONTINUATION = (
    " was not what anybody had expected at the time: the first three of them, which were 40 years "
    "older, had been forgotten; only later did people see that `x = 2` made no difference at all."
)
GENERATED = 24
# fp32 must agree with PyTorch in every logit.
MAX_ABS_DIFF = 1e-3
# Share of the divergence between neighbouring positions (predictions that have nothing to do with
# each other) that an export may differ from PyTorch by. Rounding stays far below it; a wrong graph
# comes near 1 or above.
MAX_KL_SHARE = {"fp32": 1e-4, "fp16": 0.01, "int8": 0.2, "int4": 0.6}


@dataclass(frozen=True)
class Answer:
    """What PyTorch says to one prompt; ``logits`` float32 (prompt + generated - 1, vocabulary)."""

    prompt: list[int]
    generated: list[int]
    logits: np.ndarray
    plain: list[int] | None = None
    """The prompt without the tokens that the tokenizer puts around it."""
    forced: bool = False
    """Whether ``generated`` is a fixed text instead of what PyTorch generated."""


@dataclass(frozen=True)
class Parity:
    """How far an export is from PyTorch. Divergences are mean KL in nats per position.

    ``failure`` is None for an export to trust; where it does not even run, the figures are None.
    ``reference`` is ``generated`` where PyTorch generated a text and the export was compared along it,
    or ``fixed text`` where logits were compared along a text given in advance; no text is generated
    then, and ``greedy_text_equal`` is None.
    """

    precision: str
    failure: str | None
    reference: str = "generated"
    prompts: int | None = None
    positions: int | None = None
    prompt_max_abs_diff: float | None = None
    decode_max_abs_diff: float | None = None
    mean_kl: float | None = None
    unrelated_kl: float | None = None
    greedy_agreement: float | None = None
    greedy_text_equal: bool | None = None
    tokenizer_equal: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: None also for figures that are not finite."""
        values = asdict(self)
        return {
            key: None if isinstance(value, float) and not isfinite(value) else value
            for key, value in values.items()
        }


@torch.inference_mode()
def reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """Ask PyTorch all prompts; the model should be in float32, or mapped.

    A mapped model computes in float32 too, layer by layer and once: along a fixed text.
    """
    if mapped.is_mapped(model):
        return _forced_answers(model, tokenizer)
    return [_answer(model, tokenizer, text) for text in PROMPTS]


def _forced_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    rest = tokenizer(CONTINUATION, add_special_tokens=False)["input_ids"][:GENERATED]
    walk = mapped.Walk(model, torch.float32)
    hidden = walk.hidden([torch.tensor([prompt + rest[:-1]]) for prompt in prompts])
    logits = walk.logits(torch.cat([each[0] for each in hidden])).split(
        [each.shape[1] for each in hidden]
    )
    return [
        Answer(
            prompt,
            rest,
            rows.numpy(),
            tokenizer(text, add_special_tokens=False)["input_ids"],
            forced=True,
        )
        for text, prompt, rows in zip(PROMPTS, prompts, logits, strict=True)
    ]


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Answer:
    prompt = tokenizer(text)["input_ids"]
    tokens = torch.tensor([prompt], device=model.device)
    output = model(tokens, use_cache=True)
    rows = [output.logits[0].float().cpu()]
    generated = [int(rows[-1][-1].argmax())]
    while len(generated) < GENERATED:
        token = torch.tensor([generated[-1:]], device=model.device)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        rows.append(output.logits[0].float().cpu())
        generated.append(int(rows[-1][-1].argmax()))
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answer(prompt, generated, torch.cat(rows).numpy(), plain)


def check(folder: Path, answers: list[Answer], precision: str) -> Parity:
    """Compare the export in ``folder`` with PyTorch's answers; ``failure`` says what is wrong."""
    og.disable_telemetry_events()
    try:
        model = og.Model(str(folder))
        tokenizer = og.Tokenizer(model)
        tokenizer_equal = all(
            [int(token) for token in tokenizer.encode(text)] in (answer.prompt, answer.plain)
            for text, answer in zip(PROMPTS, answers, strict=True)
        )
        ends = {int(token) for token in np.atleast_1d(tokenizer.eos_token_ids)}
        logits = [_forced_logits(model, answer) for answer in answers]
        text_equal = _same_texts(model, answers, ends)
    except RuntimeError as error:  # the runtime has no other
        return Parity(precision, f"onnxruntime-genai cannot run it: {one_line(error)}")
    return compare(answers, logits, precision, text_equal, tokenizer_equal)


def compare(
    answers: list[Answer],
    logits: list[np.ndarray],
    precision: str,
    text_equal: bool | None,
    tokenizer_equal: bool,
) -> Parity:
    """Judge what an export said; ``logits`` are in the shape of the answers' own.

    ``text_equal`` is None where the answers are no generated text.
    """
    pairs = list(zip(answers, logits, strict=True))
    right = np.concatenate([answer.logits for answer in answers])
    mine = np.concatenate(logits)
    parity = Parity(
        precision=precision,
        failure=None,
        reference="fixed text" if answers[0].forced else "generated",
        prompts=len(answers),
        positions=len(right),
        prompt_max_abs_diff=_max_diff((a.logits[: len(a.prompt)], x) for a, x in pairs),
        decode_max_abs_diff=_max_diff(
            (a.logits[len(a.prompt) :], x[len(a.prompt) :]) for a, x in pairs
        ),
        mean_kl=_mean_kl(right, mine),
        unrelated_kl=_mean_kl(right, np.roll(right, 1, axis=0)),
        greedy_agreement=float((right.argmax(-1) == mine.argmax(-1)).mean()),
        greedy_text_equal=text_equal,
        tokenizer_equal=tokenizer_equal,
    )
    return replace(parity, failure=_failure(parity))


def _max_diff(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    return max(float(np.abs(right - mine[: len(right)]).max()) for right, mine in pairs)


def _generator(model: og.Model, prompt: list[int]) -> og.Generator:
    params = og.GeneratorParams(model)
    params.set_search_options(
        max_length=len(prompt) + GENERATED, do_sample=False, repetition_penalty=1.0
    )
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    return generator


def _forced_logits(model: og.Model, answer: Answer) -> np.ndarray:
    """Logits of the export for the prompt and, step by step, for PyTorch's own continuation."""
    generator = _generator(model, answer.prompt)
    rows = [np.array(generator.get_output("logits"))[0]]
    for token in answer.generated[:-1]:
        generator.append_tokens(np.array([[token]], dtype=np.int32))
        rows.append(np.array(generator.get_output("logits"))[0])
    return np.concatenate(rows)


def _same_texts(model: og.Model, answers: list[Answer], ends: set[int]) -> bool | None:
    if any(answer.forced for answer in answers):
        return None
    return all(_same_text(model, answer, ends) for answer in answers)


def _same_text(model: og.Model, answer: Answer, ends: set[int]) -> bool:
    """Whether free greedy generation gives PyTorch's tokens, up to an end token or a tie."""
    generator = _generator(model, answer.prompt)
    first = len(answer.prompt) - 1
    for step, token in enumerate(answer.generated):
        generator.generate_next_token()
        if int(generator.get_next_tokens()[0]) != token:
            return _is_tie(answer.logits[first + step])
        if token in ends:
            break
    return True


def _is_tie(logits: np.ndarray) -> bool:
    second, best = np.partition(logits, -2)[-2:]
    return bool(best - second <= 2 * MAX_ABS_DIFF)


def _mean_kl(wanted: np.ndarray, got: np.ndarray) -> float:
    """Mean over positions of KL(wanted || got) in nats; both logits (positions, vocabulary)."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (wanted, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _failure(parity: Parity) -> str | None:
    prompt, decode = parity.prompt_max_abs_diff or 0, parity.decode_max_abs_diff or 0
    kl, unrelated = parity.mean_kl or 0, parity.unrelated_kl or 0
    if not parity.tokenizer_equal:
        return "onnxruntime-genai splits the prompts into other tokens than the model's tokenizer"
    if not isfinite(prompt + decode + kl):
        return "its logits are not finite"
    if parity.precision == "fp32" and max(prompt, decode) > MAX_ABS_DIFF:
        where, worst = ("the prompt", prompt) if prompt > MAX_ABS_DIFF else ("decoding", decode)
        return f"logits of {where} differ by up to {worst:.3g}, allowed are {MAX_ABS_DIFF:g}"
    if parity.precision == "fp32" and parity.greedy_text_equal is False:
        return "greedy text differs"
    bound = MAX_KL_SHARE[parity.precision] * unrelated
    if kl > bound:
        return f"predictions diverge by {kl:.3g} nats a token, allowed are {bound:.3g}"
    return None
