"""What ``gpu.py`` runs: loads, random models, ceilings, floors and the plain loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.speed.models import without_end
from fst_dspy import LocalLM, embedded
from fst_dspy.config import SlowConfig
from fst_dspy.embedded import tokenizer as tokenizer_lib
from fst_dspy.embedded.training import Recipe, make_model
from fst_dspy.model.policy import Policy
from fst_dspy.slow.learning_rate import with_learning_rate
from fst_dspy.types import TrainingRow

PLAIN_ROWS = (32, 128)  # rows of one pass of the plain loop; the faster counts


@dataclass(frozen=True)
class Load:
    """What is run: sizes of models, and P problems of so many tokens, G completions each."""

    sizes: tuple[tuple[int, int], ...] = ((512, 12), (768, 14))  # hidden, layers
    problems: int = 16
    group: int = 8
    prompt: int = 256
    completion: int = 128
    repeats: int = 5
    copy_bytes: int = 2**30
    matrix: int = 8192


QUICK = Load(((64, 2),), 2, 4, 120, 6, 1, 2**22, 512)


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do: bytes and FLOP a second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Work:
    """The work of a model: weights in all and in its layers, and bytes.

    Attributes:
        weights, output: Of the whole model; of its output layer, which the embedding shares.
        weight_bytes: Of all weights.
        cache_bytes: Of the keys and values of one position.
    """

    weights: int
    output: int
    weight_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, policy: Policy) -> Work:
        config = policy.model.config
        weights = list(policy.model.parameters())
        attention = sum("attention" in kind for kind in config.layer_types)
        width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        return cls(
            weights=sum(w.numel() for w in weights),
            output=config.vocab_size * config.hidden_size,
            weight_bytes=sum(w.numel() * w.element_size() for w in weights),
            cache_bytes=2 * attention * width * weights[0].element_size(),
        )

    def flop(self, each: int, positions: int, outputs: int) -> float:
        """``each`` FLOP a weight at so many positions, the output layer at so many of them."""
        return each * ((self.weights - self.output) * positions + self.output * outputs)

    def decode_bytes(self, rows: int, prompt: int, completion: int) -> float:
        """Bytes read to decode a batch after its prefill."""
        cached = sum(prompt + n for n in range(completion))
        return completion * self.weight_bytes + rows * cached * self.cache_bytes


def synchronize(device: torch.device) -> None:
    """Wait for what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """The time of each repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median over the repeats."""
    return statistics.median(all_seconds(work, device, repeats))


def measure_ceilings(device: torch.device, dtype: torch.dtype, load: Load) -> Ceilings:
    """A large copy and a large matrix product, on random data; the best of several counts."""
    source = torch.ones(load.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = min(all_seconds(lambda: target.copy_(source), device, 5))
    left = torch.randn(load.matrix, load.matrix, device=device).to(dtype)
    right = torch.randn(load.matrix, load.matrix, device=device).to(dtype)
    multiplied = min(all_seconds(lambda: left @ right, device, 5))
    return Ceilings(2 * load.copy_bytes / copied, 2 * load.matrix**3 / multiplied)


def write_model(folder: Path, hidden: int, layers: int) -> Path:
    """The recipe's model and tokenizer, scaled; heads of 64, an MLP of 2.5 times the width."""
    tokenizer = Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))
    recipe = Recipe(hidden=hidden, mlp=hidden * 5 // 2, heads=max(1, hidden // 64), layers=layers)
    make_model(tokenizer, recipe).save_pretrained(folder)
    tokenizer_lib.save(tokenizer, folder)
    return folder


def endless(folder: Path, device: torch.device, dtype: str | None = None) -> LocalLM:
    """The model afresh, in the dtype that is chosen for the device; completions do not end."""
    policy = Policy.load(folder, device=device, dtype=dtype, name="random")
    return without_end(LocalLM(policy, cache=False))


def beside(seconds: float, floor: float, **figures: Any) -> dict[str, Any]:
    """A time, its floor, and how much of the time the floor is."""
    return {"seconds": seconds, "floor_seconds": floor, "floor_share": floor / seconds, **figures}


def prompts(load: Load, vocabulary: int) -> list[tuple[int, ...]]:
    """Random token ids, no special ones: a prompt a problem."""
    generator = torch.Generator().manual_seed(0)
    shape = (load.problems, load.prompt)
    rows = torch.randint(len(tokenizer_lib.SPECIAL), vocabulary, shape, generator=generator)
    return [tuple(row) for row in rows.tolist()]


def training_rows(load: Load, vocabulary: int) -> list[TrainingRow]:
    """A step's rows: completions of random ids, advantages of both signs."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt in prompts(load, vocabulary):
        for n in range(load.group):
            ids = torch.randint(len(tokenizer_lib.SPECIAL), vocabulary, (load.completion,),
                                generator=generator)  # fmt: skip
            advantage = (n + 0.5) / load.group * (-1.0) ** n
            rows.append(
                TrainingRow(prompt, tuple(ids.tolist()), (0.0,) * load.completion, advantage)
            )
    return rows


class PlainLoop:
    """The same step as anyone would write it: float32 weights, on CUDA under bfloat16 autocast.

    On policy, CISPO's ratio is 1, and its loss that of REINFORCE.
    """

    def __init__(self, policy: Policy, slow: SlowConfig) -> None:
        slow = with_learning_rate(slow, policy.model)
        self.model, self.device, self.slow = policy.model.train(), policy.device, slow
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=slow.learning_rate, weight_decay=0.0, fused=fused
        )

    def step(self, rows: list[TrainingRow], size: int) -> float:
        """One optimizer step, so many rows at a time; the loss."""
        total, loss_sum = sum(len(row.completion_ids_T) for row in rows), 0.0
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            ids = [[*row.prompt_ids_T, *row.completion_ids_T] for row in batch]
            id_BT = torch.tensor(ids, device=self.device)
            advantage_B1 = torch.tensor([[row.advantage] for row in batch], device=self.device)
            keep = len(batch[0].completion_ids_T)
            cuda = self.device.type == "cuda"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
                logits_BTV = self.model(input_ids=id_BT, logits_to_keep=keep + 1).logits[:, :-1]
            logprob_BTV = logits_BTV.float().log_softmax(-1)
            logprob_BT = logprob_BTV.gather(2, id_BT[:, -keep:, None]).squeeze(2)
            loss = -(advantage_B1 * logprob_BT).sum() / total
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.slow.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_sum
