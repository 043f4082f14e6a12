"""What each of several processes does in ``test_distributed.py``.

Writes what it found to ``FOLDER/rank-N.json``, compiles into ``FOLDER/whole``, and kills process 0
in the middle of a compile into ``FOLDER/cut``.
"""

import json
import os
import signal
from pathlib import Path

import dspy

from fst_dspy import FST, LocalLM, distributed, optimizer
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import FSTError
from fst_dspy.loop import folder as run_state
from fst_dspy.loop import joint
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.tasks import load_task
from fst_dspy.types import TrainingRow

PROGRAM = Path(__file__).parent / "study_program.py"
SETTINGS = {
    "max_cycles": 2,
    "steps_per_cycle": 2,
    "group_size": 4,
    "population_size": 2,
    "problems_per_step": 3,
    "first_cycle_iterations": 2,
    "cycle_iterations": 1,
    "minibatch_size": 3,
    "max_tokens": 8,
    "val_size": 3,  # an odd number for two processes
    "learning_rate": 1e-2,
}
STEPS = (
    {"loss_type": "cispo"},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "dr_grpo", "lora": LoraConfig(rank=2), "micro_batch_size": 2},
)
KILLED_BEFORE = 3  # optimizer steps; the one before was saved


class Counts(SilentProgress):
    """A listener that the loop knows nothing of; process 0 alone has it."""


class Ranked:
    """Proposes another text in every process, as a language model would."""

    def __init__(self):
        self.calls = 0

    def propose(self, components, records, names):
        self.calls += 1
        return {name: f"{components[name]} Process {distributed.rank()}." for name in names}


def compile_letters(model, folder=None, **settings):
    """Compile on a freshly loaded model: its results."""
    task = load_task(str(PROGRAM), 0)
    options = {"track_stats": True, "log_dir": folder, "progress": Counts()}
    fst = FST(task.metric, **options, **{**SETTINGS, **settings})
    with dspy.context(lm=LocalLM(model)):
        compiled = fst.compile(task.program, trainset=task.trainset, valset=task.valset)
    return compiled.detailed_results


def cycles_of(result):
    """What must be the same in every process at the end of every cycle."""
    return [[r.weights_version, r.candidate_ids, r.val_scores] for r in result.records]


def training_rows(live):
    """Rows of unlike lengths; so many of them have an advantage."""
    return [
        TrainingRow(
            prompt_ids_T=tuple(range(5, 8 + 3 * n)),
            completion_ids_T=tuple(range(40, 42 + 2 * n)),
            logprobs_T=(-2.0 - n / 7,) * (2 + 2 * n),
            advantage=(-1.0) ** n * (0.5 + n) if n < live else 0.0,
        )
        for n in range(5)
    ]


def steps(model, settings=STEPS, dtype=None):
    """Steps in several settings: their figures, and the weights' version after each."""
    found = []
    for slow in settings:
        policy, config = Policy.load(model, dtype=dtype), SlowConfig(learning_rate=1e-2, **slow)
        if config.lora is not None:
            policy.add_lora(config.lora, seed=0)
        trainer = SlowTrainer(policy, config, SamplingConfig(), total_steps=9, seed=0)
        for live in (5, 1):  # of one, a second process gets none
            stats = trainer.advance(training_rows(live))
            figures = [stats.loss, stats.grad_norm, stats.entropy, stats.clip_share]
            found.append({"figures": figures, "version": policy.version()})
    return found


def error_of(work):
    """What an ``FSTError`` says."""
    try:
        work()
    except FSTError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def unlike_rows(model):
    """A step on rows that differ from process to process."""
    trainer = SlowTrainer(Policy.load(model), SlowConfig(), SamplingConfig(), 9, seed=0)
    trainer.advance(training_rows(2 + distributed.rank()))


def die_in_a_step():
    """Process 0 is killed where an optimizer step would begin; steps are always saved."""
    run_state.RunFolder.is_due = lambda self, closes: True
    step = joint.Run._slow_step

    def dying(self, state):
        if state.step == KILLED_BEFORE - 1 and distributed.is_main():
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, state)

    joint.Run._slow_step = dying


def main(model, folder):
    ranked = Ranked()
    found = {
        "steps": steps(model),
        "bfloat16": steps(model, STEPS[:1], "bfloat16"),
        "unlike": error_of(lambda: unlike_rows(model)),
        "refused": error_of(lambda: distributed.from_main(lambda: optimizer.FST(None, arm="no"))),
        "shares": distributed.spread(lambda own: [[distributed.rank(), n] for n in own], range(3)),
        "one": distributed.spread(lambda own: list(own), range(1)),
        "any": distributed.any_process(distributed.rank() == 1),
        "cycles": cycles_of(compile_letters(model, folder / "whole")),
        "ranked": cycles_of(compile_letters(model, instruction_proposer=ranked, max_cycles=1)),
        "proposals": ranked.calls,
    }
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(found))
    die_in_a_step()
    compile_letters(model, folder / "cut")
