"""A step on answers that were held to a grammar, against sums over all answers there are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from chat_families import save_family
from held_answers import DESKS, FREE, SMALL, all_answers, encode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.model.divergence import kl_to_base, token_entropy
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.logprobs import completion_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.slow.taught_trainer import reverse_kl
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import Call, Grammar, TrainingRow

ANSWERS = [f"to: {desk}.\n\nend" for desk in DESKS]
TEMPERATURE = 0.7


def brute_logprob(
    policy: Policy, prompt: tuple[int, ...], ids: tuple[int, ...], grammar: Grammar
) -> torch.Tensor:
    """The log-probability of a whole answer, from the model's plain logits.

    What may follow is found without the library: by trying every token against all answers.
    """
    tokenizer = policy.tokenizer
    logits_TV = policy.model(torch.tensor([[*prompt, *ids]])).logits[0].float() / TEMPERATURE
    special = set(tokenizer.all_special_ids)
    pieces = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
    begun = list(all_answers(policy, grammar))
    total = torch.zeros(())
    for place, token in enumerate(ids):
        said = tokenizer.decode(ids[:place], skip_special_tokens=True)
        may = [i for i, piece in pieces.items() if any(a.startswith(said + piece) for a in ANSWERS)]
        may += [tokenizer.eos_token_id] if said in ANSWERS else []
        # Where a run is forced, all answers that begin so go on with one token.
        after = {answer[place] for answer in begun if answer[:place] == ids[:place]}
        if len(after) > 1 or not grammar.takes_runs:
            assert after == set(may)
            logit_V = logits_TV[len(prompt) + place - 1]
            total = total + logit_V[token] - logit_V[may].logsumexp(0)
    return total


@pytest.fixture
def policy(tiny_llama: Path) -> Policy:
    return Policy.load(tiny_llama)


@pytest.mark.parametrize("takes_runs", [True, False])
def test_the_policy_is_a_distribution_over_the_answers(policy: Policy, takes_runs: bool) -> None:
    grammar, prompt = Grammar(SMALL.text, takes_runs=takes_runs), encode(policy, "abc")
    answers = list(all_answers(policy, grammar))[:: 1 if takes_runs else 37]
    rows = [TrainingRow(prompt, a, (), 0.0, TEMPERATURE, grammar) for a in answers]
    with torch.no_grad():
        ours = [_row_logprob(policy, row).item() for row in rows]
        brute = [brute_logprob(policy, prompt, answer, grammar).item() for answer in answers]
    assert ours == pytest.approx(brute, abs=1e-4)
    if takes_runs:  # all of them were listed
        assert sum(map(math.exp, ours)) == pytest.approx(1, abs=1e-4)


def _row_logprob(policy: Policy, row: TrainingRow) -> torch.Tensor:
    logprob_NV = completion_logprobs(policy, [row])
    return logprob_NV.gather(1, torch.tensor(row.completion_ids_T)[:, None]).sum()


def test_a_step_goes_along_the_gradient_of_the_expected_reward(policy: Policy) -> None:
    """With every answer once, weighed by its probability, the loss is the expectation's own."""
    prompt = encode(policy, "abc")
    answers = list(all_answers(policy, SMALL))
    reward = [float(len(a)) + policy.tokenizer.decode(a).count("g") for a in answers]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    probability = torch.stack([brute_logprob(policy, prompt, a, SMALL) for a in answers]).exp()
    expected = (probability * torch.tensor(reward)).sum()
    wanted = torch.autograd.grad(expected, parameters)

    weights = (probability.detach() * torch.tensor(reward)).tolist()
    rows = [
        TrainingRow(prompt, a, (0.0,) * len(a), w, TEMPERATURE, SMALL)
        for a, w in zip(answers, weights, strict=True)
    ]
    for size in (None, 3):
        slow = SlowConfig(
            learning_rate=1e-3, max_grad_norm=0.0, damp_constant=False, micro_batch_size=size
        )
        trainer = SlowTrainer(policy, slow, SamplingConfig(), 10, seed=0)
        gradients = _gradients(trainer, rows)
        tokens = sum(len(row.completion_ids_T) for row in rows)
        for own, sought in zip(gradients, wanted, strict=True):
            assert torch.allclose(-own * tokens, sought, atol=1e-5, rtol=1e-3)


def _gradients(trainer: SlowTrainer, rows: list[TrainingRow]) -> list[torch.Tensor]:
    """The gradient of a step, which is then not taken."""
    found: list[torch.Tensor] = []
    trl = trainer._trl

    def keep(*_: object, **__: object) -> None:
        found.extend(p.grad.clone() for p in trl.parameters)

    trl.optimizer.step = keep
    trainer.advance(rows)
    return found


def test_the_router_loss_of_a_mixture_is_a_part_of_the_step(tmp_path: Path) -> None:
    found = []
    for coefficient in (0.0, 0.5):
        folder = save_family(
            tmp_path / str(coefficient), "qwen3-moe", router_aux_loss_coef=coefficient
        )
        policy = Policy.load(folder)
        requests = [
            GenerationRequest(encode(policy, text), 60, seed=n, grammar=SMALL)
            for n, text in enumerate(("abc", "where does a visa ticket go?"))
        ]
        rows = [
            TrainingRow(q.prompt_ids_T, r.completion_ids_T, r.logprobs_T, 1.0, 1.0, SMALL)
            for q, r in zip(requests, generate(policy, requests), strict=True)
        ]
        trainer = SlowTrainer(policy, SlowConfig(learning_rate=1e-3), SamplingConfig(), 10, seed=0)
        with torch.no_grad():
            whole = [torch.tensor([[*r.prompt_ids_T, *r.completion_ids_T]]) for r in rows]
            read = [policy.model(ids, output_router_logits=True).router_logits for ids in whole]
            logits = tuple(torch.cat(layer) for layer in zip(*read, strict=True))
            router_loss = load_balancing_loss_func(logits, 4, 2).item()
        stats = trainer.advance(rows)
        assert stats.skipped is None and 0 < stats.drift < 1e-4
        found.append(stats.loss - coefficient * router_loss)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "entropy_coef": 0.1}])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_steps_on_sampled_answers_are_on_policy(
    tiny_model: Path, settings: dict[str, float], lora: LoraConfig | None
) -> None:
    policy = Policy.load(tiny_model)
    if lora is not None:
        policy.add_lora(lora, 0)
    slow = SlowConfig(learning_rate=1e-3, micro_batch_size=3, **settings)  # type: ignore[arg-type]
    trainer = SlowTrainer(policy, slow, SamplingConfig(), 10, seed=0)
    for step in range(3):
        requests = [
            GenerationRequest(encode(policy, "abc"), 60, seed=100 * step + n, grammar=grammar)
            for n, grammar in enumerate((FREE, SMALL, FREE, None, FREE, SMALL))
        ]
        results = generate(policy, requests)
        rows = [
            TrainingRow(
                q.prompt_ids_T, r.completion_ids_T, r.logprobs_T, (-1.0) ** n, 1.0, q.grammar
            )
            for n, (q, r) in enumerate(zip(requests, results, strict=True))
        ]
        stats = trainer.advance(rows)
        assert stats.skipped is None and stats.grad_norm > 0
        assert 0 < stats.drift < 1e-4, "sampling and training disagree"
        assert math.isfinite(stats.entropy)


def test_forced_answers_alone_leave_the_weights_as_they_are(policy: Policy) -> None:
    forced = Grammar('%llguidance {}\nstart: "to: silver"')
    (answer,) = all_answers(policy, forced)
    rows = [
        TrainingRow(encode(policy, "abc"), answer, (0.0,) * len(answer), a, 1.0, forced)
        for a in (1.0, -1.0)
    ]
    trainer = SlowTrainer(policy, SlowConfig(learning_rate=1e-3), SamplingConfig(), 10, seed=0)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    stats = trainer.advance(rows)
    assert (stats.loss, stats.grad_norm, stats.entropy) == (0, 0, 0)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_kl_and_entropy_are_those_of_the_answers(policy: Policy) -> None:
    """Over all answers, weighed by probability, the sums over tokens are those over answers."""
    prompt = encode(policy, "abc")
    answers = list(all_answers(policy, SMALL))
    with torch.no_grad():
        base = torch.stack([brute_logprob(policy, prompt, a, SMALL) for a in answers])
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        live = torch.stack([brute_logprob(policy, prompt, a, SMALL) for a in answers])
    calls = [Call("p", prompt, a, (), "", "stop", TEMPERATURE, SMALL) for a in answers]
    weight = live.exp().tolist()
    policy.step += 1
    kl = [kl_to_base(policy, [call]) * len(call.completion_ids_T) for call in calls]
    entropy = [token_entropy(policy, [call]) * len(call.completion_ids_T) for call in calls]
    whole_kl, whole_entropy = (
        sum(w * x for w, x in zip(weight, values, strict=True)) for values in (kl, entropy)
    )
    assert whole_kl == pytest.approx((live.exp() * (live - base)).sum().item(), rel=1e-3)
    assert whole_entropy == pytest.approx(-(live.exp() * live).sum().item(), rel=1e-3)


def test_distillation_is_over_what_was_allowed(policy: Policy) -> None:
    prompt = encode(policy, "abc")
    (answer, *_) = all_answers(policy, SMALL)
    row = TrainingRow(prompt, answer, (), 0.0, TEMPERATURE, SMALL)
    student_NV = completion_logprobs(policy, [row])
    teacher_NV = (student_NV.detach() + torch.randn(student_NV.shape)).log_softmax(-1)
    value = reverse_kl(student_NV, teacher_NV)
    value.backward()
    may = student_NV > -torch.inf
    by_hand = (student_NV.exp() * (student_NV - teacher_NV))[may].sum()
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5) and value.item() > 0
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters())
