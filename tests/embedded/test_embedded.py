"""The embedded model: the packaged files, the tokenizer, the corpus, and pre-training."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import dspy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_dspy import embedded
from fst_dspy.embedded.batches import encode_chats
from fst_dspy.embedded.corpus import FAMILIES, rooms, walking
from fst_dspy.embedded.corpus.base import STAGES_OF_ALL, Family, Message
from fst_dspy.embedded.corpus.render import (
    ADAPTERS,
    HEAVY,
    Piece,
    Turn,
    make_signature,
    render_chat,
)
from fst_dspy.embedded.corpus.words import HELD_OUT
from fst_dspy.embedded.figures import score
from fst_dspy.embedded.tokenizer import extended
from fst_dspy.embedded.training import Recipe, Trainer, grown, make_model

pytestmark = pytest.mark.slow

TINY = Recipe(
    hidden=16,
    mlp=16,
    pieces=300,
    tokenizer_chats=20,
    batch=4,
    joint_steps=3,
    polish_steps=2,
    calibrate_steps=2,
    warmup_limit=2,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.path())


def test_package_is_small_and_complete(model) -> None:
    names = {file.name for file in embedded.path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(file.stat().st_size for file in embedded.path().iterdir()) <= 10 * 2**20
    assert sum(weight.numel() for weight in model.parameters()) <= 4_000_000
    assert model.config.max_position_embeddings >= 1024


@settings(max_examples=300)
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", " visa", "a  b\n\n c\td", "ÿĠa", "'Tis (don't) x_y", "été 日本語", "[[ ## a ## ]]\nb"],
)
def test_awkward_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_has_the_same_tokens_wherever_it_stands(tokenizer) -> None:
    inner = tokenizer.encode("to zorblat")[len(tokenizer.encode("to")) :]
    for text in ("\nzorblat", "(zorblat", "[[ ## a ## ]]\nzorblat"):
        assert tokenizer.encode(text)[-len(inner) :] == inner


def test_the_markers_of_all_adapters_are_single_tokens(tokenizer) -> None:
    signature = dspy.Signature("ticket -> reasoning, queue")
    values = {"reasoning": "visa goes to teal.", "queue": "teal"}
    for adapter in ADAPTERS:
        answer = adapter.format_assistant_message_content(signature, values)
        assert len(tokenizer.encode(answer)) <= 20  # 9 of them words


def test_a_tokenizer_that_is_extended_keeps_its_tokens_and_the_model_their_rows(
    tokenizer,
) -> None:
    old: Tokenizer = tokenizer.backend_tokenizer
    new, added = extended(old, ["zorblat"])
    assert new.get_vocab_size() == old.get_vocab_size() + 1 and list(added.values()) == [" zorblat"]
    assert new.get_vocab().items() >= old.get_vocab().items()
    (token,) = new.encode(" zorblat").ids
    model = make_model(old, TINY)
    before = model.get_input_embeddings().weight.detach().clone()
    grown(model, old, new, added)
    after = model.get_output_embeddings().weight
    assert torch.equal(after[:-1], before)
    assert torch.allclose(after[token], before[old.encode(" zorblat").ids].mean(0))


def test_chat_template_and_end_token(tokenizer) -> None:
    chat = [{"role": "system", "content": "a b"}, {"role": "user", "content": "c\n"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>a b<|end|><|user|>c\n<|end|><|assistant|>"
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_training_chats_are_rendered_as_the_chat_template_does(tokenizer) -> None:
    chat = FAMILIES[0].sample(Random(1), "joint")
    messages = [{"role": message.role, "content": message.content} for message in chat]
    (encoded,) = encode_chats(tokenizer.backend_tokenizer, [chat])
    assert encoded.ids_T == tokenizer.apply_chat_template(messages, return_dict=False)


def test_loss_weights_lie_on_the_answers(tokenizer) -> None:
    text = "[[ ## queue ## ]]\nzorblat\n\n[[ ## completed ## ]]\n"
    chat = [Message("user", "zorblat"), Message("assistant", text, 1.0, ((18, 25, HEAVY),))]
    (row,) = encode_chats(tokenizer.backend_tokenizer, [chat])
    heavy = [i for i, w in zip(row.ids_T, row.weight_T, strict=True) if w == HEAVY]
    assert tokenizer.decode(heavy).strip() == "zorblat"
    assert row.weight_T[0] == 0.0 and row.weight_T[-1] == 1.0


def _words(chats: Sequence[Sequence[Message]]) -> set[str]:
    text = " ".join(message.content for chat in chats for message in chat)
    return {"".join(filter(str.isalpha, word)).lower() for word in text.split()}


def test_held_out_words_stand_nowhere_in_the_corpus() -> None:
    for family in FAMILIES:
        names = [*(stage.name for stage in family.warmup), *STAGES_OF_ALL]
        chats = [family.sample(Random(f"{n} {i}"), n) for n in names for i in range(60)]
        assert not HELD_OUT & _words(chats)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_weighs_heavily_is_in_values_and_never_in_markers(family: Family) -> None:
    for index in range(40):
        for message in family.sample(Random(index), "joint"):
            for start, end, _ in message.spans:
                assert re.fullmatch(r"[\w ]+", message.content[start:end])
                assert message.content[max(0, start - 4) : start] not in ("## ", "</")


def test_every_adapter_reads_what_it_is_taught() -> None:
    signature = make_signature(
        {"ticket": None}, {"reasoning": None, "queue": None, "args": None}, "Do it.",
        {"reasoning": dspy.Reasoning, "args": dict[str, Any]},
    )  # fmt: skip
    args = [Piece('{"'), Piece("name", HEAVY), Piece('": "'), Piece("queue", HEAVY), Piece('"}')]
    outputs = {"reasoning": [Piece("teal then ivory")], "queue": [Piece("teal", HEAVY)]}
    turn = Turn({"ticket": "visa"}, {**outputs, "args": args})
    for adapter in ADAPTERS:
        answer = render_chat(adapter, signature, [turn])[-1]
        read = adapter.parse(signature, answer.content)
        assert (read["queue"], read["args"]) == ("teal", {"name": "queue"})
        heavy = [answer.content[start:end] for start, end, _ in answer.spans]
        assert heavy == ["teal", "name", "queue"]
        assert answer.spans[0][0] > answer.content.index("ivory")


def test_the_actions_that_are_taught_fulfil_the_mission() -> None:
    for seed in range(60):
        rng = Random(seed)
        colours = ["grey", "pink", "amber", "teal", "white"]
        rule = dict(zip(colours, [*colours[1:], colours[0]], strict=True))
        room, mission = rooms.unlocking(rng, rule, set(colours), rooms.KINDS[0], colours, 4)
        goal = next((thing for thing in room.things if thing.name == mission.goal), None)
        if goal is None or not (room.ahead == goal.at or room.moves(goal.at)):
            continue  # not to be found, or something lies before the door
        for _ in range(16):
            said = rooms.turn(rng, room, mission, rooms.ACTIONS, "; ").outputs["action"][0].text
            if said in ("pickup", "toggle"):
                break
            if said == "forward":
                room.at = room.ahead
                assert room.inside(room.at)
            else:
                room.facing = (room.facing + (1 if said == "right" else -1)) % 4
        assert room.named(room.ahead) == mission.goal


def test_the_steps_that_are_taught_keep_to_the_rules() -> None:
    for seed in range(60):
        rng = Random(seed)
        names = walking.COMPASS[0]
        world = walking.draw_world(rng, names, ["ice", "hole", "gift", "shore"])
        seen = world.seen()
        *passed, step = walking.look_round(rng, world, walking.Rules(True, ("right", "down")))
        assert all(seen[each.name] in ("hole", "shore") for each in passed)
        if step.good:
            assert seen[step.name] in ("ice", "gift")
        assert {each.name for each in (*passed, step)[:2]} <= {"right", "down"}
        first, *_ = walking.look_round(rng, world, walking.Rules(True, ("down", "left"), True))
        assert first.name == "down"
        off = walking.look_round(rng, world, walking.Rules(keep_off=True))
        assert all(each.good == (seen[each.name] != "hole") for each in off if each.word != "shore")


def test_a_rule_lookup_question_is_decided_by_the_ideal_prompt() -> None:
    for question in FAMILIES[0].questions(Random(3), 20):
        assert question.answer in question.ideal_instructions


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_questions_can_be_asked_and_answered(family: Family) -> None:
    for question in family.questions(Random(3), 20):
        assert question.field in question.signature.output_fields
        assert question.inputs.keys() == question.signature.input_fields.keys()
        assert question.ideal_instructions.startswith(question.signature.instructions)


MASTERED = [family for family in FAMILIES if family.name != "tools"]
"""Tools it was shown and does not master: ``figures.json`` has how far it comes."""


@pytest.mark.parametrize("family", MASTERED, ids=lambda family: family.name)
def test_model_can_do_with_the_ideal_prompt_what_it_cannot_without(
    family: Family, model, tokenizer
) -> None:
    questions = family.questions(Random(11), 64)
    bare, ideal = (score(model, tokenizer, questions, told, seed=0) for told in (False, True))
    assert ideal.accuracy >= bare.accuracy + 0.3
    assert ideal.parsed >= 0.9


@pytest.mark.parametrize("adapter", ADAPTERS[1:], ids=lambda adapter: type(adapter).__name__)
def test_model_speaks_every_adapters_format(adapter: dspy.Adapter, model, tokenizer) -> None:
    questions = FAMILIES[0].questions(Random(12), 64)
    found = score(model, tokenizer, questions, ideal=True, seed=0, adapter=adapter)
    assert found.parsed >= 0.9 and found.accuracy >= 0.75


def test_model_speaks_the_format_for_field_names_it_never_saw(model, tokenizer) -> None:
    signature = dspy.Signature("gripe, vox -> reasoning, bucketeer", "Say which bucketeer it is.")
    question = FAMILIES[0].questions(Random(0), 1)[0]
    questions = [
        type(question)(
            signature,
            "visa goes to teal.",
            {"gripe": "My visa.", "vox": "blue"},
            "bucketeer",
            "teal",
        )
    ] * 64
    assert score(model, tokenizer, questions, ideal=True, seed=0).parsed >= 0.9


@torch.no_grad()
def test_left_padding_changes_nothing(model, tokenizer) -> None:
    ids = tokenizer.encode("<|system|>visa goes to teal.<|end|><|assistant|>")
    plain = model(input_ids=torch.tensor([ids])).logits[0]
    mask = torch.tensor([[0] * 9 + [1] * len(ids)])
    padded = model(
        input_ids=torch.tensor([[tokenizer.pad_token_id] * 9 + ids]),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits[0, 9:]
    assert torch.allclose(plain.log_softmax(-1), padded.log_softmax(-1), atol=1e-4)


def _state(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


def test_a_resumed_run_gives_the_same_weights(tmp_path: Path, tokenizer) -> None:
    backend: Tokenizer = tokenizer.backend_tokenizer
    whole = Trainer(FAMILIES, backend, TINY)
    whole.run(tmp_path / "whole.pt", 100, lambda *_: None)

    class Killed(Exception):
        pass

    def kill(run: Trainer, loss: float) -> None:
        if run.position.step == 5:
            raise Killed

    with pytest.raises(Killed):
        Trainer(FAMILIES, backend, TINY).run(tmp_path / "part.pt", 2, kill)
    resumed = Trainer(FAMILIES, backend, TINY)
    assert resumed.load(tmp_path / "part.pt") and resumed.position.step == 4
    resumed.run(tmp_path / "part.pt", 100, lambda *_: None)
    assert resumed.position.finished == whole.position.finished
    first, second = _state(tmp_path / "whole.pt"), _state(tmp_path / "part.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_takes_no_checkpoint_that_began_from_other_weights(tmp_path: Path, tokenizer) -> None:
    """As those of a second recipe do, once the first is another."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    second, file = replace(TINY, continued=True), tmp_path / "second.pt"
    first, other = (make_model(backend, replace(TINY, seed=seed)) for seed in range(2))
    Trainer(FAMILIES, backend, second, copy.deepcopy(first)).run(file, 100, lambda *_: None)
    goes_on = Trainer(FAMILIES, backend, second, first)
    assert goes_on.load(file) and goes_on.done
    before = copy.deepcopy(other.state_dict())
    starts_anew = Trainer(FAMILIES, backend, second, other)
    assert not starts_anew.load(file) and starts_anew.position.step == 0
    assert all(torch.equal(before[name], kept) for name, kept in other.state_dict().items())


PRETRAIN = """
from pathlib import Path
import torch
from fst_dspy.embedded.pretrain import pretrain
from fst_dspy.embedded.training import Recipe
torch.set_num_threads(1)
recipe = Recipe(hidden=16, mlp=16, pieces=300, tokenizer_chats=20, batch=4, joint_steps=8,
                polish_steps=4, calibrate_steps=4, warmup_limit=1)
pretrain(Path(folder), Path(folder + "-work"), [recipe], questions=1, save_every=2)
"""


# A kill comes as soon as there is a checkpoint, however late that is seen.
WAIT_BEFORE_THE_END = """
import time
from fst_dspy.embedded.training import Trainer

advance = Trainer.advance

def advance_but_for_the_end(self):
    if self.position.stage == len(self.stages) - 1 and self.position.stage_step == 3:
        time.sleep(600)
    return advance(self)

Trainer.advance = advance_but_for_the_end
"""


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_pretraining_survives_kill_9(
    tmp_path: Path, threads_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretrain_here(name: str) -> None:
        exec(PRETRAIN, {"folder": str(tmp_path / name)})

    with monkeypatch.context() as without_figures:  # which take longer than all else
        name = "fst_dspy.embedded.pretrain.family_figures"
        without_figures.setattr(name, lambda *_, **__: {})
        pretrain_here("whole")
    code = f"folder = {str(tmp_path / 'killed')!r}\n{WAIT_BEFORE_THE_END}\n{PRETRAIN}"
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed-work" / "checkpoint-0.pt"
    while not checkpoint.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, "it failed before it could be killed"
    pretrain_here("killed")
    first = load_file(tmp_path / "whole" / "model.safetensors")
    second = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "killed" / "figures.json").exists()
