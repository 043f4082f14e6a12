"""Tiny random models of three kinds, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXTS = [
    "You answer questions about tickets. Send the ticket to the right queue.",
    "[[ ## question ## ]]\nwhere does a visa ticket go?\n\n[[ ## answer ## ]]\nsilver queue",
    "[[ ## reasoning ## ]]\nThe rule says visa goes to silver.\n\n[[ ## completed ## ]]",
    "Your input fields are: 1. `question` (str). Your output fields are: 1. `answer` (str).",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?{}\"'`#[]()",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # far from uniform, so that greedy and nucleus tests mean something
}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 tokens, with ``<|im_end|>`` as its end token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def make_model(
    kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **change: int
) -> torch.nn.Module:
    """A random model of one of the three kinds, in float32; of another shape where told to."""
    shape = SHAPE | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **change,
    }
    torch.manual_seed(seed)
    if kind == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(**shape, num_hidden_layers=2, head_dim=8, tie_word_embeddings=True)
        )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**{"num_hidden_layers": 2} | shape))
    layers = ["conv", "full_attention", "conv"]
    return Lfm2ForCausalLM(
        Lfm2Config(
            **shape,
            num_hidden_layers=3,
            layer_types=layers,
            conv_L_cache=4,
            conv_bias=False,
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=True,
        )
    )


def save_model(folder: Path, kind: str, seed: int = 0, **change: int) -> Path:
    """Write a tiny model with its tokenizer, as a user's model folder would be."""
    tokenizer = make_tokenizer()
    make_model(kind, tokenizer, seed, **change).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
