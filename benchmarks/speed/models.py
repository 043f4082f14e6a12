"""The models and the program that speed is measured on."""

from __future__ import annotations

import tempfile
from typing import Any

import dspy
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_dspy import LocalLM
from fst_dspy.model.policy import Policy

MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    # Far from uniform, so that rounding does not decide what greedy decoding takes.
    "initializer_range": 0.1,
}


def embedded() -> LocalLM:
    """The model in the package, 0.93 M parameters: DSPy's own work weighs most."""
    return LocalLM("embedded", cache=False)


def middle() -> LocalLM:
    """A random Qwen3 of 24 M parameters with the embedded tokenizer: compute weighs most."""
    tokenizer = embedded().policy.tokenizer
    torch.manual_seed(0)
    config = Qwen3Config(
        **MIDDLE,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return LocalLM(Policy.load(folder, name="middle"), cache=False)


MODELS = {"embedded": embedded, "middle": middle}


def without_end(lm: LocalLM) -> LocalLM:
    """Let every completion run to its limit, so that both sides generate the same lengths."""
    policy = lm.policy
    policy.model.generation_config.eos_token_id = None
    policy.model.config.eos_token_id = None
    policy.tokenizer.eos_token = None
    return lm


class WholeAnswer(dspy.ChatAdapter):
    """ChatAdapter's prompts; the whole completion is the answer, whatever it says."""

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        return dict.fromkeys(signature.output_fields, completion)


def early_letters(gold: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> dspy.Prediction:
    """Share of the letters a to m in the answer: a reward that random text spreads over."""
    text = pred.answer
    score = sum("a" <= letter.lower() <= "m" for letter in text) / max(1, len(text))
    word = gold.question.split()[1]
    return dspy.Prediction(score=score, feedback=f"Lesson: of {word} write early letters.")


def program() -> dspy.Module:
    """One predictor."""
    return dspy.Predict(dspy.Signature("question -> answer", "Answer the question."))


def questions(lm: LocalLM, count: int, prompt_tokens: int) -> list[dspy.Example]:
    """Problems whose prompts have about that many tokens, none shorter."""
    from fst_dspy.lm.requests import prompt_ids

    def tokens(text: str) -> int:
        messages = WholeAnswer().format(program().signature, [], {"question": text})
        parts = [dspy.lm15.Message.user(m["content"]) for m in messages]
        return len(prompt_ids(lm.policy, dspy.lm15.Request(model="x", messages=tuple(parts))))

    words = 0
    while tokens(_words(0, words)) < prompt_tokens:
        words += 1
    return [
        dspy.Example(question=_words(number, words), answer="").with_inputs("question")
        for number in range(count)
    ]


def _words(number: int, count: int) -> str:
    nouns = ("visa", "refund", "ticket", "the", "page", "form")
    return f"number {number}:" + "".join(f" {nouns[(number + n) % 6]}" for n in range(count))
