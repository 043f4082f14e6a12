"""The copy that rollouts ahead are sampled from, and the thread they are sampled in."""

import json
import threading

import dspy
import pytest
import torch
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import distributed
from fst_dspy.ahead import Ahead, attempts_from_json
from fst_dspy.candidate import seed_candidate
from fst_dspy.config import LoraConfig, SamplingConfig
from fst_dspy.local_lm import LocalLM
from fst_dspy.problems import ProblemStream
from fst_dspy.rollout import RolloutJob, RolloutRunner
from fst_dspy.types import Group


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_rollouts_ahead_are_those_of_the_weights_before_the_update(tiny_qwen3, lora):
    lm = LocalLM(str(tiny_qwen3))
    policy = lm.policy
    if lora:
        policy.add_lora(LoraConfig(rank=2), seed=0)
    ahead, before = Ahead(policy), policy.version()
    with dspy.context(adapter=RawAdapter()):
        sampling = SamplingConfig(max_tokens=8)
        runner = RolloutRunner(Echo(), vowels, lm, sampling, 0)
    jobs = [RolloutJob(q, seed_candidate(Echo()), n) for q in questions(2) for n in range(2)]
    started = threading.Event()

    def sample(copy):
        assert started.wait(60)
        rollouts = runner.run(jobs, channel="slow", salt=1, policy=copy)
        return ((Group("x", tuple(rollouts)),),), ProblemStream(position=4)

    on_policy = runner.run(jobs, channel="slow", salt=1)
    future = ahead.begin(sample)
    state = policy.trainable_state()
    policy.load_trainable_state({k: v + torch.randn_like(v) for k, v in state.items()})
    policy.step += 1
    started.set()
    found, stream = future.result()
    assert stream == ProblemStream(position=4)
    assert policy.version() != before
    assert found[0][0].rollouts_G == tuple(on_policy)
    assert attempts_from_json(json.loads(json.dumps(found, default=vars))) == found
    ahead.close()


def test_frozen_weights_are_not_held_twice(tiny_qwen3):
    policy = LocalLM(str(tiny_qwen3)).policy
    policy.add_lora(LoraConfig(rank=2), seed=0)
    copy = Ahead(policy)._copy
    pairs = zip(policy.model.parameters(), copy.model.parameters(), strict=True)
    for live, own in pairs:
        assert (live.data_ptr() == own.data_ptr()) != live.requires_grad


def test_several_processes_sample_where_they_talk_to_each_other(tiny_qwen3, monkeypatch):
    ahead, threads = Ahead(LocalLM(str(tiny_qwen3)).policy), []
    monkeypatch.setattr(distributed, "processes", lambda: 2)

    def sample(copy):
        threads.append(threading.current_thread())
        return (), ProblemStream()

    assert ahead.begin(sample).done() and threads == [threading.current_thread()]
