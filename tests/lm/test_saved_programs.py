"""Programs that DSPy saved: by an older fst_dspy, as JSON, and as a pickle."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import dspy
import pytest
import torch

import fst_dspy
from fst_dspy import LocalLM
from fst_dspy.errors import ModelError
from fst_dspy.tasks import load_task

ROOT = Path(fst_dspy.__file__).parent.parent
DATA = next(p / "data" for p in Path(__file__).parents if (p / "data").is_dir())


def move(policy):
    """Train it, as it were."""
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)


def in_a_fresh_process(script, *arguments, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def lm(tiny_qwen3):
    return LocalLM(str(tiny_qwen3), temperature=0.0, max_tokens=8, cache=False)


# --- names ----------------------------------------------------------------------------------------


def test_saved_programs_do_not_tell_where_the_code_lies(lm):
    state = lm.dump_state()
    assert state["_dspy_lm_class"] == "fst_dspy.LocalLM"
    assert state["engine"]["class"] == "fst_dspy:LocalEngine"
    assert state["async_engine"]["class"] == "fst_dspy:AsyncLocalEngine"


def test_the_public_names_are_all_there_and_no_others():
    assert dir(fst_dspy) == sorted(fst_dspy.__all__)
    for name in dir(fst_dspy):
        assert not name.startswith("_") and getattr(fst_dspy, name) is not None


@pytest.mark.slow
def test_a_program_saved_before_the_modules_moved_gives_the_same_answers(tmp_path):
    """Written at commit 3754549; it does not hold the weights, which have changed since."""
    folder = DATA / "saved_before_lm"
    text = (folder / "program.json").read_text()
    assert '"fst_dspy.local_lm.LocalLM"' in text
    program = load_task("triage", 0).program
    with pytest.raises(ModelError, match="whose files now hold"):
        program.load(folder / "program.json", allow_unsafe_lm_state=True)
    today = tmp_path / "program.json"
    today.write_text(text.replace("embedded@01e3277c5650", LocalLM("embedded").version))
    program.load(today, allow_unsafe_lm_state=True)
    assert type(program.predict.lm) is LocalLM
    plain = load_task("triage", 0).program
    saved = json.loads(text)["predict"]["signature"]
    texts = plain.predict.signature.with_instructions(saved["instructions"])
    plain.predict.signature = texts
    for written in json.loads((folder / "answers.json").read_text()):
        found = program(ticket=written["ticket"])
        with dspy.context(lm=LocalLM("embedded", **program.predict.lm.kwargs)):
            expected = plain(ticket=written["ticket"])
        assert dict(found.items()) == dict(expected.items())


# --- pickles --------------------------------------------------------------------------------------

READ_PICKLES = """
import json, sys
import dspy
for folder in sys.argv[1:]:
    try:
        program = dspy.load(folder, allow_pickle=True)
        print(json.dumps([program.lm.model, program.lm("hi"), program.lm.provider.finetunable]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def saved_whole(lm, folder):
    program = dspy.Predict("question -> answer")
    program.lm = lm
    program.save(folder, save_program=True)
    return folder


def test_a_whole_program_is_found_elsewhere_but_for_trained_weights(lm, tmp_path):
    from tiny_models import save_model

    folders = [saved_whole(lm, tmp_path / "base")]
    assert (folders[0] / "program.pkl").stat().st_size < 20_000  # names, no weights
    for name, live in (("kept", False), ("live", True)):
        # Of weights of its own: a policy that another test leaves alive may hold the very same.
        model = save_model(tmp_path / f"{name}-model", "qwen3", seed=7 + live)
        own = LocalLM(str(model), temperature=0.0, max_tokens=8, cache=False)
        move(own.policy)
        trained = own.live() if live else own.at(own.policy.keep())
        folders.append(saved_whole(trained, tmp_path / name))
        here = dspy.load(folders[-1], allow_pickle=True)
        assert here.lm.policy is own.policy and here.lm.model == trained.model
        assert here.lm("hi") == trained("hi") != own("hi")
    done = in_a_fresh_process(READ_PICKLES, *folders, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 3 and found[0] == [lm.model, lm("hi"), True]
    for error, said in found[1:]:
        assert error == "ModelError" and "fst_dspy.save" in said


def test_what_is_saved_without_the_trained_weights_says_so_once(lm, tiny_qwen3, tmp_path, caplog):
    program = dspy.ReAct("question -> answer", tools=[])
    program.set_lm(lm)
    program.save(tmp_path / "base.json")
    assert "trained weights" not in caplog.text
    own = LocalLM(str(tiny_qwen3))
    move(own.policy)
    program.set_lm(own.at(own.policy.keep()))
    program.save(tmp_path / "trained.json")
    program.deepcopy().save(tmp_path / "whole", save_program=True)
    assert caplog.text.count("does not hold them") == 1
    fst_dspy.save(program, tmp_path / "bundle")
    assert caplog.text.count("does not hold them") == 1


def test_a_pickled_language_model_is_whole(lm):
    lm("hi")
    warm = lm.copy(temperature=0.5, stop=["x"])
    for dumped in (pickle.dumps((lm, warm, lm)), cloudpickle.dumps((lm, warm, lm))):
        one, other, again = pickle.loads(dumped)
        assert one is again and type(one) is LocalLM
        assert one.policy is other.policy and one.engine is other.engine
        assert other.kwargs == warm.kwargs and other.cache is warm.cache is False
        assert one("hi") == lm("hi") == asyncio.run(one.acall("hi"))
        assert one.history and one.provider.policy is one.policy
        before = one("hi")
        move(one.policy)
        assert one("hi") == before  # it goes on with what it names


def test_files_that_changed_are_noticed_by_a_pickle(lm, tiny_qwen3, tmp_path):
    from tiny_models import save_model

    model = save_model(tmp_path / "model", "qwen3")
    dumped = pickle.dumps(LocalLM(str(model)))
    gc.collect()
    save_model(model, "qwen3", seed=1)
    with pytest.raises(ModelError, match="whose files now hold"):
        pickle.loads(dumped)


def test_copies_share_what_they_did(lm):
    deep, shallow = copy.deepcopy(lm), copy.copy(lm)
    for copied in (deep, shallow):
        assert copied is not lm and copied.policy is lm.policy
        assert copied.engine is lm.engine and copied.provider is lm.provider
    assert deep.kwargs is not lm.kwargs and shallow.kwargs is lm.kwargs
    pair = copy.deepcopy([lm, lm])
    assert pair[0] is pair[1]
    move(lm.policy)
    trained = lm.at(lm.policy.keep())
    lm.policy.restore(lm.policy.base_version)
    lm.policy.forget(trained.model)
    assert copy.deepcopy(trained).model == trained.model  # a copy asks for nothing


def test_a_provider_of_the_users_own_goes_along(lm):
    lm.provider = dspy.clients.provider.Provider()
    lm.provider.mark = "mine"
    assert pickle.loads(pickle.dumps(lm)).provider.mark == "mine"
