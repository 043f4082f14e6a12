"""A tiny random model as a GGUF file, written by llama.cpp's own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import make_model, make_tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order, which rotates pairs that lie side by side."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def save_gguf(file: Path, quantized: bool = True, **claims: int) -> Any:
    """Write a tiny Llama of ``tiny_models``; returns the model that was written.

    Args:
        file: Where to.
        quantized: Matrices in 8 bits a weight, blocks of 32 with a scale each.
        **claims: Entries of the header that say something else than is true.
    """
    tokenizer = make_tokenizer()
    model: Any = make_model("llama", tokenizer)
    config = model.config
    plain = json.loads(tokenizer._tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(claims.get("layers", config.num_hidden_layers))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(claims.get("vocabulary", config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([t for t, _ in sorted(plain["vocab"].items(), key=lambda it: it[1])])
    writer.add_token_merges([" ".join(pair) for pair in plain["merges"]])
    special = set(tokenizer.all_special_ids)
    kinds = [gguf.TokenType.CONTROL if n in special else gguf.TokenType.NORMAL
             for n in range(len(tokenizer))]  # fmt: skip
    writer.add_token_types(kinds)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if name.endswith("q_proj.weight"):
            values = _turned(values, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = _turned(values, config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.F32
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(_name(name), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"
