"""What each of several processes does under FSDP in ``test_distributed.py``.

Writes what it found to ``FOLDER/rank-N.json``, and kills process 0 in the middle of a compile into
``FOLDER/cut``. Started again it goes on with that, and writes ``FOLDER/again-N.json``.
"""

import json
import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from distributed_worker import (
    STEPS,
    compile_letters,
    cycles_of,
    die_in_a_step,
    steps,
    training_rows,
)

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer

CONFIGURED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}
"""As ``accelerate launch`` sets the environment, but for the last."""


def call_cpus_gpus():
    """accelerate has FSDP for GPUs only, though torch's runs on CPUs as well."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)


def held(model):
    """Shares of weights, gradients and moments that this process has within a step."""
    policy = Policy.load(model)
    trainer = SlowTrainer(policy, SlowConfig(), SamplingConfig(), total_steps=9, seed=0)
    trainer.advance(training_rows(5))
    numbers = sum(weight.numel() for weight in policy.model.parameters())

    def look():
        parts = trainer._trl.parameters
        moments = [state["exp_avg"] for state in trainer._trl.optimizer.state.values()]
        return {
            "whole": sum(weight.numel() for weight in policy.model.parameters()) / numbers,
            "weights": sum(part.to_local().numel() for part in parts) / numbers,
            "gradients": sum(part.grad.to_local().numel() for part in parts) / numbers,
            "moments": sum(moment.to_local().numel() for moment in moments) / numbers,
        }

    seen = []
    trainer._trl.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(look()))
    trainer.advance(training_rows(5))
    return seen[0]


def main(model, folder):
    os.environ |= CONFIGURED
    call_cpus_gpus()
    found = folder / f"rank-{distributed.rank()}.json"
    if found.exists():
        assert not (folder / "cut" / "result.json").exists()
        cycles = cycles_of(compile_letters(model, folder / "cut"))
        (folder / f"again-{distributed.rank()}.json").write_text(json.dumps(cycles))
        return
    found.write_text(
        json.dumps(
            {
                "steps": steps(model),
                "bfloat16": steps(model, STEPS[:1], "bfloat16"),
                "held": held(model),
                "cycles": cycles_of(compile_letters(model, folder / "whole")),
            }
        )
    )
    die_in_a_step()
    compile_letters(model, folder / "cut")
