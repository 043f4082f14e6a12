"""Answers taken apart, in the syntax of each family, as such models write them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_families import FAMILIES, chat_template, family_tokenizer

from fst_dspy.lm.answers import read_answer, tool_call_parts
from fst_dspy.lm.templates import Prompt, render
from fst_dspy.model.endings import End

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}
ASKED = [{"role": "user", "content": "1 + 2?"}]


def read(tokenizer, said, *, options=None, tools=(), **how):
    policy = SimpleNamespace(tokenizer=tokenizer, name="tiny")
    asked = Prompt.of(ASKED, tools, options)
    prompt = render(tokenizer, asked, tokenize=True, add_generation_prompt=True)
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return read_answer(policy, prompt, ids, text, tools=tools, **how)


def test_a_thought_is_kept_apart_and_the_answer_is_what_follows() -> None:
    answer = read(family_tokenizer("qwen3"), "<think>\nHm, visa.\n</think>\n\nsilver<|im_end|>")
    assert (answer.thought, answer.text, answer.in_thought) == ("Hm, visa.", "silver", False)


def test_an_answer_without_a_thought_is_the_answer() -> None:
    answer = read(family_tokenizer("qwen3"), "silver<|im_end|>", options={"enable_thinking": False})
    assert (answer.thought, answer.text) == (None, "silver")


def test_an_answer_that_ends_in_the_thought_says_so() -> None:
    answer = read(family_tokenizer("qwen3"), "<think>\nHm, vi")
    assert (answer.thought, answer.text, answer.in_thought) == ("Hm, vi", "", True)


def test_a_thought_that_the_prompt_has_opened() -> None:
    tokenizer = family_tokenizer("deepseek-r1")
    answer = read(tokenizer, "Hm, visa.\n</think>\n\nsilver<｜end▁of▁sentence｜>")
    assert (answer.thought, answer.text) == ("Hm, visa.", "silver")
    assert read(tokenizer, "Hm, vi").in_thought


ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
CHANNELS = [
    ("gpt-oss", f"{ANALYSIS}silver<|return|>", "Hm.", "silver"),
    ("gpt-oss", f"{ANALYSIS}sil", "Hm.", "sil"),
    ("gpt-oss", "<|channel|>final<|message|>silver<|return|>", None, "silver"),
    ("gemma4", "<|channel>thought\nHm.\n<channel|>silver<turn|>", "Hm.", "silver"),
    ("gemma4", "silver<turn|>", None, "silver"),
]


@pytest.mark.parametrize(("name", "said", "thought", "text"), CHANNELS)
def test_thoughts_in_a_channel_whose_marks_are_found_by_trying(
    name: str, said: str, thought: str | None, text: str
) -> None:
    answer = read(family_tokenizer(name), said)
    assert (answer.thought, answer.text, answer.in_thought) == (thought, text, False)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt-oss", "<|channel|>analysis<|message|>Hm"), ("gemma4", "<|channel>thought\nHm")],
)
def test_an_answer_cut_off_in_its_channel(name: str, said: str) -> None:
    answer = read(family_tokenizer(name), said)
    assert (answer.thought, answer.text, answer.in_thought) == ("Hm", "", True)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.calls])
def test_calls_of_tools_are_read_in_each_familys_own_syntax(name: str) -> None:
    answer = read(family_tokenizer(name), FAMILIES[name].calls, tools=[ADD])
    assert answer.calls == (("add", {"a": 1, "b": 2}),)
    assert answer.text == ""


def test_a_thought_text_and_two_calls_at_once() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": %d, "b": 2}}\n</tool_call>\n'
    said = f"<think>\nHm.\n</think>\n\nLet me see.\n{call % 1}{call % 3}<|im_end|>"
    answer = read(family_tokenizer("qwen3"), said, tools=[ADD])
    assert (answer.thought, answer.text) == ("Hm.", "Let me see.")
    assert [arguments["a"] for _, arguments in answer.calls] == [1, 3]


@pytest.mark.parametrize("broken", ['{"name": "add", "argu', '{"name": 3}', "[]"])
def test_a_call_that_cannot_be_read_stays_text(broken: str) -> None:
    answer = read(family_tokenizer("qwen3"), f"<tool_call>\n{broken}", tools=[ADD])
    assert answer.calls == ()
    assert broken in answer.text or broken == "[]"


def test_marks_are_text_where_no_tools_were_shown() -> None:
    said = FAMILIES["qwen3"].calls
    assert "<tool_call>" in read(family_tokenizer("qwen3"), said).text


def test_what_the_text_was_cut_at_cuts_the_parts_too() -> None:
    said = "<think>\n[[ ## completed ## ]]\n</think>\n\nsilver\n[[ ## completed ## ]]\nBut"
    end = End("[[ ## completed ## ]]", ("<think>", "</think>"))
    answer = read(family_tokenizer("qwen3"), said, end=end)
    assert answer.text == "silver\n[[ ## completed ## ]]"
    assert read(family_tokenizer("qwen3"), said, stop=("But",)).text.endswith("]]\n")
    answer = read(family_tokenizer("qwen3"), said, stop=("[[",))  # which it has thought of before
    assert (answer.text, answer.thought) == ("silver\n", "[[ ## completed ## ]]")


@pytest.mark.parametrize(
    ("name", "tools"), [("llama3", [ADD]), ("gpt-oss", []), ("gpt-oss", [ADD]), ("gemma4", [])]
)
def test_special_tokens_that_their_table_alone_marks_are_no_text(name: str, tools: list) -> None:
    said = f"silver{FAMILIES[name].turn_end}"
    assert read(family_tokenizer(name, named=False), said, tools=tools).text == "silver"


def test_ids_of_calls_are_nine_letters_and_digits_and_tell_calls_apart() -> None:
    calls = [("add", {"a": 1}), ("add", {"a": 1})]
    ids = [part.id for part in tool_call_parts((1, 2), calls)]
    assert all(len(number) == 9 and number.isalnum() for number in ids)
    assert len({*ids, *(part.id for part in tool_call_parts((1, 3), calls))}) == 4


def test_trl_still_has_the_templates(tmp_path: Path) -> None:
    assert "<think>" in chat_template("qwen3")
