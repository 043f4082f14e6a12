"""Answers held to a grammar: what is drawn, what is recorded of it, and what costs no pass."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from held_answers import DESKS, FREE, SMALL, encode

import fst_dspy.model.graph_decode as static
import fst_dspy.model.growing_decode as growing
from fst_dspy.grammar.tokens import single
from fst_dspy.model.divergence import format_share
from fst_dspy.model.generate import GenerationRequest, GenerationResult, generate
from fst_dspy.model.logprobs import completion_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import allowed_tokens
from fst_dspy.types import Call, Grammar, TrainingRow

SMALL_FORM = re.compile(rf"to: ({'|'.join(DESKS)})\.\n\nend")
FIELDS = Grammar(
    '%llguidance {}\nstart: "to: " ("silver" | "gold") "\\n\\n[[ ## why ## ]]\\nas " ("a" | "the")'
    ' " rule\\n\\n[[ ## done ## ]]\\n" ("yes" | "no") "\\nend"'
)
"""Three choices with forced text around them."""
FREE_FORM = re.compile(
    r"\[\[ ## reasoning ## \]\]\n(?s:.{0,12})\n\n\[\[ ## answer ## \]\]\n(silver|gold)"
    r"\n\n\[\[ ## completed ## \]\]"
)


def requests_for(policy: Policy, **settings: object) -> list[GenerationRequest]:
    """Prompts of unlike length, some of them equal, held to either grammar or to none."""
    words = ("where does a visa ticket go?", "abc", "abc", "The rule says", "abc")
    grammars = (FREE, SMALL, FREE, None, SMALL)
    return [
        GenerationRequest(encode(policy, w), 60, seed=seed, grammar=g, **settings)  # type: ignore
        for seed, (w, g) in enumerate(zip(words, grammars, strict=True))
    ]


def row_of(request: GenerationRequest, result: GenerationResult) -> TrainingRow:
    ids = (request.prompt_ids_T, result.completion_ids_T, result.logprobs_T)
    return TrainingRow(*ids, 1.0, request.temperature, request.grammar)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answers_keep_to_the_grammar_and_are_read_again_as_drawn(
    tiny_model: Path, temperature: float
) -> None:
    policy = Policy.load(tiny_model)
    requests = requests_for(policy, temperature=temperature)
    results = generate(policy, requests)
    for request, result in zip(requests, results, strict=True):
        form = {FREE: FREE_FORM, SMALL: SMALL_FORM}.get(request.grammar)  # type: ignore[arg-type]
        assert form is None or form.fullmatch(result.text), result.text
        assert form is None or result.finish_reason == "stop"
    rows = [row_of(*pair) for pair in zip(requests, results, strict=True)]
    with torch.no_grad():
        logprob_NV = completion_logprobs(policy, rows)
    ids_N = torch.tensor([token for row in rows for token in row.completion_ids_T])
    again_N = logprob_NV.gather(1, ids_N[:, None]).squeeze(1)
    drawn_N = torch.tensor([p for row in rows for p in row.logprobs_T])
    assert torch.allclose(again_N, drawn_N, atol=1e-4)
    # Where one token alone could follow, it is certain, both times, to the last bit.
    allowed_NW = allowed_tokens(policy, rows)
    assert allowed_NW is not None
    alone_N = single(allowed_NW)
    assert alone_N.sum() > 20 and (drawn_N[alone_N] == 0).all() and (again_N[alone_N] == 0).all()
    assert (logprob_NV.exp().sum(-1) - 1).abs().max() < 1e-4


def test_a_row_says_the_same_alone_and_among_others(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    requests = requests_for(policy)
    together = generate(policy, requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = generate(policy, [request])
        assert alone.completion_ids_T == result.completion_ids_T
        assert np.allclose(alone.logprobs_T, result.logprobs_T, atol=1e-4)


def call_of(request: GenerationRequest, result: GenerationResult) -> Call:
    return Call(
        "self",
        request.prompt_ids_T,
        result.completion_ids_T,
        result.logprobs_T,
        result.text,
        result.finish_reason,  # type: ignore[arg-type]
        request.temperature,
        request.grammar,
    )


def test_the_share_of_the_format_is_how_often_the_model_would_keep_to_it(tiny_llama: Path) -> None:
    """Against the sum of the model's own probability over every answer that the format has."""
    policy = Policy.load(tiny_llama)
    grammar = Grammar('%llguidance {}\nstart: "to: " ("a" | "bb" | "bc") "."')
    prompt = encode(policy, "abc")
    requests = [
        GenerationRequest(prompt, 60, temperature=1.3, grammar=grammar, seed=seed)
        for seed in range(300)
    ]
    calls = [call_of(*pair) for pair in zip(requests, generate(policy, requests), strict=True)]
    answers = {call.completion_ids_T for call in calls}
    assert {call.text for call in calls} == {"to: a.", "to: bb.", "to: bc."}
    # All that is drawn at all: what the same texts weigh in other tokens is next to nothing.
    own, held = 0.0, 0.0
    for answer in answers:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logprob_TV = (policy.model(ids).logits[0].float() / 1.3).log_softmax(-1)
        at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        # What is forced behind the whole answer, its end, nobody reads.
        own += float(logprob_TV[at, torch.tensor(answer)][:-1].sum().exp())
        call = next(call for call in calls if call.completion_ids_T == answer)
        held += math.exp(sum(call.logprobs_T))
    assert held == pytest.approx(1, abs=0.02)
    free = replace(calls[0], grammar=None)
    found = format_share(policy, [free, *calls])
    assert found is not None and found == pytest.approx(own, rel=0.25)
    assert format_share(policy, [free]) is None and format_share(policy, []) is None


def test_what_is_forced_at_the_ends_costs_no_pass(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    reads: list[int] = []
    handle = policy.model.register_forward_hook(lambda *_: reads.append(1))
    request = GenerationRequest(encode(policy, "abc"), 60, grammar=SMALL)
    (result,) = generate(policy, [request])
    handle.remove()
    allowed_NW = allowed_tokens(policy, [row_of(request, result)])
    assert allowed_NW is not None
    alone = single(allowed_NW).tolist()
    first, last = alone.index(False), len(alone) - 1 - alone[::-1].index(False)
    assert first >= 2 and len(alone) - last > 5  # there is something forced at either end
    assert len(reads) <= last - first + 1


@pytest.mark.parametrize(("limit", "columns"), [(60, 2**17), (60, 200), (9, 2**17)])
def test_what_is_forced_in_the_middle_costs_no_pass_of_its_own(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, limit: int, columns: int
) -> None:
    monkeypatch.setattr(growing, "COPIED_COLUMNS", columns)  # a few rows at a time, if small
    policy = Policy.load(tiny_llama)
    prompts = ("where does a visa ticket go?", "abc", "abc", "The rule says", "abc")
    grammars = (FIELDS, FIELDS, FIELDS, None, FREE)
    requests = [
        GenerationRequest(encode(policy, prompt), limit, temperature, seed=seed, grammar=grammar)
        for seed, temperature in enumerate((1.0, 0.7))
        for prompt, grammar in zip(prompts, grammars, strict=True)
    ]
    reads: list[int] = []
    policy.model.register_forward_hook(lambda *_: reads.append(1))
    alone = [generate(policy, [request])[0] for request in requests]
    passes, mixed = len(reads), generate(policy, requests)
    reads.clear()
    monkeypatch.setattr(growing, "takes_runs", lambda cache: False)
    stepwise = [generate(policy, [request])[0] for request in requests]
    assert passes < len(reads) - (60 if limit == 60 else 5)
    for one, other, expected in zip(alone, mixed, stepwise, strict=True):
        for found in (one, other):
            assert found.completion_ids_T == expected.completion_ids_T
            assert found.logprobs_T == pytest.approx(expected.logprobs_T, abs=1e-4)
            assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)


def test_the_output_layer_reads_no_token_that_another_follows(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    read: list[int] = []
    head = policy.model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, out: read.append(out.shape[:-1].numel()))
    results = generate(
        policy,
        [GenerationRequest(encode(policy, "abc"), 60, seed=n, grammar=FIELDS) for n in range(4)],
    )
    drawn = [(np.array(result.logprobs_T) != 0).sum() for result in results]
    assert sum(map(len, (r.completion_ids_T for r in results))) > 2 * sum(read)
    assert max(drawn) <= len(read) and max(read) <= len(results)


def test_an_answer_that_is_forced_whole_needs_no_model(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    policy.model.forward = None
    grammar = Grammar('%llguidance {}\nstart: "to: silver"')
    request = GenerationRequest(encode(policy, "abc"), 60, grammar=grammar)
    cut = GenerationRequest(encode(policy, "abc"), 2, grammar=grammar)
    whole, short = generate(policy, [request, cut])
    assert (whole.text, whole.finish_reason) == ("to: silver", "stop")
    assert whole.completion_ids_T[-1] == policy.tokenizer.eos_token_id
    assert set(whole.logprobs_T) == {0.0}
    assert short.completion_ids_T == whole.completion_ids_T[:2]
    assert short.finish_reason == "length"


@pytest.mark.parametrize("limit", range(1, 24))
def test_limits_hold_wherever_they_fall(tiny_llama: Path, limit: int) -> None:
    policy = Policy.load(tiny_llama)
    request = GenerationRequest(encode(policy, "abc"), 60, grammar=SMALL, seed=5)
    (whole,) = generate(policy, [request])
    (cut,) = generate(
        policy, [GenerationRequest(request.prompt_ids_T, limit, seed=5, grammar=SMALL)]
    )
    assert cut.completion_ids_T == whole.completion_ids_T[:limit]
    assert len(cut.logprobs_T) == len(cut.completion_ids_T)
    ended = limit >= len(whole.completion_ids_T)
    assert cut.finish_reason == ("stop" if ended else "length")


def test_decoding_from_a_fixed_cache_is_held_as_well(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_model)
    growing = generate(policy, requests_for(policy))
    monkeypatch.setattr(static, "DEVICES", ("cpu",))
    monkeypatch.setattr("fst_dspy.model.graph_step.Step.record", lambda step, pool: pool)
    monkeypatch.setattr("fst_dspy.model.graph_step.Step.run", lambda step: step._forward())
    fixed = generate(policy, requests_for(policy))
    assert [r.completion_ids_T for r in fixed] == [r.completion_ids_T for r in growing]


def test_a_thought_is_free_and_ends_with_its_mark(tiny_llama: Path) -> None:
    policy = Policy.load(tiny_llama)
    mark = "visa"
    assert len(encode(policy, mark)) == 1  # which a random model comes upon
    grammar = Grammar(SMALL.text, thought=("none", mark), opened=True)
    requests = [
        GenerationRequest(encode(policy, "abc"), 500, temperature=1.5, seed=seed, grammar=grammar)
        for seed in range(6)
    ]
    thought = 0
    for result in generate(policy, requests):
        said = policy.tokenizer.decode(result.completion_ids_T)
        before, _, answer = said.partition(mark)
        assert policy.tokenizer.eos_token not in before
        answer = answer.removesuffix(policy.tokenizer.eos_token).lstrip()
        thought += bool(SMALL_FORM.fullmatch(answer))
        assert SMALL_FORM.fullmatch(answer) or result.finish_reason == "length"
    assert thought >= 3
