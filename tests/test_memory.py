"""Memory that really runs out: a subprocess under a limit on its address space."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import logging, resource, sys
sys.path.insert(0, {tests!r})
import torch
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.generate import GenerationRequest, generate
from fst_dspy.policy import Policy
from fst_dspy.slow import SlowTrainer
from fst_dspy.types import TrainingRow

logging.basicConfig(stream=sys.stdout, format="%(message)s")
torch.set_num_threads(1)
policy = Policy.load({model!r})


def spare(megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))


if {what!r} == "step":
    trainer = SlowTrainer(policy, SlowConfig(micro_batch_size=64), SamplingConfig(), 10, 0)
    rows = [TrainingRow((5 + i,) * 200, (7,) * 200, (-1.0,) * 200, (-1.0) ** i) for i in range(64)]
    trainer.advance(rows[:1] * 2)
    before = policy.version()
    spare({megabytes})
    stats = trainer.advance(rows)
    assert stats.skipped is None and policy.version() != before
    print("done", trainer.micro_batch_size)
else:
    requests = [GenerationRequest((5 + i % 200,) * 480, 3, seed=i) for i in range(128)]
    generate(policy, requests[:2])
    spare({megabytes})
    print("done", len(generate(policy, requests)))
"""


@pytest.mark.parametrize(("what", "megabytes"), [("step", 100), ("generate", 12)])
def test_work_is_halved_until_it_fits(what, megabytes, tiny_qwen3, request):
    code = CODE.format(
        tests=str(request.path.parent), model=str(tiny_qwen3), what=what, megabytes=megabytes
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory ran out" in done.stdout
    assert "done" in done.stdout
