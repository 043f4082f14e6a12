"""Tiny random models of the families that people use, with chat templates as they are published.

The templates are read from TRL where it has them. Mistral's, which it has not, is a short one in
the syntax of Mistral 7B Instruct v0.3, which refuses call ids of any other length than nine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from tiny_models import SHAPE, make_tokenizer
from tokenizers import AddedToken

MISTRAL = """{{ bos_token }}
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- for message in messages %}
{%- if message.role == "system" %}{{ raise_exception("System role not supported") }}
{%- elif message.role == "user" %}
{%- if not loop.first and loop.previtem.role == "user" %}
{{- raise_exception("Conversation roles must alternate") }}{% endif %}
{%- if tools and message == users[-1] %}
{{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}{% endif %}
{{- "[INST] " + message.content + "[/INST]" }}
{%- elif message.tool_calls %}{{ "[TOOL_CALLS] [" }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{% endif %}
{{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
{%- if not loop.last %}{{ ", " }}{% endif %}{% endfor %}{{ "]" + eos_token }}
{%- elif message.role == "assistant" %}{{ " " + message.content + eos_token }}
{%- elif message.role == "tool" %}
{{- "[TOOL_RESULTS] " + ({"content": message.content, "call_id": message.tool_call_id} | tojson) }}
{{- "[/TOOL_RESULTS]" }}
{%- endif %}
{%- endfor %}"""


@dataclass(frozen=True)
class Family:
    """A kind of model and how its chats look.

    Attributes:
        config: Name of transformers' configuration class, less ``Config``.
        template: Name of TRL's chat template, or the template itself.
        turn_end: The special token behind an answer.
        special: Its other special tokens.
        calls: An answer that calls ``add`` with a=1 and b=2, as such models write it.
        extra: More settings of the configuration.
    """

    config: str
    template: str
    turn_end: str
    special: tuple[str, ...] = ()
    calls: str | None = None
    extra: tuple[tuple[str, Any], ...] = ()


_CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
_QWEN_CALL = f"<tool_call>\n{_CALL}\n</tool_call><|im_end|>"
FAMILIES = {
    "qwen3": Family(
        "Qwen3", "qwen3", "<|im_end|>", ("<|im_start|>",), _QWEN_CALL, (("head_dim", 8),)
    ),
    "qwen3-moe": Family(
        "Qwen3Moe",
        "qwen3",
        "<|im_end|>",
        ("<|im_start|>",),
        _QWEN_CALL,
        (
            ("head_dim", 8),
            ("num_experts", 4),
            ("num_experts_per_tok", 2),
            ("moe_intermediate_size", 16),
        ),
    ),
    "llama3": Family(
        "Llama",
        "llama3_2",
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        '{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>',
    ),
    "gemma3": Family(
        "Gemma3Text",
        "gemma3",
        "<end_of_turn>",
        ("<bos>", "<start_of_turn>"),
        extra=(("head_dim", 8),),
    ),
    "gemma": Family("Gemma2", "gemma", "<end_of_turn>", ("<bos>",), extra=(("head_dim", 8),)),
    "mistral": Family(
        "Mistral",
        MISTRAL,
        "</s>",
        ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        f'[TOOL_CALLS] [{_CALL[:-1]}, "id": "a1b2c3d4e"}}]</s>',
    ),
    "phi3": Family("Phi3", "phi3", "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "deepseek-r1": Family(
        "Qwen2",
        "deepseek_r1_distill",
        "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ),
    "gpt-oss": Family(
        "GptOss",
        "gptoss",
        "<|return|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"),
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.add"
        '<|channel|>commentary json<|message|>{"a": 1, "b": 2}<|call|>',
        (("head_dim", 8), ("num_local_experts", 4), ("num_experts_per_tok", 2)),
    ),
    "gemma4": Family(
        "Gemma4Text",
        "gemma4_v5",
        "<turn|>",
        ("<bos>", "<|turn>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
        "<|tool_call>call:add{a:1,b:2}<tool_call|>",
        (("head_dim", 8), ("global_head_dim", 16), ("hidden_size_per_layer_input", 0)),
    ),
    "mamba2": Family(
        "Mamba2",
        "qwen2_5",
        "<|im_end|>",
        ("<|im_start|>",),
        _QWEN_CALL,
        (("num_heads", 8), ("head_dim", 8), ("state_size", 8), ("n_groups", 1)),
    ),
}


def chat_template(name: str) -> str:
    """A published chat template, from the installed TRL."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def family_tokenizer(name: str, named: bool = True) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a family: marks of thoughts are tokens but not special ones, as in Qwen3.

    Args:
        named: Whether the tokenizer itself names its special tokens, or only their table does, as
            of Gemma and Phi 4.
    """
    family = FAMILIES[name]
    template = family.template if "{" in family.template else chat_template(family.template)
    tokenizer = make_tokenizer(template)
    special = [family.turn_end, *family.special]
    if not named:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
        return tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token = next((t for t in family.special if "bos" in t or "begin" in t), "<|pad|>")
    tokenizer.eos_token = family.turn_end
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


def save_family(folder: Path, name: str, seed: int = 0, **more: Any) -> Path:
    """Write a tiny model of a family, as a user's model folder would be, with more settings."""
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    shape = SHAPE | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
    }
    config = getattr(transformers, f"{family.config}Config")(**shape | dict(family.extra) | more)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
