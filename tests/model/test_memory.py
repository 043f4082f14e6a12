"""Memory that really runs out: a subprocess under a limit on its address space."""

import subprocess
import sys

import pytest
from places import ROOT

pytestmark = pytest.mark.slow

CODE = """
import logging, resource, sys
sys.path.insert(0, {tests!r})
import torch
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

logging.basicConfig(stream=sys.stdout, format="%(message)s")
torch.set_num_threads(1)
policy = Policy.load({model!r})


def spare(megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))


trainer = SlowTrainer(policy, SlowConfig(micro_batch_size=64), SamplingConfig(), 10, 0)
rows = [TrainingRow((5 + i,) * 200, (7,) * 200, (-1.0,) * 200, (-1.0) ** i) for i in range(64)]
trainer.advance(rows[:1] * 2)
before = policy.version()
spare(100)
stats = trainer.advance(rows)
assert stats.skipped is None and policy.version() != before
print("step done", trainer.micro_batch_size)

requests = [GenerationRequest((5 + i % 200,) * 480, 3, seed=i) for i in range(512)]
generate(policy, requests[:2])
spare(12)
print("generate done", len(generate(policy, requests)))
"""


def test_work_is_halved_until_it_fits(tiny_qwen3, request):
    code = CODE.format(tests=str(ROOT), model=str(tiny_qwen3))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    step, _, generation = done.stdout.partition("step done")
    assert "memory ran out; going on with micro_batch_size=" in step
    assert "memory ran out on" in generation and "generate done 512" in generation
