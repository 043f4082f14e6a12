"""The run that makes the adapter: one optimizer step after another, resumable at any of them.

Every exercise is drawn from a generator seeded by (seed, step, place), and a checkpoint holds
adapter, optimizer and position: a run that was killed goes on to the very same weights.

The base is in bfloat16, the adapter's own weights are in float32 and take part in bfloat16
(autocast). A thread a row and a core: on a busy machine this was four times as fast as to share
each row among the cores, which then wait for each other at every matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import peft
import torch
from peft.helpers import disable_input_dtype_casting
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_dspy.files import write_atomically
from fst_dspy.smollm2.corpus import SHARES, SKILLS
from fst_dspy.smollm2.corpus.render import ADAPTERS, render
from fst_dspy.smollm2.trees import Row, answer_losses, encode

ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOW_PRIORITY = 10
"""How much the process yields to others, in the steps of ``nice``."""
ADAPTER_SHARES = {"chat": 0.5, "xml": 0.35, "json": 0.15}


@dataclass(frozen=True)
class Recipe:
    """How the adapter is made.

    Attributes:
        seed: Of the first weights and of every exercise.
        rank, alpha: Of the adapters on all linear layers but the output.
        learning_rate: Peak, after ``warmup_steps`` of rising.
        steps: Optimizer steps; over the last ``decay`` of them the rate falls to a tenth. A run may
            go on with more.
        start: Those that the adapter it begins with had taken: the rate rises behind them.
        rows: Exercises a step.
        tokens: Longest row.
        reasoning: Share of exercises with a reasoning field.
    """

    seed: int = 0
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 5e-4
    warmup_steps: int = 10
    steps: int = 240
    start: int = 0
    decay: float = 0.3
    rows: int = 4
    tokens: int = 768
    reasoning: float = 0.5

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step - self.start + 1) / self.warmup_steps)
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * rising * (0.1 + 0.9 * min(1.0, left))


@dataclass
class Position:
    """Where a run stands: optimizer steps, tokens read, tokens taught, seconds."""

    step: int = 0
    tokens: int = 0
    taught: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """Of answers to held-out exercises: mean loss a token, share right in every token."""

    loss: float
    exact: float


def draw(tokenizer: Any, recipe: Recipe, rng: Random, held_out: bool) -> Row:
    """One exercise as a row."""
    (skill,) = rng.choices(list(SHARES), list(SHARES.values()))
    (adapter,) = rng.choices(list(ADAPTER_SHARES), list(ADAPTER_SHARES.values()))
    exercise = SKILLS[skill](rng, held_out, rng.random() < recipe.reasoning)
    return encode(tokenizer, render(exercise, ADAPTERS[adapter]), recipe.tokens)


class Trainer:
    """Model, optimizer and position of one run.

    Args:
        base: The folder of SmolLM2 as it comes, or of a smaller model for a test.
        recipe: How the adapter is made.
        threads: Rows worked on at once, each on one core.
    """

    def __init__(self, base: Path, recipe: Recipe, threads: int = 2) -> None:
        self.recipe = recipe
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, attn_implementation="eager"
        )
        config = peft.LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = peft.get_peft_model(model, config)  # frozen, but for float32 adapters
        self.weights = [w for w in self.model.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, betas=(0.9, 0.98), weight_decay=0.01)
        self.position = Position()
        self._threads = ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.position.step >= self.recipe.steps

    def _rows(self, name: str, count: int, held_out: bool) -> list[Row]:
        seeds = [Random(f"{self.recipe.seed} {name} {place}") for place in range(count)]
        return [draw(self.tokenizer, self.recipe, rng, held_out) for rng in seeds]

    def advance(self) -> float:
        """Take one optimizer step; returns the mean loss of its answers' tokens."""
        rows = self._rows(str(self.position.step), self.recipe.rows, held_out=False)
        total = sum(int(row.taught_T.sum()) for row in rows)

        def work(row: Row) -> tuple[float, Sequence[Tensor]]:
            with torch.autocast("cpu", torch.bfloat16):
                losses, _, _ = answer_losses(self.model, row)
            loss = losses.sum() / total
            # Not ``backward``: two threads would add to the same gradient.
            return float(loss.detach()), torch.autograd.grad(loss, self.weights)

        self.model.train()
        with disable_input_dtype_casting(self.model):
            done = list(self._threads.map(work, rows))
        for place, weight in enumerate(self.weights):
            weight.grad = torch.stack([grads[place] for _, grads in done]).sum(0)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.position.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.tokens += sum(len(row.ids_T) for row in rows)
        self.position.taught += total
        return sum(loss for loss, _ in done)

    @torch.no_grad()
    def held_out(self, count: int) -> HeldOut:
        """How ``count`` exercises of held-out words and wordings are answered, as taught."""
        rows = self._rows("held out", count, held_out=True)

        def work(row: Row) -> tuple[float, int, bool]:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                losses, right, _ = answer_losses(self.model, row)
            return float(losses.sum()), len(losses), bool(right.all())

        self.model.eval()
        with disable_input_dtype_casting(self.model):
            found = list(self._threads.map(work, rows))
        tokens = sum(length for _, length, _ in found)
        return HeldOut(
            sum(loss for loss, _, _ in found) / tokens,
            sum(exact for _, _, exact in found) / len(found),
        )

    def save(self, file: Path) -> None:
        """Write a checkpoint; a kill at any moment leaves the old one or the new one, whole."""
        state: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "position": asdict(self.position),
            "weights": [weight.detach() for weight in self.weights],
            "optimizer": self.optimizer.state_dict(),
        }
        write_atomically(file, lambda stream: torch.save(state, stream))

    def load(self, file: Path) -> bool:
        """Go on from a checkpoint; ``False`` where there is none of this recipe.

        The number of steps may differ.
        """
        if not file.exists():
            return False
        state = torch.load(file, weights_only=True)
        if {**state["recipe"], "steps": 0} != {**asdict(self.recipe), "steps": 0}:
            return False
        with torch.no_grad():
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        return True

    def begin_from(self, folder: Path, position: Position) -> None:
        """Take the weights of an adapter that was written; the optimizer begins anew."""
        state = load_peft_weights(str(folder), device="cpu")
        peft.set_peft_model_state_dict(self.model, state)
        self.position = position

    def write(self, folder: Path) -> None:
        """Write the adapter in peft's format, in bfloat16: half the bytes, as it takes part."""
        # peft would name the folder that the base was read from, which is this machine's.
        self.model.peft_config["default"].base_model_name_or_path = ORIGIN
        state = peft.get_peft_model_state_dict(self.model)
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
        self.model.save_pretrained(folder, state_dict=rounded)
        (folder / "README.md").unlink()  # a form, not filled in

    def run(self, file: Path, save_every: int, report: Callable[[Trainer, float], None]) -> None:
        """Advance to the end, with a checkpoint every ``save_every`` steps and at the end."""
        while not self.done:
            loss = self.advance()
            if self.done or self.position.step % save_every == 0:
                self.save(file)
            report(self, loss)
