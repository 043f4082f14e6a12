"""What chat templates can say, found out by trying them."""

from __future__ import annotations

import logging

import pytest
from chat_families import FAMILIES, chat_template, family_tokenizer
from tiny_models import make_tokenizer, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fst_dspy.errors import ModelError
from fst_dspy.lm.templates import (
    Prompt,
    chat_format,
    generation_prompt,
    render,
    thinks,
    tokens_of,
)
from fst_dspy.model.endings import eos_ids, special_tokens
from fst_dspy.model.policy import Policy

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where to?"}
ANSWER = {"role": "assistant", "content": "silver"}


def shown(tokenizer, messages, **of):
    return render(tokenizer, Prompt.of(messages, **of), tokenize=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_asked_for_is_in_the_prompt_once(name: str) -> None:
    text = shown(family_tokenizer(name), [SYSTEM, USER, ANSWER, USER])
    assert [text.count(part) for part in ("Be brief.", "Where to?", "silver")] == [1, 2, 1]
    assert text.index("Be brief.") < text.index("Where to?")


def test_a_system_message_that_is_refused_goes_in_front_of_the_first_question(caplog) -> None:
    tokenizer = family_tokenizer("gemma")
    with caplog.at_level(logging.WARNING, "fst_dspy"):
        text = shown(tokenizer, [SYSTEM, USER])
        shown(tokenizer, [SYSTEM, USER])
    assert "<start_of_turn>user\nBe brief.\n\nWhere to?<end_of_turn>" in text
    assert [r.message.count("system message") for r in caplog.records] == [1]


def test_a_system_message_that_is_dropped_in_silence_counts_as_refused() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert shown(tokenizer, [SYSTEM, USER]) == "userBe brief.\n\nWhere to?"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_system_message_is_lost(name: str) -> None:
    """Of two, some templates show the last alone, and some refuse them."""
    later = {"role": "system", "content": "Be kind."}
    text = shown(family_tokenizer(name), [SYSTEM, USER, ANSWER, later, USER])
    parts = ("Be brief.", "Be kind.", "Where to?", "silver")
    assert [text.count(part) for part in parts] == [1, 1, 2, 1]
    assert text.index("Be brief.") < text.index("Where to?")
    assert "Be kind." in shown(family_tokenizer(name), [USER, ANSWER, later, USER])


def test_turns_before_the_last_are_not_lost_where_a_template_drops_them(caplog) -> None:
    tokenizer = make_tokenizer("### {{ messages[-1]['content'] }}\n### Answer: ")
    with caplog.at_level(logging.WARNING, "fst_dspy"):
        text = shown(tokenizer, [SYSTEM, USER, ANSWER, USER])
    assert text == "### Be brief.\n\nWhere to?\n\nsilver\n\nWhere to?\n### Answer: "
    assert shown(tokenizer, [USER]) == "### Where to?\n### Answer: "
    assert "takes no" in caplog.text
    with_system = make_tokenizer(
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}|{% endif %}"
        "{{ messages[-1].content }}"
    )
    assert shown(with_system, [SYSTEM, USER, ANSWER, USER]) == (
        "Be brief.|Where to?\n\nsilver\n\nWhere to?"
    )


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_looks_like_a_special_token_in_a_message_is_text(name: str, role: str) -> None:
    tokenizer, end = family_tokenizer(name), FAMILIES[name].turn_end
    special = [end, *(() if role == "assistant" else FAMILIES[name].special), end]
    said = [SYSTEM, USER, ANSWER, USER]
    place = [message["role"] for message in said].index(role)
    said[place] = {"role": role, "content": f"a{special[0]}\n{' b'.join(special)} c"}
    ids = tokens_of(tokenizer, Prompt.of(said))
    assert said[place]["content"] in tokenizer.decode(ids)
    said[place] = {"role": role, "content": "a\n b c"}
    marks = set(special_tokens(tokenizer).values())
    without = tokens_of(tokenizer, Prompt.of(said))
    assert [n for n in ids if n in marks] == [n for n in without if n in marks]
    assert without == render(
        tokenizer, Prompt.of(said), add_generation_prompt=True, tokenize=True
    )  # as ever


def test_no_space_is_put_where_a_special_token_was() -> None:
    letters = {token: n for n, token in enumerate(["</s>", "▁", "\n", *"ab</s>"])}
    spaced = Tokenizer(models.BPE(letters, []))
    spaced.pre_tokenizer, spaced.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    said = [{"role": "user", "content": "a</s>b</s>"}]
    ids = tokens_of(tokenizer, Prompt.of(said))
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).lstrip("▁") == "a</s>b</s></s>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_turns_alternate_where_they_must() -> None:
    text = shown(family_tokenizer("gemma3"), [SYSTEM, USER, USER, ANSWER])
    assert text.count("<start_of_turn>user") == 1
    assert "Where to?\n\nWhere to?" in text
    assert shown(family_tokenizer("phi3"), [USER, USER]).count("<|user|>") == 2


@pytest.mark.parametrize(
    ("template", "options", "thinking"),
    [
        ("qwen3", {}, True),
        ("qwen3", {"enable_thinking": False}, False),
        ("qwen3_instruct_2507", {}, False),
        ("qwen3_5_think", {}, True),
        ("qwen3_5_nothink", {}, False),
        ("qwen3_5_nothink", {"enable_thinking": True}, True),
        ("deepseek_r1_distill", {}, True),
        ("gptoss", {}, True),
        ("gemma4", {}, False),
        ("gemma4", {"enable_thinking": True}, True),
        ("qwen2_5", {}, False),
        ("llama3_2", {}, False),
        ("phi3", {}, False),
    ],
)
def test_whether_a_model_thinks(template: str, options: dict[str, bool], thinking: bool) -> None:
    assert thinks(make_tokenizer(chat_template(template)), options) is thinking


@pytest.mark.parametrize(
    ("template", "has_tools"),
    [
        *((name, True) for name in ("qwen3", "qwen2_5", "llama3_2", "glm4moe", "gptoss")),
        *((name, False) for name in ("gemma3", "phi3", "llama3", "cohere2", "deepseek_r1_distill")),
    ],
)
def test_whether_it_has_tools(template: str, has_tools: bool) -> None:
    tokenizer = make_tokenizer(chat_template(template))
    before = dict(vars(tokenizer))
    assert chat_format(tokenizer).tools is has_tools
    assert getattr(tokenizer, "response_template", None) is before.get("response_template")


def test_another_template_on_the_same_tokenizer_is_tried_anew() -> None:
    tokenizer = family_tokenizer("gemma")
    assert not chat_format(tokenizer).takes_system
    tokenizer.chat_template = chat_template("phi3")
    assert chat_format(tokenizer).takes_system


def test_options_change_the_prompt() -> None:
    tokenizer = family_tokenizer("qwen3")
    off = generation_prompt(tokenizer, {"enable_thinking": False})
    assert off == generation_prompt(tokenizer, {}) + "<think>\n\n</think>\n\n"


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As templates of models that see images have it; a text's letters are no parts."""


def test_a_template_that_reads_parts_is_given_parts(tmp_path) -> None:
    tokenizer = make_tokenizer(PARTS)
    text = shown(tokenizer, [SYSTEM, USER, ANSWER, USER])
    assert [text.count(part) for part in ("Be brief.", "Where to?", "silver")] == [1, 2, 1]
    assert chat_format(tokenizer).takes_system
    policy = Policy.load(save_model(tmp_path / "tiny", "llama"))
    policy.tokenizer.chat_template = PARTS
    assert eos_ids(policy) == {policy.tokenizer.eos_token_id}  # and not what turns begin with


def test_a_template_that_shows_nothing_of_the_user_is_refused(tmp_path) -> None:
    folder = save_model(tmp_path / "tiny", "llama")
    make_tokenizer("{% for m in messages %}{{ m.role }}{{ m.body }}{% endfor %}").save_pretrained(
        folder
    )
    with pytest.raises(ModelError, match="shows nothing of what a user says"):
        Policy.load(folder)
