"""Tiny random models of every family, with a small real tokenizer: what the tests run on.

Shapes differ on purpose: some have ``num_attention_heads * head_dim != hidden_size``, and a KV head
serves one, two or four query heads. Norms and biases are random too, or mistakes with them would
not show.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 320
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}

# What makes each family (and variant of it) itself, over the common values.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "num_hidden_layers": 4},
    "llama-untied": {"num_attention_heads": 8, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_attention_heads": 8, "intermediate_size": 160, "sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_hidden_layers": 4,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"original_max_position_embeddings": 512},
    "granite": {
        "num_key_value_heads": 4,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "olmo2": {"num_attention_heads": 8, "num_key_value_heads": 4},
}

FAMILIES = tuple(_OWN)


def config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return the config of a tiny ``family`` (a name of ``FAMILIES``), in float32."""
    values = {**_COMMON, **_OWN[family], "dtype": "float32", **overrides}
    model_type = family.partition("-")[0]
    if "layer_types" in values:  # follows the depth when a test asks for fewer layers
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    return AutoConfig.for_model(model_type, **values)


def model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode: the same weights for the same ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(family, **overrides))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.ndim == 1:  # norms start as ones (zeros for Gemma), biases as zeros
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" in name or "lm_head" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made.eval()


@lru_cache(maxsize=1)
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics.topics[name] for name in sorted(topics.topics)], trainer)
    return tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``VOCAB_SIZE`` tokens, trained on Python's own help."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save(family: str, folder: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Write model, tokenizer, chat template and generation config to ``folder``; return it."""
    folder = Path(folder)
    made = model(family, seed, **overrides)
    made.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, max_new_tokens=32, do_sample=False
    )
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
