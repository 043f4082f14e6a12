"""The run that makes the adapter: rows that share a prompt, steps, stop and resume, figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
import typer
from peft import PeftModel
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_dspy.smollm2 import figures
from fst_dspy.smollm2.corpus import SKILLS
from fst_dspy.smollm2.corpus.render import ADAPTERS, Tree, render
from fst_dspy.smollm2.figures import Score
from fst_dspy.smollm2.train import train
from fst_dspy.smollm2.training import Position, Recipe, Trainer
from fst_dspy.smollm2.trees import STEM, answer_losses, encode

LONG = 10_000
TINY = Recipe(steps=4, rows=2, rank=2, tokens=600, warmup_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # CPUs multiply bfloat16 slowly, and the rows are long.
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return save_model(tmp_path_factory.mktemp("tiny"), "llama", **small)


@pytest.fixture(scope="module")
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base)


def a_tree(reasoning: bool = True) -> Tree:
    exercise = SKILLS["rules"](Random("a tree 1"), False, reasoning)
    return render(exercise, ADAPTERS["chat"])


def test_a_row_has_the_tokens_of_the_chat_template(tokenizer) -> None:
    tree = a_tree()
    row = encode(tokenizer, tree, LONG)
    assert len(tree.branches) > 1 and int(row.branch_T.max()) == len(tree.branches)
    for number, branch in enumerate(tree.branches, start=1):
        chat = [{"role": m.role, "content": m.content} for m in (*tree.stem, *branch)]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        mine = (row.branch_T == STEM) | (row.branch_T == number)
        assert tokenizer.decode(row.ids_T[mine]) == text
        assert row.position_T[mine].tolist() == list(range(int(mine.sum())))
        taught = tokenizer.decode(row.ids_T[mine & row.taught_T & (row.branch_T == number)])
        assert taught == branch[1].content + tokenizer.eos_token
    short = encode(tokenizer, tree, 1)
    assert int(short.branch_T.max()) == 1


def test_branches_do_not_see_each_other(base: Path, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    tree = a_tree()
    with torch.no_grad():
        losses, _, branch = answer_losses(model, encode(tokenizer, tree, LONG))
        for number, alone in enumerate(tree.branches, start=1):
            own, _, own_branch = answer_losses(
                model, encode(tokenizer, Tree(tree.stem, (alone,)), LONG)
            )
            assert torch.allclose(losses[branch == number], own[own_branch == 1], atol=1e-4)


def test_demos_that_nothing_decides_are_not_taught(tokenizer) -> None:
    drawn = (SKILLS["rules"](Random(n), False, False) for n in range(400))
    shown = next(each for each in drawn if not each.learn_demos)
    row = encode(tokenizer, render(shown, ADAPTERS["xml"]), LONG)
    assert not row.taught_T[row.branch_T == STEM].any()
    given = {str(demo.outputs) for demo in shown.demos}
    assert {str(turn.outputs) for turn in shown.turns} <= given


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    whole = Trainer(base, TINY)
    start = [weight.detach().clone() for weight in whole.weights]
    whole.run(tmp_path / "whole.pt", 2, lambda run, loss: None)
    assert any(not torch.equal(a, b) for a, b in zip(start, whole.weights, strict=True))

    first = Trainer(base, TINY)
    for _ in range(2):
        first.advance()
    first.save(tmp_path / "half.pt")
    second = Trainer(base, TINY, threads=1)
    assert second.load(tmp_path / "half.pt") and second.position.step == 2
    second.run(tmp_path / "half.pt", 2, lambda run, loss: None)
    for one, other in zip(whole.weights, second.weights, strict=True):
        assert torch.equal(one, other)
    assert not Trainer(base, Recipe(**{**vars(TINY), "seed": 1})).load(tmp_path / "half.pt")


def test_it_learns_and_the_adapter_that_it_writes_says_the_same(base: Path, tmp_path: Path) -> None:
    trainer = Trainer(base, Recipe(steps=12, rows=2, rank=4, learning_rate=2e-2, tokens=300))
    before = trainer.held_out(4)
    losses = [trainer.advance() for _ in range(12)]
    assert losses[-1] < losses[0] and trainer.held_out(4).loss < before.loss
    trainer.write(tmp_path / "adapter")
    assert str(base) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().eval()
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        there = trainer.model.eval()(input_ids=ids_BT).logits.float()
        here = model(input_ids=ids_BT).logits.float()
    assert torch.nn.functional.cosine_similarity(there, here, dim=-1).min() > 0.99


class Answering:
    """Stands for a model: gives the answers it was made with, in the order they are asked for."""

    def __init__(self, tokenizer, answers: dict[str, str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers

    def eval(self) -> None: ...

    def generate(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        asked = self.tokenizer.batch_decode(input_ids)
        said = [next(a for q, a in self.answers.items() if q in text) for text in asked]
        more = self.tokenizer(said, padding=True, padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, more["input_ids"]], dim=1)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_figures_count_what_is_right_and_what_is_parsed(tokenizer, adapter: str) -> None:
    setting = figures.Setting("rules", adapter, True)
    asked = [SKILLS["rules"](Random(f"figures 3 {n}"), True, True) for n in range(3)]
    answers = {}
    for each, kind in zip(asked, ("right", "wrong", "unreadable"), strict=True):
        outputs = dict(each.turns[0].outputs)
        if kind == "wrong":
            outputs = dict.fromkeys(outputs, "nothing")
        text = ADAPTERS[adapter].format_assistant_message_content(each.signature, outputs)
        (question,) = each.turns[0].inputs.values()
        answers[question] = "I do not know" if kind == "unreadable" else text
    score = figures.measure(Answering(tokenizer, answers), tokenizer, setting, 3, seed=3)
    types = [list(each.signature.output_fields.values())[-1].annotation for each in asked]
    read = 1 + (types[1] is str)  # what is not among a Literal's options is not parsed
    assert score == figures.Score(1 / 3, read / 3, 3)


def test_perplexity_is_that_of_the_texts(tokenizer) -> None:
    texts = figures.english()
    assert len(texts) == figures.PARAGRAPHS == len(set(texts))

    def knows_nothing(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], len(tokenizer)))

    found = figures.perplexity(knows_nothing, tokenizer, texts[:3])
    assert found == pytest.approx(len(tokenizer))


class Loaded:
    """In the place of a model, with an adapter and without."""

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> Loaded:
        return cls()

    def merge_and_unload(self) -> Loaded:
        return self


def test_figures_are_of_one_seed_number_and_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def measure(model: object, tokenizer: object, setting: object, count: int, seed: int) -> Score:
        asked.append((count, seed))
        return Score(0.5, 1.0, count)

    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(figures, name, Loaded)
    monkeypatch.setattr(figures.peft, "PeftModel", Loaded)
    monkeypatch.setattr(figures.smollm2, "fetch", str)
    monkeypatch.setattr(figures.os, "nice", int)
    monkeypatch.setattr(figures, "perplexity", lambda *_: 1.0)
    monkeypatch.setattr(figures, "measure", measure)
    out, folders = tmp_path / "figures.json", (tmp_path / "one", tmp_path / "other")
    for folder in folders:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(folder.name)
    threads = torch.get_num_threads()
    for which in ("without", "with", "without,with"):  # the third has nothing left to do
        figures.main(folders[0], out, 12, 1, which, threads)
    assert asked == [(12, 1)] * 2 * len(figures.SETTINGS)
    before = out.read_text()
    assert json.loads(before).keys() == {"seed", "questions", "adapter", "without", "with"}
    for adapter, count, seed in ((folders[0], 12, 7), (folders[0], 48, 1), (folders[1], 12, 1)):
        with pytest.raises(typer.BadParameter, match="holds figures of"):
            figures.main(adapter, out, count, seed, "with", threads)
    assert out.read_text() == before


def test_the_command_goes_on_and_writes_what_it_did(base: Path, tmp_path: Path) -> None:
    for steps in (1, 2):
        recipe = replace(TINY, steps=steps)
        folder = train(base, tmp_path, recipe, threads=2, every=1, held_out=2)
        made = json.loads((folder / "training.json").read_text())
        assert made["step"] == made["recipe"]["steps"] == steps
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["tokens"] > lines[0]["tokens"] and lines[1]["held_out"] == made["held_out"]
    assert (folder / "adapter_model.safetensors").exists()


def test_a_run_goes_on_from_an_adapter_whose_checkpoint_is_gone(base: Path, tmp_path: Path) -> None:
    first = train(base, tmp_path / "first", replace(TINY, steps=2), 1, every=1, held_out=2)
    before = json.loads((first / "training.json").read_text())
    later = replace(TINY, steps=4)
    folder = train(base, tmp_path / "more", later, 1, every=1, held_out=2, adapter=first)
    made = json.loads((folder / "training.json").read_text())
    assert made["step"] == 4 and made["went_on_from"] == before
    assert made["recipe"]["start"] == 2 and made["tokens"] > before["tokens"]

    trainer = Trainer(base, replace(later, start=2))
    trainer.begin_from(first, Position(step=2))
    assert trainer.held_out(2).loss == pytest.approx(before["held_out"]["loss"], rel=0.05)
    assert trainer.recipe.rate(2) < trainer.recipe.learning_rate  # it rises behind the start
    lines = [json.loads(line) for line in (tmp_path / "more/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
