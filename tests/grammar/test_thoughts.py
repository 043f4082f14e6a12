"""A thought before what a grammar holds: begun or not, and closed however its tokens are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from held_answers import SMALL, allowed_after, encode
from tiny_models import TEXTS, make_model, make_tokenizer

from fst_dspy.grammar.thoughts import MOST_BLANK
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.logprobs import completion_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.types import Grammar, TrainingRow

MARKS = ("<think>", "</think>")
MAY = Grammar(SMALL.text, thought=MARKS)
MUST = Grammar(SMALL.text, thought=MARKS, opened=True)
TAGGED = Grammar('%llguidance {}\nstart: "<to>" ("silver" | "gold") "</to>"', thought=MARKS)
ANSWER = "to: silver.\n\nend"


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A model whose tokenizer has the marks as tokens, and one that cuts them as it likes."""
    return made(tmp_path_factory.mktemp("thoughts"), has_tokens=request.param)


def made(folder: Path, has_tokens: bool) -> Policy:
    thoughts = " fin.</think>\n\nto: so.</think>(no) <think>\nhm </think>\n" * 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiny_models.TEXTS", [*TEXTS, thoughts])
        tokenizer = make_tokenizer()
    # As Qwen's and Llama's tokenizers have them.
    tokenizer.add_tokens(list(MARKS) if has_tokens else [">\n\n", ">("])
    make_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy.load(folder)


def may_follow(policy: Policy, grammar: Grammar, said: str) -> set[str]:
    """The texts of the tokens that may follow a text, the end's among them."""
    ids = allowed_after(policy, grammar, encode(policy, said))
    return {policy.tokenizer.decode([token]) for token in ids}


def goes(policy: Policy, grammar: Grammar, said: str) -> bool:
    """Whether each token of a text, and the end behind it, is allowed."""
    ids = (*encode(policy, said), policy.tokenizer.eos_token_id)
    return all(t in allowed_after(policy, grammar, ids[:n]) for n, t in enumerate(ids))


def is_held(policy: Policy, grammar: Grammar, closed: tuple[int, ...]) -> bool:
    """Whether the answer, perhaps behind line ends, and no other text may follow."""
    behind = {policy.tokenizer.decode([t]) for t in allowed_after(policy, grammar, closed)}
    whole = (*closed, *encode(policy, ANSWER), policy.tokenizer.eos_token_id)
    return all("to: ".startswith(text.lstrip("\n")[:4]) for text in behind) and all(
        whole[place] in allowed_after(policy, grammar, whole[:place])
        for place in range(len(closed), len(whole))
    )


@pytest.mark.parametrize("before", ["", "\n", "\n\n"])
def test_a_model_that_does_not_think_is_held_at_once(policy: Policy, before: str) -> None:
    assert goes(policy, MAY, before + ANSWER)
    for said in may_follow(policy, MAY, before):
        assert any(text.startswith(said.strip()) for text in (ANSWER, *MARKS[:1])) or (
            said.strip().startswith(MARKS[0])
        )
    assert "z" not in may_follow(policy, MAY, f"{before}to")
    assert policy.tokenizer.eos_token not in may_follow(policy, MAY, before)


@pytest.mark.parametrize("thought", ["fin.", "hm ", "", "<think> again", "</thin", "<", "</</"])
def test_a_thought_is_free_and_its_mark_closes_it(policy: Policy, thought: str) -> None:
    for grammar, opening in ((MAY, "<think>"), (MAY, "\n<think>\n"), (MUST, "")):
        begun = f"{opening}{thought}"
        assert {"z", "["} <= may_follow(policy, grammar, begun)
        assert policy.tokenizer.eos_token not in may_follow(policy, grammar, begun)
        assert is_held(policy, grammar, encode(policy, f"{begun}</think>"))


def test_line_ends_may_stand_behind_a_thought_as_templates_write_them(policy: Policy) -> None:
    for said in ("<think>hm</think>\n\n", "<think>\nhm\n</think>\n\n\n", "\n"):
        assert goes(policy, MAY, said + ANSWER)
    # But no model may go on with them.
    for said in ("<think>hm</think>", ""):
        line = (*encode(policy, said), *[encode(policy, "\n")[0]] * MOST_BLANK)
        after = {policy.tokenizer.decode([t]) for t in allowed_after(policy, MAY, line)}
        assert after and not any(text.strip("\n") == "" for text in after)
    assert "<" not in may_follow(policy, MAY, "<think>hm</think>\n")


def test_an_answer_and_the_mark_may_begin_alike(policy: Policy) -> None:
    assert {"t", "to"} & may_follow(policy, TAGGED, "<")
    assert goes(policy, TAGGED, "<to>gold</to>")
    assert goes(policy, TAGGED, "\n<to>gold</to>")
    assert "z" in may_follow(policy, TAGGED, "<think>")
    assert "z" not in may_follow(policy, TAGGED, "<")


def test_white_space_may_be_in_the_mark_s_last_token_and_no_other_text(tmp_path: Path) -> None:
    policy = made(tmp_path, has_tokens=False)
    closed = encode(policy, "fin.</think>\n\n")
    assert policy.tokenizer.decode(closed[-1:]) == ">\n\n"
    assert is_held(policy, MUST, closed)
    begun = encode(policy, "hm </think")
    texts = {policy.tokenizer.decode([t]) for t in allowed_after(policy, MUST, begun)}
    assert {text for text in texts if text.startswith(">")} == {">", ">\n\n"}
    assert ">(" in may_follow(policy, MUST, "hm </thin")


@pytest.mark.parametrize("grammar", [MAY, MUST, TAGGED])
def test_read_again_the_masks_are_those_of_the_sampling(policy: Policy, grammar: Grammar) -> None:
    requests = [
        GenerationRequest(encode(policy, "abc"), 60, seed=seed, grammar=grammar)
        for seed in range(12)
    ]
    results = generate(policy, requests)
    for request, result in zip(requests, results, strict=True):
        row = TrainingRow(
            request.prompt_ids_T, result.completion_ids_T, result.logprobs_T, 1.0, 1.0, grammar
        )
        with torch.no_grad():
            logprob_NV = completion_logprobs(policy, [row])
        again = logprob_NV.gather(1, torch.tensor(row.completion_ids_T)[:, None])[:, 0]
        assert again.tolist() == pytest.approx(result.logprobs_T, abs=1e-4)
        said = result.text.lstrip()
        if not grammar.opened and not said.startswith("<think>"):
            assert result.finish_reason == "stop" and not set(said) & set("zZ[")
