"""KL to the base and entropy, against direct computation."""

import pytest
import torch

from fst_dspy.config import LoraConfig
from fst_dspy.errors import DataError
from fst_dspy.model import divergence as drift
from fst_dspy.model import logprobs
from fst_dspy.model.divergence import kl_to_base, spread_calls, token_entropy
from fst_dspy.model.policy import Policy
from fst_dspy.types import Call, Rollout


def load(folder):
    return Policy.load(folder, device="cpu")


def calls_for(count=5, temperature=1.0):
    generator = torch.Generator().manual_seed(0)
    calls = []
    for n in range(count):
        ids = tuple(torch.randint(3, 300, (4 + 3 * n,), generator=generator).tolist())
        split = 2 + n
        logprobs = (0.0,) * (len(ids) - split)
        calls.append(Call("p", ids[:split], ids[split:], logprobs, "", "stop", temperature))
    return calls


@torch.no_grad()
def direct(model, calls, temperature):
    """Log-probabilities at the completion tokens, one row at a time without padding."""
    found = []
    for call in calls:
        ids = torch.tensor([call.prompt_ids_T + call.completion_ids_T])
        logits = model(ids).logits[0, len(call.prompt_ids_T) - 1 : -1] / temperature
        found.append(logits.double().log_softmax(-1))
    return torch.cat(found)


def disturb(policy, size=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_direct_computation(tiny_model, temperature):
    policy, base = load(tiny_model), load(tiny_model)
    calls = calls_for(temperature=temperature)
    assert kl_to_base(policy, calls) == 0.0
    disturb(policy)
    p, q = direct(policy.model, calls, temperature), direct(base.model, calls, temperature)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    before = policy.weights_hash()
    assert expected > 0.001
    assert kl_to_base(policy, calls) == pytest.approx(expected, rel=1e-4)
    assert policy.weights_hash() == before
    entropy = -(p.exp() * p).sum(-1).mean().item()
    assert token_entropy(policy, calls) == pytest.approx(entropy, rel=1e-5)


def test_known_value_of_a_shifted_logit(tiny_llama):
    """With the output weights at 0 the base is uniform; the KL of a peaked policy is log V - H."""
    policy = load(tiny_llama)
    head = policy.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    policy = Policy(policy.model, policy.tokenizer, "uniform", policy.source)
    policy.keep()
    vocab = head.weight.shape[0]
    log_vocab = torch.tensor(vocab).log().item()
    assert token_entropy(policy, calls_for()) == pytest.approx(log_vocab, rel=1e-5)
    disturb(policy, size=0.3)
    expected = log_vocab - token_entropy(policy, calls_for())
    assert kl_to_base(policy, calls_for()) == pytest.approx(expected, rel=1e-4)


def test_lora_is_measured_against_the_bare_model(tiny_qwen3):
    policy = load(tiny_qwen3)
    policy.add_lora(LoraConfig(rank=4), seed=0)
    assert kl_to_base(policy, calls_for()) == 0.0  # fresh adapters add nothing
    disturb(policy)
    calls = calls_for()
    p, q = direct(policy.model, calls, 1.0), direct(load(tiny_qwen3).model, calls, 1.0)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl_to_base(policy, calls) == pytest.approx(expected, rel=1e-4)


def test_chunks_change_nothing(tiny_qwen3, monkeypatch):
    policy = load(tiny_qwen3)
    disturb(policy)
    calls = calls_for(9)
    whole = kl_to_base(policy, calls), token_entropy(policy, calls)
    for module in (drift, logprobs):
        monkeypatch.setattr(module, "CHUNK_BYTES", 10 * 4 * 320)
    monkeypatch.setattr(drift, "FORWARD_ROWS", 2)
    cut = kl_to_base(policy, calls), token_entropy(policy, calls)
    assert cut == pytest.approx(whole, rel=1e-4)


def test_the_weights_are_swapped_once(tiny_qwen3, monkeypatch):
    policy, swaps = load(tiny_qwen3), []
    disturb(policy)
    expected = kl_to_base(policy, calls_for(9))
    swapped, whole = policy.at, sum(len(call.completion_ids_T) for call in calls_for(9)) * 4 * 320
    for module in (drift, logprobs):  # of log-probabilities; states are small
        monkeypatch.setattr(module, "CHUNK_BYTES", whole // 5)
    monkeypatch.setattr(drift, "FORWARD_ROWS", 2)
    monkeypatch.setattr(policy, "at", lambda version: swaps.append(version) or swapped(version))
    assert kl_to_base(policy, calls_for(9)) == pytest.approx(expected, rel=1e-4)
    assert swaps == [policy.base_version]


def test_greedy_calls_are_measured_at_temperature_one(tiny_qwen3):
    policy = load(tiny_qwen3)
    disturb(policy)
    assert kl_to_base(policy, calls_for(temperature=0.0)) == kl_to_base(policy, calls_for())


def test_nothing_to_measure_on(tiny_qwen3):
    empty = [Call("p", (3, 4), (), (), "", "stop", 1.0)]
    for measure in (kl_to_base, token_entropy):
        with pytest.raises(DataError, match="no call has a completion"):
            measure(load(tiny_qwen3), empty)


def rollout_of(number, calls):
    made = [
        Call("p", (3, number), (4 + n,), (0.0,), f"{number}.{n}", "stop", 1.0) for n in range(calls)
    ]
    return Rollout("e", "c", tuple(made), (), 0.0, "", None, 0)


def test_each_rollout_is_represented_among_the_calls_that_are_measured():
    def texts(sizes, count, seed=0):
        rollouts = [rollout_of(number, size) for number, size in enumerate(sizes)]
        return [call.text for call in spread_calls(rollouts, 3 * count, seed)]

    def per_rollout(found, sizes):
        return [sum(t.startswith(f"{n}.") for t in found) for n in range(len(sizes))]

    assert texts([1] * 64, 64) == [f"{n}.0" for n in range(64)]  # all, in their order
    agents = [20] * 48
    found = texts(agents, 64)
    assert len(found) == 64 == len(set(found))
    assert sorted(per_rollout(found, agents)) == [1] * 32 + [2] * 16
    assert len({text.split(".")[1] for text in found}) > 10  # not their first calls alone
    assert found == sorted(found, key=lambda text: tuple(map(int, text.split("."))))
    assert found == texts(agents, 64) != texts(agents, 64, seed=1)
    uneven = [1, 0, 30, 2]
    assert per_rollout(texts(uneven, 10), uneven) == [1, 0, 7, 2]
    many = [1] * 100
    assert len(texts(many, 64)) == 64 and texts(many, 64) != [f"{n}.0" for n in range(64)]


def test_calls_without_a_completion_take_no_ones_place():
    empty = Call("p", (3,), (), (), "empty", "length", 1.0)
    rollouts = [Rollout("e", "c", (empty,), (), 0.0, "", None, 0), rollout_of(1, 3)]
    assert {call.text for call in spread_calls(rollouts, 6, 0)} < {"1.0", "1.1", "1.2"}


def test_long_calls_use_up_what_may_be_read_but_one_is_always_measured():
    def long(number):
        call = Call("p", (3,) * 90, (4,) * 10, (0.0,) * 10, str(number), "stop", 1.0)
        return Rollout("e", "c", (call,), (), 0.0, "", None, 0)

    rollouts = [long(number) for number in range(8)]
    assert len(spread_calls(rollouts, 350, 0)) == 3
    assert len(spread_calls(rollouts, 5, 0)) == 1
    assert len(spread_calls(rollouts, 800, 0)) == 8
