"""Train a small Qwen2-shaped model on real text, to see whether a ranking of methods holds on a second model.

    python benchmarks/make_small.py FOLDER --text FILE ... [--tokens 4M]

Its vocabulary is small, so that what little training there is goes into the decoder layers: with a large one, such
a model learns the frequencies of tokens and nothing that pruning could cost. Prints the held-out loss beside that of
the token frequencies alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from edgeprune.events import Evaluation, Event, TrainStep
from edgeprune.quantities import parse_count
from edgeprune.recovery.mixture import parse_sources
from edgeprune.recovery.packing import Packed, prepare
from edgeprune.recovery.settings import Training
from edgeprune.recovery.trainer import Trainer
from edgeprune.texts import read_texts

VOCABULARY = 1024
END = "<|endoftext|>"


def main() -> None:
    options = arguments()
    tokenizer = trained_tokenizer(options.text)
    # few sequences an update: from nothing, many small steps teach more than few large ones
    settings = Training(
        parse_count(options.tokens),
        length=128,
        batch=8,
        learning_rate=2e-3,
        min_learning_rate=1e-4,
        decay=0.3,
        weight_decay=0.1,
    )
    with tempfile.TemporaryDirectory() as cache:
        data, held_out = prepare(
            parse_sources(options.text),
            tokenizer,
            tokens=settings.tokens,
            length=settings.length,
            held_out=50_000,
            cache=Path(cache),
        )
        model = untrained()
        print(
            f"{model.num_parameters():,} parameters; entropy of the token frequencies {entropy(data):.2f}"
        )
        trainer = Trainer(model, settings, data, held_out=held_out, emit=tell)
        trainer.run()
        model.load_state_dict(trainer.weights(), strict=False)
    model.float().save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokens", default="4M")
    return parser.parse_args()


def trained_tokenizer(texts: list[str]) -> Any:
    bpe = ByteLevelBPETokenizer()
    some = (text for path in texts for text in islice(read_texts(path), 500))
    bpe.train_from_iterator(some, VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def untrained() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
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
    return Qwen2ForCausalLM(config)


def entropy(data: Packed) -> float:
    ids = data.batch(range(min(len(data), 2000))).input_ids.flatten()
    share = torch.bincount(ids, minlength=VOCABULARY).double().clamp_min(1) / len(ids)
    return float(-(share * share.log()).sum())


def tell(event: Event) -> None:
    if isinstance(event, TrainStep) and event.step % 50 == 0:
        print(
            f"\r{event.step}/{event.of} loss {event.loss:.2f} {event.tokens_per_second:.0f} tokens/s ",
            end="",
            file=sys.stderr,
        )
    if isinstance(event, Evaluation):
        print(f"{event.step} updates: held-out loss {event.loss:.2f}", flush=True)


if __name__ == "__main__":
    main()
