"""Our decode loop against transformers' own, and against a plain forward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import full_logprobs, sampled_logprobs

from fst_dspy.config import LoraConfig
from fst_dspy.errors import ModelError, PromptTooLongError
from fst_dspy.model import sizes as model_sizes
from fst_dspy.model.endings import End, stopped_tokens
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import pads_safely
from fst_dspy.model.sampling import uniforms

pytestmark = pytest.mark.insides

WORDS = ["where does a visa ticket go?", "abc", "The rule says", "You answer questions. " * 6]


def encode(policy: Policy, text: str) -> tuple[int, ...]:
    return tuple(policy.tokenizer.encode(text, add_special_tokens=False))


def without_end(policy: Policy) -> None:
    """Let completions run on: a random model ends when it likes."""
    policy.model.generation_config.eos_token_id = None
    policy.model.config.eos_token_id = None
    policy.tokenizer.eos_token = None
    policy.tokenizer.chat_template = None  # which puts that token behind answers


def test_greedy_equals_model_generate(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    requests = [GenerationRequest(encode(policy, w), 24, temperature=0) for w in [*WORDS, WORDS[1]]]
    for request, result in zip(requests, generate(policy, requests), strict=True):
        ids = torch.tensor([request.prompt_ids_T])
        expected = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )[0, ids.shape[1] :]
        assert list(result.completion_ids_T) == expected.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
def test_logprobs_equal_a_full_forward_pass(tiny_model: Path, temperature: float) -> None:
    policy = Policy.load(tiny_model)
    requests = [
        GenerationRequest(encode(policy, w), 20, temperature, top_p=p, seed=i)
        for i, w in enumerate(WORDS * 2)
        for p in (1.0, 0.8)
    ]
    for request, result in zip(requests, generate(policy, requests), strict=True):
        expected = sampled_logprobs(policy, request, result)
        assert len(result.logprobs_T) == len(result.completion_ids_T) > 0
        assert np.allclose(result.logprobs_T, expected, atol=1e-4)


def test_adapters_are_sampled_from(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    requests = [GenerationRequest(encode(policy, w), 20, seed=i) for i, w in enumerate(WORDS)]
    base = generate(policy, requests)
    policy.add_lora(LoraConfig(rank=2), seed=0)
    policy.load_trainable_state({k: v + 0.02 for k, v in policy.trainable_state().items()})
    tuned = generate(policy, requests)
    assert tuned != base
    for request, result in zip(requests, tuned, strict=True):
        expected = sampled_logprobs(policy, request, result)
        assert np.allclose(result.logprobs_T, expected, atol=1e-4)
    with policy.at(policy.base_version):
        untuned = generate(policy, requests)
    assert [r.completion_ids_T for r in untuned] == [r.completion_ids_T for r in base]


def test_a_row_does_not_depend_on_the_rest_of_its_batch(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    requests = [
        GenerationRequest(encode(policy, w), 5 + 7 * (seed % 3), seed=seed)
        for seed, w in enumerate(WORDS * 3)
    ]
    together = generate(policy, requests)
    assert together == generate(policy, requests)
    alone = [generate(policy, [request])[0] for request in requests]
    backwards = generate(policy, requests[::-1])[::-1]
    for results in (alone, backwards):
        assert [r.completion_ids_T for r in results] == [r.completion_ids_T for r in together]
        assert [r.text for r in results] == [r.text for r in together]
    assert len({r.completion_ids_T for r in together}) == len(requests)


def test_equal_prompts_are_read_once_and_sampled_apart(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    prompt = encode(policy, WORDS[0])
    read: list[tuple[int, ...]] = []
    handle = policy.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    results = generate(policy, [GenerationRequest(prompt, 10, seed=s) for s in range(8)])
    handle.remove()
    assert read[0] == (1, len(prompt)) and read[1][1] == 1
    assert len({r.completion_ids_T for r in results}) == 8


def test_finished_rows_leave_the_batch(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    without_end(policy)
    prompt, rows = encode(policy, WORDS[0]), []
    handle = policy.model.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lengths = [2, 2, 4, 30]
    results = generate(policy, [GenerationRequest(prompt, n, seed=n) for n in lengths])
    handle.remove()
    assert [len(r.completion_ids_T) for r in results] == lengths
    assert rows == [1, 4, 2, 2] + [1] * 26


def test_end_tokens_and_limits_give_the_finish_reason(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    end = policy.tokenizer.eos_token_id
    requests = [GenerationRequest(encode(policy, "abc"), 40, 1.5, seed=s) for s in range(48)]
    results = generate(policy, requests)
    ended = [r for r in results if end in r.completion_ids_T]
    assert ended and len(ended) < len(results)
    for result in results:
        if result in ended:
            assert result.finish_reason == "stop" and result.completion_ids_T.index(end) == (
                len(result.completion_ids_T) - 1
            )
            assert "<|im_end|>" not in result.text
        else:
            assert result.finish_reason == "length" and len(result.completion_ids_T) == 40


def test_stop_strings_cut_the_text_and_end_the_row(tiny_lfm2: Path) -> None:
    policy = Policy.load(tiny_lfm2)
    without_end(policy)
    plain = [GenerationRequest(encode(policy, w), 40, seed=7) for w in WORDS]
    texts = [r.text for r in generate(policy, plain)]
    stops = [text[len(text) // 2 :][:3] for text in texts]
    stopped = generate(
        policy, [replace(r, stop=(stop, "never")) for r, stop in zip(plain, stops, strict=True)]
    )
    for result, text, stop in zip(stopped, texts, stops, strict=True):
        assert result.text == text[: text.index(stop)]
        assert result.finish_reason == "stop" and len(result.completion_ids_T) < 40


def test_stop_strings_in_a_thought_end_nothing(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    without_end(policy)
    plain = [GenerationRequest(encode(policy, w), 40, seed=7) for w in WORDS]
    for request, whole in zip(plain, generate(policy, plain), strict=True):
        text = whole.text
        closing, stops = text[15:18], (text[5:8], text[25:28])
        asked = replace(request, stop=stops, thought=("<think>", closing), opened=True)
        (result,) = generate(policy, [asked])
        begun = text.index(closing) + 3
        assert result.text == text[: min(p for s in stops if (p := text.find(s, begun)) >= 0)]
        assert result.finish_reason == "stop" and len(result.completion_ids_T) < 40
        # As vLLM is not told of them, what it has said is cut where they are complete.
        kept = stopped_tokens(policy.tokenizer, whole.completion_ids_T, asked)
        assert kept == len(result.completion_ids_T)
        (result,) = generate(policy, [replace(asked, thought=("<think>", "</think>"))])
        assert result.text == text and result.finish_reason == "length"


def test_a_prompt_without_room_is_refused_and_max_tokens_shrinks_to_the_room(
    tiny_model: Path,
) -> None:
    policy = Policy.load(tiny_model)
    without_end(policy)
    prompt = (5,) * policy.context_length
    with pytest.raises(PromptTooLongError, match=r"512 tokens.*512"):
        generate(policy, [GenerationRequest(prompt, 5)])
    (result,) = generate(policy, [GenerationRequest(prompt[:-3], 100)])
    assert len(result.completion_ids_T) == 3 and result.finish_reason == "length"


def test_large_batches_are_split_without_changing_any_row(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_model)
    requests = [GenerationRequest(encode(policy, w), 12, seed=s) for s, w in enumerate(WORDS * 3)]
    whole = generate(policy, requests)
    monkeypatch.setattr(model_sizes, "MAX_CPU_TOKENS", 100)
    sizes: list[int] = []
    handle = policy.model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    split = generate(policy, requests)
    handle.remove()
    assert max(sizes) <= max(100, *(len(r.prompt_ids_T) for r in requests))
    assert [r.completion_ids_T for r in split] == [r.completion_ids_T for r in whole]


def test_convolutions_with_a_bias_are_not_padded(tiny_lfm2: Path) -> None:
    model = Policy.load(tiny_lfm2).model
    assert pads_safely(model)
    model.config.conv_bias = True
    assert not pads_safely(model)


def test_samples_follow_the_distribution(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    prompt, rows = encode(policy, "abc"), 4000
    requests = [GenerationRequest(prompt, 1, temperature=1.3, seed=s) for s in range(rows)]
    counts = Counter(r.completion_ids_T[0] for r in generate(policy, requests))
    with torch.no_grad():
        logits_V = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected_V = (logits_V / 1.3).softmax(-1).double().numpy() * rows
    common = expected_V >= 5
    observed_V = np.array([counts[i] for i in range(len(expected_V))], dtype=float)
    observed = np.append(observed_V[common], observed_V[~common].sum())
    expected = np.append(expected_V[common], expected_V[~common].sum())
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert freedom > 10
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_top_p_draws_from_the_nucleus_alone(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    prompt = encode(policy, WORDS[2])
    requests = [GenerationRequest(prompt, 6, 1.0, top_p=0.5, seed=s) for s in range(40)]
    drawn = 0
    for request, result in zip(requests, generate(policy, requests), strict=True):
        for logprob_V, token in zip(
            full_logprobs(policy, request, result), result.completion_ids_T, strict=True
        ):
            prob_V = logprob_V.exp()
            likelier = float(prob_V[prob_V > prob_V[token] + 1e-6].sum())
            assert likelier < 0.5 + 1e-4
            drawn += likelier > 0
    assert drawn > 0
    tiny = generate(policy, [replace(r, top_p=1e-6) for r in requests[:2]])
    greedy = generate(policy, [replace(r, temperature=0.0, top_p=1.0) for r in requests[:2]])
    assert [r.completion_ids_T for r in tiny] == [r.completion_ids_T for r in greedy]


def test_top_k_draws_from_the_likeliest_alone_and_top_p_from_what_it_leaves(
    tiny_lfm2: Path,
) -> None:
    policy = Policy.load(tiny_lfm2)
    plain = [GenerationRequest(encode(policy, WORDS[2]), 6, 1.0, seed=s) for s in range(40)]
    for k, p in ((1, 1.0), (3, 1.0), (3, 0.6)):
        requests = [replace(r, top_k=k, top_p=p) for r in plain]
        ranks = []
        for request, result in zip(requests, generate(policy, requests), strict=True):
            full = full_logprobs(policy, request, result)
            for logprob_V, token, told in zip(
                full, result.completion_ids_T, result.logprobs_T, strict=True
            ):
                ranks.append(int((logprob_V > logprob_V[token]).sum()))
                assert told == pytest.approx(float(logprob_V[token]), abs=1e-4)
                kept = logprob_V.exp().sort(descending=True).values[:k].cumsum(0)
                before = 0.0 if ranks[-1] == 0 else float(kept[ranks[-1] - 1] / kept[-1])
                assert before < p
        assert max(ranks) == {(1, 1.0): 0, (3, 1.0): 2}.get((k, p), max(ranks)) < k


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_penalties_are_openais_and_transformers(tiny_model: Path, temperature: float) -> None:
    """Against the same by hand: one row, token by token, from full forward passes."""
    policy = Policy.load(tiny_model)
    without_end(policy)
    request = GenerationRequest(
        encode(policy, WORDS[0]), 16, temperature, seed=3,
        frequency_penalty=0.9, presence_penalty=1.1, repetition_penalty=1.3,
    )  # fmt: skip
    plain = replace(request, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0)
    results = generate(policy, [request, plain, replace(request, seed=4)])
    ids = list(request.prompt_ids_T)
    uniform_T = uniforms([3], 16)[0]
    counts: Counter[int] = Counter()
    for step, (token, told) in enumerate(
        zip(results[0].completion_ids_T, results[0].logprobs_T, strict=True)
    ):
        with torch.no_grad():
            logit_V = policy.model(torch.tensor([ids])).logits[0, -1].float()
        model_V = (logit_V / (temperature or 1)).log_softmax(-1)
        for had in {*ids}:
            logit_V[had] = logit_V[had] / 1.3 if logit_V[had] > 0 else logit_V[had] * 1.3
        for had, count in counts.items():
            logit_V[had] -= 0.9 * count + 1.1
        if temperature:
            share_V = (logit_V / temperature).softmax(-1).double().cumsum(0)
            assert token == int((share_V > uniform_T[step] * share_V[-1]).int().argmax())
        else:
            assert token == int(logit_V.argmax())
        assert told == pytest.approx(float(model_V[token]), abs=1e-4)
        ids.append(token)
        counts[token] += 1
    assert results[1].completion_ids_T == generate(policy, [plain])[0].completion_ids_T
    if temperature:  # greedily, a random model may repeat itself little
        assert results[0].completion_ids_T != results[1].completion_ids_T


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_ends_a_token_behind_the_line_that_closes_it(
    tiny_model: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_model)
    without_end(policy)
    plain = [GenerationRequest(encode(policy, w), 40, temperature, seed=7) for w in WORDS]
    whole = generate(policy, plain)
    # Of a random model's own text: any place is the beginning of a line for this.
    monkeypatch.setattr(End, "place", _anywhere)
    ends = [End(policy.tokenizer.decode(r.completion_ids_T[9:11])) for r in whole]
    requests = [replace(r, end=end) for r, end in zip(plain, ends, strict=True)]
    for result, full, end in zip(generate(policy, requests), whole, ends, strict=True):
        closed = next(
            n for n in range(41) if end.marker in policy.tokenizer.decode(full.completion_ids_T[:n])
        )
        assert result.completion_ids_T == full.completion_ids_T[: closed + 1]
        assert result.logprobs_T == pytest.approx(full.logprobs_T[: closed + 1], abs=1e-4)
        assert result.finish_reason == "stop"
        assert result.text.endswith(end.marker) and full.text.startswith(result.text)


def _anywhere(end: End, text: str) -> int | None:
    at = text.find(end.marker)
    return None if at < 0 else at + len(end.marker)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_are_a_clear_error(
    tiny_model: Path, temperature: float
) -> None:
    policy = Policy.load(tiny_model)
    policy.model.get_input_embeddings().weight.data.fill_(float("nan"))
    request = GenerationRequest(encode(policy, WORDS[0]), 4, temperature, seed=1)
    for step, advice in ((0, "another dtype"), (3, "lower learning_rate")):
        policy.step = step
        with pytest.raises(ModelError, match=f"not finite.*{advice}"):
            generate(policy, [request])


def test_the_train_flag_is_put_back(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    policy.model.train()
    seen = []
    handle = policy.model.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    generate(policy, [GenerationRequest((5, 6), 2)])
    handle.remove()
    assert seen and not any(seen) and policy.model.training


def test_no_requests_give_no_results(tiny_qwen3: Path) -> None:
    assert generate(Policy.load(tiny_qwen3), []) == []
