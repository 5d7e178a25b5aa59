"""Train a small Qwen2-shaped model on real text, to see whether a ranking of methods holds on a second model.

    python benchmarks/make_small.py FOLDER --text FILE ... [--minutes 20]

Its vocabulary is small, so that what little training there is goes into the decoder layers: with a large one, such
a model learns the frequencies of tokens and nothing that pruning could cost. Prints the loss beside that of the
token frequencies alone.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from edgeprune import machine
from edgeprune.texts import read_texts

VOCABULARY = 1024
LENGTH = 128
BATCH = 32
RATE = 3e-3


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    texts = [text for path in options.text for text in islice(read_texts(path), options.documents)]
    tokenizer = trained_tokenizer(texts)
    tokens = torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in [*ids, 0]])
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    share = torch.bincount(tokens, minlength=VOCABULARY).double().clamp_min(1) / len(tokens)
    print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} tokens, entropy of the token frequencies "
        f"{float(-(share * share.log()).sum()):.2f}"
    )
    train(model, tokens, options.minutes * 60)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--documents", type=int, default=20_000, help="of each text, at most")
    return parser.parse_args()


def trained_tokenizer(texts: list[str]) -> Any:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts[::10], VOCABULARY, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")


def train(model: Any, tokens: Tensor, seconds: float) -> None:
    """AdamW with the learning rate warmed up and then falling to 0 at the end of the time."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    started, step, smooth = time.monotonic(), 0, math.log(VOCABULARY)
    while (done := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(step / 100, (1 - done) ** 0.5)
        at = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
        batch = tokens[at + torch.arange(LENGTH)]
        with torch.autocast("cpu", machine.compute_dtype(), machine.compute_dtype().itemsize == 2):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        smooth += (float(loss) - smooth) / 50
        if step % 100 == 0:
            print(
                f"{done:4.0%} step {step} tokens {step * BATCH * LENGTH:,} loss {smooth:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
