"""What SmolLM2 does with a prompt and what it knows of English, with the adapter and without.

``python -m fst_dspy.smollm2.figures`` measures both. The questions are of held-out words and
wordings, go through DSPy's adapters, rendered and parsed, and are answered once at temperature 1.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import peft
import torch
import typer
from dspy.utils.exceptions import AdapterParseError
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_dspy.files import sha256, write_atomically
from fst_dspy.pretrained import smollm2
from fst_dspy.smollm2.corpus import SKILLS
from fst_dspy.smollm2.corpus.base import Exercise
from fst_dspy.smollm2.corpus.render import ADAPTERS, prompt
from fst_dspy.smollm2.training import LOW_PRIORITY

MAX_NEW_TOKENS = 96
BATCH = 24
PARAGRAPHS = 40


@dataclass(frozen=True)
class Setting:
    """What is asked: a skill, through an adapter.

    Attributes:
        skill, adapter: By name.
        reasoning: With a reasoning field.
        told: With the rules in the prompt; without them nothing there can decide.
    """

    skill: str
    adapter: str
    reasoning: bool
    told: bool = True

    def __str__(self) -> str:
        parts = [self.skill, self.adapter, "reasoning" if self.reasoning else "plain"]
        return ", ".join(parts + ([] if self.told else ["not told"]))


SETTINGS = (
    *(Setting("rules", adapter, reasoning) for adapter in ADAPTERS for reasoning in (False, True)),
    Setting("rules", "chat", False, told=False),
    Setting("rules", "chat", True, told=False),
    *(Setting(skill, "chat", True) for skill in ("topics", "strategies", "schemas", "tools")),
    *(Setting(skill, "xml", False) for skill in ("topics", "strategies", "schemas")),
)


@dataclass(frozen=True)
class Score:
    """Shares (0 to 1) of answers right in every field but the reasoning, and parsed at all."""

    right: float
    parsed: float
    questions: int


def measure(model: Any, tokenizer: Any, setting: Setting, count: int, seed: int) -> Score:
    """The model's score on ``count`` questions, each under a prompt of its own."""
    adapter = ADAPTERS[setting.adapter]
    asked = [
        SKILLS[setting.skill](Random(f"figures {seed} {n}"), True, setting.reasoning)
        for n in range(count)
    ]
    chats = []
    for each in asked:
        signature = each.signature if setting.told else each.without_rules
        chats.append(prompt(adapter, signature, each.demos, each.turns[0]))
    right = parsed = 0
    for each, text in zip(asked, sample(model, tokenizer, chats, seed), strict=True):
        try:
            found = adapter.parse(each.signature, text)
        except AdapterParseError:
            continue
        parsed += 1
        right += _is_right(each, found)
    return Score(right / count, parsed / count, count)


def _is_right(asked: Exercise, found: dict[str, Any]) -> bool:
    passed_over = ("reasoning", "next_thought")
    wanted = {n: v for n, v in asked.turns[0].outputs.items() if n not in passed_over}
    # As text: an XML answer has no other form for values of any type.
    return all(str(found[name]).strip() == str(value) for name, value in wanted.items())


@torch.no_grad()
def sample(model: Any, tokenizer: Any, chats: Sequence[Any], seed: int) -> list[str]:
    """One completion a chat at temperature 1, in batches of chats of about the same length."""
    model.eval()
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    answers = [""] * len(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            encoded = tokenizer(
                [texts[place] for place in places],
                add_special_tokens=False,
                padding=True,
                return_tensors="pt",
            )
            ids_BT = model.generate(
                **encoded,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            new_BT = ids_BT[:, encoded["input_ids"].shape[1] :]
            for place, ids_T in zip(places, new_BT, strict=True):
                answers[place] = tokenizer.decode(ids_T, skip_special_tokens=True)
    return answers


def english() -> list[str]:
    """Paragraphs of prose from Python's own reference, which comes with every Python."""
    found = []
    for name in sorted(pydoc_data.topics.topics):
        for block in pydoc_data.topics.topics[name].split("\n\n"):
            text = " ".join(block.split())
            plain = sum(letter.isalpha() or letter in " ,.'" for letter in text)
            if 60 <= len(text.split()) <= 140 and plain >= 0.97 * len(text):
                found.append(text)
    found = list(dict.fromkeys(found))
    return found[:: max(1, len(found) // PARAGRAPHS)][:PARAGRAPHS]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Of a token, each text by itself."""
    total, count = 0.0, 0
    for text in texts:
        ids_T = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits = model(input_ids=ids_T).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids_T[0, 1:], reduction="sum"))
        count += ids_T.shape[1] - 1
    return math.exp(total / count)


def _begun(out: Path, of: dict[str, Any]) -> dict[str, Any]:
    """The figures in a file, to go on with, and what they are of; that alone where there are none.

    Raises:
        typer.BadParameter: They are of something else, and would be mixed with these.
    """
    if not out.exists():
        return of
    found: dict[str, Any] = json.loads(out.read_text())
    if "with" not in found:  # no adapter has been measured
        found["adapter"] = of["adapter"]
    before = {name: found.get(name) for name in of}
    if before != of:
        raise typer.BadParameter(f"{out} holds figures of {before}, not of {of}: name another file")
    return found


def _as_text(found: dict[str, Any]) -> bytes:
    return (json.dumps(found, indent=2) + "\n").encode()


def main(
    adapter: Annotated[Path | None, typer.Option(help="The adapter; default: as shipped.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("runs/smollm2.json"),
    questions: Annotated[int, typer.Option(min=1, help="For each setting.")] = 48,
    seed: Annotated[int, typer.Option(help="Of questions and answers.")] = 1,
    which: Annotated[str, typer.Option(help="Comma-separated.")] = "without,with",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Measure the model as it comes and under the adapter; goes on where it was stopped."""
    adapter = adapter or smollm2.adapter()
    weights = sha256(adapter / "adapter_model.safetensors")
    found = _begun(out, {"seed": seed, "questions": questions, "adapter": weights})
    os.nice(LOW_PRIORITY)
    torch.set_num_threads(threads)
    base = smollm2.fetch(smollm2.AS_IT_COMES)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name in which.split(","):
        if name == "with":
            model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        scores = found.setdefault(name, {})
        if "perplexity" not in scores:
            scores["perplexity"] = round(perplexity(model, tokenizer, english()), 3)
        for setting in SETTINGS:
            if str(setting) not in scores:
                scores[str(setting)] = asdict(measure(model, tokenizer, setting, questions, seed))
                typer.echo(f"{name} adapter: {setting}: {scores[str(setting)]}")
            write_atomically(out, lambda file: file.write(_as_text(found)))


if __name__ == "__main__":
    typer.run(main)
