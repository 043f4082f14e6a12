"""The pre-training run: stages in order, one optimizer step after another, resumable anywhere.

Every step draws its chats from a generator seeded by (seed, step), and a checkpoint holds weights,
optimizer and position, so that a run that was killed goes on to the very same weights.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Lfm2Config, Lfm2ForCausalLM

from fst_dspy.embedded import tokenizer as tokenizer_lib
from fst_dspy.embedded.batches import BatchStats, Encoded, batch_loss, encode_chats
from fst_dspy.embedded.corpus.base import STAGES_OF_ALL, Family, Message, Stage
from fst_dspy.embedded.corpus.words import VOCABULARY


@dataclass(frozen=True)
class Recipe:
    """How the model is made.

    Attributes:
        seed: Of the weights and of every chat.
        hidden, mlp, heads, layers: Sizes; layers alternate short convolution and attention.
        reach: Tokens that a convolution spans; a rule's key and value must fit in.
        pieces: Tokens of the vocabulary that are learned, besides whole words and phrases.
        tokenizer_chats: Chats the tokenizer is trained on.
        batch, micro: Chats an optimizer step, and at most at once, sorted by length.
        learning_rate: Peak; warmed up over ``warmup_steps``, in the joint stage decayed to a tenth.
        joint_steps: Steps of the stage that mixes all families.
        polish_steps, polish_rate: Steps and peak rate of the stage after it, on harder inputs. More
            steps make the model better, and leave less for reinforcement learning to do.
        calibrate_steps: Steps of the last stage, at the same rate; see ``STAGES_OF_ALL``.
        warmup_limit: Caps the steps of each earlier stage, for quick trials; ``None``: as given.
        continued: It goes on from a model that knows less, without the earlier stages.
        shares: Of families in the mixture, by name, where they are not their own.
    """

    seed: int = 0
    hidden: int = 128
    mlp: int = 320
    heads: int = 2
    layers: int = 4
    reach: int = 6
    pieces: int = 900
    tokenizer_chats: int = 3000
    batch: int = 32
    micro: int = 4
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    joint_steps: int = 980
    polish_steps: int = 150
    polish_rate: float = 1e-3
    calibrate_steps: int = 350
    warmup_limit: int | None = None
    continued: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)


CONTINUED = (
    Recipe(
        learning_rate=2e-3,
        joint_steps=760,
        polish_steps=60,
        polish_rate=8e-4,
        calibrate_steps=300,
        continued=True,
        shares={"rule_lookup": 1.0, "star_graph": 0.6, "list_program": 1.0, "multihop": 0.8,
                "walking": 1.6, "rooms": 1.3, "tools": 0.8},
    ),
    Recipe(
        seed=1,
        learning_rate=1.5e-3,
        joint_steps=300,
        polish_steps=20,
        polish_rate=7e-4,
        calibrate_steps=180,
        continued=True,
        shares={"rule_lookup": 1.3, "star_graph": 0.7, "list_program": 1.4, "multihop": 0.8,
                "walking": 1.8, "rooms": 0.9, "tools": 0.8},
    ),
    Recipe(
        seed=2,
        learning_rate=1.5e-3,
        joint_steps=300,
        polish_steps=250,
        calibrate_steps=250,
        continued=True,
        shares={"rule_lookup": 2.2, "star_graph": 0.7, "list_program": 1.0, "multihop": 0.8,
                "walking": 2.0, "rooms": 0.9, "tools": 0.3},
    ),
)  # fmt: skip
"""How a model that was made before is taught what has come to the corpus since, in three runs: the
last has walks as they are now, and brings back what the others cost.
"""


@dataclass
class Position:
    """Where a run stands: stage index, steps within it and in all, recent accuracy."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    accuracy: float = 0.0
    seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)


def make_tokenizer(families: Sequence[Family], recipe: Recipe) -> Tokenizer:
    """The tokenizer, trained on chats of the joint stage of every family."""

    def texts() -> Iterator[str]:
        for index in range(recipe.tokenizer_chats):
            rng = Random(f"tokenizer {recipe.seed} {index}")
            for message in families[index % len(families)].sample(rng, "joint"):
                yield message.content

    return tokenizer_lib.train(texts(), VOCABULARY, recipe.pieces)


def make_model(tokenizer: Tokenizer, recipe: Recipe) -> Lfm2ForCausalLM:
    """A model with fresh weights, determined by the recipe's seed."""
    config = Lfm2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=recipe.layers,
        layer_types=["conv", "full_attention"] * (recipe.layers // 2),
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        conv_L_cache=recipe.reach,
        conv_bias=False,  # a bias would leak from padding into the sequence
        max_position_embeddings=tokenizer_lib.CONTEXT_LENGTH,
        pad_token_id=tokenizer.token_to_id(tokenizer_lib.PAD),
        eos_token_id=tokenizer.token_to_id(tokenizer_lib.END),
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Lfm2ForCausalLM(config)
        _start_as_copier(model)
    return model


@torch.no_grad()
def _start_as_copier(model: Lfm2ForCausalLM) -> None:
    """Sets the weights so that every attention layer starts as an induction head.

    The convolution adds the token before, turned by a rotation, to each position; attention looks
    for positions whose token before is the present one, and passes on what it reads there. From
    here pairs of words are recalled in 20 steps; from the usual weights sometimes not in 400.
    """
    hidden = model.config.hidden_size
    scale, constant = 0.3, 1.0
    # One feature is the same for every token and stands in for a bias, which padding would leak.
    normed = constant / (scale**2 + constant**2 / hidden) ** 0.5

    def rotation() -> torch.Tensor:
        matrix = torch.nn.init.orthogonal_(torch.empty(hidden, hidden))
        matrix[:, 0] = 0.0  # the constant is not content
        return matrix

    model.model.embed_tokens.weight.normal_(std=scale)
    model.model.embed_tokens.weight[:, 0] = constant
    model.model.embedding_norm.weight.fill_(scale)
    for block, reader in zip(model.model.layers[::2], model.model.layers[1::2], strict=True):
        conv, attention = block.conv, reader.self_attn
        read, write = rotation(), rotation()
        conv.in_proj.weight[: 2 * hidden, 0] = 1.0 / normed  # both gates open
        conv.in_proj.weight[2 * hidden :] = read
        # From the present token backwards: mostly the one before, some of those before that.
        taps = torch.tensor([0.0, 1.0, *(0.3 * 0.7**lag for lag in range(conv.conv_kernel_size))])
        conv.conv.weight[:, 0] = taps[: conv.conv_kernel_size].flip(0)
        conv.out_proj.weight.copy_(scale * write)
        match = rotation()
        attention.q_proj.weight.copy_(match)
        attention.k_proj.weight.copy_(match @ (write @ read).T)
        attention.q_layernorm.weight.fill_(2.0)
        value = rotation()
        attention.v_proj.weight.copy_(value)
        attention.out_proj.weight.copy_(1.5 * scale * value.T)


@torch.no_grad()
def grown(model: Lfm2ForCausalLM, old: Tokenizer, new: Tokenizer, added: Mapping[int, str]) -> None:
    """Gives ``model`` a row for each token that ``new`` has more: the mean of the tokens it was."""
    model.resize_token_embeddings(new.get_vocab_size(), mean_resizing=False)
    rows = model.get_input_embeddings().weight
    for token, text in added.items():
        rows[token] = rows[old.encode(text).ids].mean(0)


def _digest(model: Lfm2ForCausalLM) -> str:
    """Hex SHA-256 of the weights."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weight.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _twin(model: Lfm2ForCausalLM) -> Lfm2ForCausalLM:
    """The same model with gradients of its own: its weights are the other's."""
    twin = copy.deepcopy(model)
    for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
        mine.data = other.data
    return twin


def _learn(
    model: Lfm2ForCausalLM, parts: Sequence[Sequence[Encoded]], total: float
) -> list[BatchStats]:
    """Adds the gradients of micro-batches, whose losses are divided by ``total``.

    Two of these run at once, each on one thread: for matrices of this size that is twice as quick
    as two threads to a matrix, and the result does not depend on the number of threads.
    """
    model.train()
    found = []
    for rows in parts:
        stats = batch_loss(model, rows)
        (stats.loss / total).backward()
        found.append(replace(stats, loss=stats.loss.detach()))
    return found


def stages(families: Sequence[Family], recipe: Recipe) -> list[tuple[Family | None, Stage]]:
    """The warm-up stages of each family in turn, then the stages of all (family ``None``)."""
    steps = (recipe.joint_steps, recipe.polish_steps, recipe.calibrate_steps)
    listed: list[tuple[Family | None, Stage]] = []
    for family in () if recipe.continued else families:
        for stage in family.warmup:
            limit = min(stage.max_steps, recipe.warmup_limit or stage.max_steps)
            listed.append((family, Stage(stage.name, limit, stage.target)))
    return [
        *listed,
        *(
            (None, Stage(name, count, math.inf))
            for name, count in zip(STAGES_OF_ALL, steps, strict=True)
        ),
    ]


def draw_chats(
    families: Sequence[Family], family: Family | None, stage: str, recipe: Recipe, step: int
) -> list[list[Message]]:
    """The chats of one optimizer step, determined by the recipe's seed and the step."""
    rng = Random(f"{recipe.seed} {step}")
    known = families if family is None else families[: families.index(family)]
    shares = [recipe.shares.get(each.name, each.share) for each in known]
    chats = []
    for index in range(recipe.batch):
        if family is not None and (not known or index % 2):
            chats.append(family.sample(rng, stage))
        else:  # what was learned before is kept up while something new is learned
            (each,) = rng.choices(known, shares)
            chats.append(each.sample(rng, stage if family is None else "joint"))
    return chats


class Trainer:
    """Model, optimizer and position of one run, from nothing or from ``model``."""

    def __init__(
        self,
        families: Sequence[Family],
        tokenizer: Tokenizer,
        recipe: Recipe,
        model: Lfm2ForCausalLM | None = None,
    ) -> None:
        self.families = families
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.model = model or make_model(self.tokenizer, recipe)
        self._twins = (self.model, _twin(self.model))
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
        )
        self.position = Position()
        self.origin = _digest(self.model)
        self.stages = stages(families, recipe)

    @property
    def done(self) -> bool:
        """Whether every stage has been run."""
        return self.position.stage >= len(self.stages)

    def _rate(self) -> float:
        at = self.position
        family, stage = self.stages[at.stage]
        early = stage.name not in ("polish", "calibrate")
        rate = self.recipe.learning_rate if early else self.recipe.polish_rate
        rate *= min(1.0, (at.step + 1) / self.recipe.warmup_steps)
        if family is None:
            progress = at.stage_step / max(1, stage.max_steps)
            rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        return rate

    def advance(self) -> float:
        """Takes one optimizer step; returns the mean loss."""
        at, recipe = self.position, self.recipe
        family, stage = self.stages[at.stage]
        chats = draw_chats(self.families, family, stage.name, recipe, at.step)
        rows = sorted(encode_chats(self.tokenizer, chats), key=lambda row: len(row.ids_T))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        total = sum(sum(row.weight_T) for row in rows)
        parts = [rows[start : start + recipe.micro] for start in range(0, len(rows), recipe.micro)]
        with ThreadPoolExecutor(len(self._twins)) as pool:
            shares = [parts[number :: len(self._twins)] for number in range(len(self._twins))]
            done = pool.map(_learn, self._twins, shares, [total] * len(shares))
            stats = [each for learned in done for each in learned]
        for parameter, twin in zip(*(m.parameters() for m in self._twins), strict=True):
            if parameter.grad is not None and twin.grad is not None:  # more than one micro-batch
                parameter.grad += twin.grad
                twin.grad = None
        loss = sum(float(each.loss) for each in stats)
        right, heavy = (sum(getattr(each, name) for each in stats) for name in ("right", "heavy"))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        at.stage_step += 1
        at.accuracy += 0.1 * (right / max(1, heavy) - at.accuracy)
        if at.stage_step >= stage.max_steps or at.accuracy >= stage.target:
            at.finished[stage.name if family is None else f"{family.name}: {stage.name}"] = (
                at.stage_step
            )
            at.stage, at.stage_step, at.accuracy = at.stage + 1, 0, 0.0
        return loss / total

    def save(self, file: Path) -> None:
        """Writes a checkpoint; a kill at any moment leaves the old one or the new one, whole."""
        temporary = file.with_suffix(".tmp")
        state: dict[str, Any] = {
            "recipe": vars(self.recipe),
            "origin": self.origin,
            "position": vars(self.position),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    def load(self, file: Path) -> bool:
        """Goes on from a checkpoint of this run; ``False`` where there is none.

        That is one of the same recipe, which began from the same weights.
        """
        if not file.exists():
            return False
        state = torch.load(file, weights_only=True)
        if state["recipe"] != vars(self.recipe) or state.get("origin") != self.origin:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position = Position(**state["position"])
        return True

    def run(self, file: Path, save_every: int, report: Callable[[Trainer, float], None]) -> None:
        """Advances to the end, with a checkpoint every ``save_every`` steps and at the end."""
        while not self.done:
            loss = self.advance()
            if self.done or self.position.step % save_every == 0:
                self.save(file)
            report(self, loss)
