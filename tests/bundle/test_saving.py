"""Bundles: what is saved is what is loaded, elsewhere and later; what was tampered with is not."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import cloudpickle
import dspy
import pytest
import torch
from bundles import SETTINGS, adapted, answers, compile_greedy, read_manifest, seal
from helpers import Echo, RawAdapter, Twice, questions, vowels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import ROOT, SUPPORT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fst_dspy
from fst_dspy import FST, LocalLM
from fst_dspy.errors import FSTError, ModelError, ProgramError, StoreError

pytestmark = pytest.mark.slow

FRESH = """
import json, sys
from bundles import answers
from helpers import Echo
for path in sys.argv[1:3]:  # before any weights have been read
    program = Echo()
    try:
        program.load(path, allow_unsafe_lm_state=True)
        print(json.dumps(answers(program, 5)))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
import fst_dspy
for folder, base in zip(sys.argv[3::2], sys.argv[4::2]):
    program = fst_dspy.load(folder, Echo(), base=base or None)
    print(json.dumps([program.say.lm.model, answers(program)]))
"""


@pytest.fixture(scope="module")
def lora_bundle(tiny_qwen3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "lora"
    fst_dspy.save(adapted(tiny_qwen3), folder)
    return folder


@pytest.fixture(scope="module")
def compiled_full(tiny_llama):
    return compile_greedy(str(tiny_llama), track_stats=False)


@pytest.fixture(scope="module")
def full_bundle(compiled_full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "full"
    compiled_full.save(folder)
    return folder


@pytest.fixture
def tampered(lora_bundle, tmp_path):
    return Path(shutil.copytree(lora_bundle, tmp_path / "bundle"))


def in_a_fresh_process(script, *arguments, cwd):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


# --- save, load -----------------------------------------------------------------------------------


def bundled_elsewhere(model, lora, here, there):
    """A bundle that was moved, the base it needs, and the version and answers to expect.

    Nothing is left of the model where it was.
    """
    if model == "embedded":
        compiled = adapted(model)  # to compile on it takes long
    else:
        model = shutil.copytree(model, here / "model")
        compiled = compile_greedy(str(model), lora)
    expected = [compiled.say.lm.model, answers(compiled)]
    # What the packaged model makes of these questions is its own affair.
    assert len(set(expected[1])) > 2 or model == "embedded"
    fst_dspy.save(compiled, here / "bundle")
    there.mkdir()
    bundle = shutil.move(here / "bundle", there / "renamed")
    assert str(here) not in "".join(path.read_text() for path in bundle.rglob("*.json"))
    base = shutil.move(model, there / "base") if model != "embedded" and lora else ""
    shutil.rmtree(here)
    return (bundle, base), expected


def test_a_fresh_process_elsewhere_gives_the_same_answers(
    tiny_qwen3, tiny_llama, compiled_full, full_bundle, tmp_path
):
    """From bundles; and DSPy's own ``load`` finds the weights of a bundle, of nothing else."""
    loaded = fst_dspy.load(full_bundle)
    loaded.save(tmp_path / "loaded.json")
    compiled_full.save(tmp_path / "compiled.json")
    cases = [
        bundled_elsewhere(model, lora, tmp_path / f"here-{n}", tmp_path / f"there-{n}")
        for n, (model, lora) in enumerate(
            [
                (tiny_qwen3, {"rank": 4}),
                (tiny_llama, False),
                ("embedded", {"rank": 4}),
            ]
        )
    ]
    arguments = [argument for bundle_and_base, _ in cases for argument in bundle_and_base]
    states = (tmp_path / "loaded.json", tmp_path / "compiled.json")
    done = in_a_fresh_process(FRESH, *states, *arguments, cwd=tmp_path / "there-0")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    of_bundle, of_compiled, *found = lines
    assert of_bundle == answers(loaded, 5)
    error, said = of_compiled
    assert error == "ModelError" and "fst_dspy.load" in said
    assert found == [expected for _, expected in cases]
    assert all(len(texts) == 20 for _, texts in found)


def test_a_lora_bundle_holds_the_adapter_alone_and_the_outcome(tiny_qwen3, tmp_path):
    compiled = compile_greedy(str(tiny_qwen3), {"rank": 4})
    fst_dspy.save(compiled, tmp_path / "bundle")
    bundle = tmp_path / "bundle"
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*")}
    assert "adapter.safetensors" in names and "model/model.safetensors" not in names
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest["schema_version"] == 1 and manifest["versions"]["dspy"] == "3.4.1"
    assert manifest["weights"]["base"] == {
        "source": "folder",
        "id": "tiny-qwen3",
        "version": LocalLM(str(tiny_qwen3)).model,
    }
    result = compiled.detailed_results
    assert manifest["run"]["seed"] == result.seed
    assert manifest["run"]["metrics"]["best_val_score"] == result.best.score
    assert set(manifest["files"]) == {n for n in names if "." in n} - {"manifest.json"}
    population = json.loads((tmp_path / "bundle" / "population.json").read_text())["population"]
    assert population["score_K_V"] and all("parent_ids" in c for c in population["candidates"])
    loaded = fst_dspy.load(tmp_path / "bundle", base=tiny_qwen3)
    assert loaded.detailed_results == result
    assert loaded.say.lm.version == compiled.say.lm.model
    assert loaded.say.lm.kwargs == compiled.say.lm.kwargs
    assert loaded.say.signature.instructions == compiled.say.signature.instructions


def test_a_loaded_program_is_saved_and_trained_like_any_other(full_bundle, tmp_path):
    loaded = fst_dspy.load(full_bundle)
    loaded.save(tmp_path / "again")  # weights that are unchanged, but of a folder: kept whole
    again = fst_dspy.load(tmp_path / "again")
    assert again.say.lm.model == loaded.say.lm.model
    assert answers(again, 5) == answers(loaded, 5)
    assert loaded.detailed_results.population == again.detailed_results.population


def test_what_was_compiled_again_is_saved_with_what_that_came_to(tiny_qwen3, tmp_path):
    one = {**SETTINGS, "max_cycles": 1, "first_cycle_iterations": 1}
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        sets = {"trainset": questions(6), "valset": questions(4, 6)}
        first = FST(vowels, track_stats=True, **one).compile(Echo(), **sets)
        again = FST(vowels, seed=3, **one).compile(first, **sets)
    assert not hasattr(again, "detailed_results") and first.detailed_results.seed == 0
    again.save(tmp_path / "again")
    assert fst_dspy.load(tmp_path / "again", Echo()).detailed_results.seed == 3
    fst_dspy.save(adapted(tiny_qwen3), tmp_path / "plain")
    plain = fst_dspy.load(tmp_path / "plain", first, base=tiny_qwen3)
    assert not hasattr(plain, "detailed_results")


def test_the_folder_is_a_dspy_state_too(full_bundle):
    program = Echo()
    program.load(full_bundle / "program.json")
    loaded = fst_dspy.load(full_bundle)
    assert program.say.signature.instructions == loaded.say.signature.instructions


def test_saving_leaves_live_weights_as_they_are(tiny_qwen3, tmp_path):
    program = adapted(tiny_qwen3)
    lm = program.say.lm
    expected = answers(program, 5)
    lm.policy.restore(lm.policy.base_version)
    live = lm.policy.version()
    fst_dspy.save(program, tmp_path / "bundle")
    assert lm.policy.version() == live == lm.policy.base_version
    assert answers(fst_dspy.load(tmp_path / "bundle", base=tiny_qwen3), 5) == expected


def test_predictors_keep_their_own_settings_and_foreign_models(tiny_qwen3, tmp_path):
    program = Twice()
    lm = LocalLM(str(tiny_qwen3), temperature=0.5, max_tokens=9)
    program.first.lm, program.second.lm = lm, dspy.LM("openai/other", api_key="secret")
    program.first.demos = [dspy.Example(question="ü", draft="\ud800")]
    fst_dspy.save(program, tmp_path / "bundle")
    assert "secret" not in "".join(p.read_text() for p in (tmp_path / "bundle").glob("*.json"))
    given_one = Twice()
    given_one.second.lm = dspy.LM("openai/mine")
    loaded = fst_dspy.load(tmp_path / "bundle", given_one)
    assert loaded.first.lm.kwargs == lm.kwargs and loaded.second.lm.model == "openai/mine"
    assert dict(loaded.first.demos[0]) == {"question": "ü", "draft": "\ud800"}
    assert given_one.first.lm is None and given_one.first.demos == []


# --- program.save ---------------------------------------------------------------------------------


def test_dspys_own_save_and_load_work(compiled_full, tmp_path):
    path = tmp_path / "program.json"
    compiled_full.save(path)
    assert json.loads(path.read_text())["say"]["lm"]["model"] == compiled_full.say.lm.model
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        Echo().load(path)
    here = Echo()
    here.load(path, allow_unsafe_lm_state=True)
    assert here.say.lm.policy is compiled_full.say.lm.policy
    assert answers(here, 5) == answers(compiled_full, 5)


def test_copies_of_a_compiled_program_save_themselves(compiled_full, tmp_path):
    copied = compiled_full.deepcopy()
    copied.say.signature = copied.say.signature.with_instructions("Changed.")
    copied.save(tmp_path / "bundle")
    copied.save(tmp_path / "program.json")
    assert fst_dspy.load(tmp_path / "bundle").say.signature.instructions == "Changed."
    assert "Changed." in (tmp_path / "program.json").read_text()
    assert compiled_full.say.signature.instructions != "Changed."
    bare = compiled_full.deepcopy()
    bare.say.lm = None
    again = cloudpickle.loads(cloudpickle.dumps(bare))
    with pytest.raises(ProgramError, match="LocalLM"):
        again.save(tmp_path / "without")


def piece_by_piece(program):
    program = program.deepcopy()
    program.lock = threading.Lock()
    return program.deepcopy()  # DSPy falls back to copying attribute by attribute


@pytest.mark.parametrize("copied_by", [copy.copy, piece_by_piece])
def test_a_copy_of_the_outside_alone_never_saves_the_original(
    compiled_full, full_bundle, copied_by, tmp_path
):
    copied = copied_by(compiled_full)
    copied.say = copy.copy(compiled_full.say)
    copied.say.signature = copied.say.signature.with_instructions("Changed.")
    copied.save(tmp_path / "bundle")
    copied.save(tmp_path / "program.json")
    loaded = fst_dspy.load(tmp_path / "bundle")
    assert loaded.say.signature.instructions == "Changed."
    assert loaded.detailed_results == fst_dspy.load(full_bundle).detailed_results
    assert "Changed." in (tmp_path / "program.json").read_text()
    assert compiled_full.say.signature.instructions != "Changed."


# --- writing --------------------------------------------------------------------------------------


def test_bundles_are_replaced_and_nothing_else_is(tiny_qwen3, lora_bundle, tmp_path):
    program = adapted(tiny_qwen3)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not overwritten"):
        fst_dspy.save(program, other)
    with pytest.raises(StoreError, match="is a file"):
        fst_dspy.save(program, other / "thesis.txt")
    with pytest.raises(StoreError, match="not overwritten"):
        fst_dspy.export(program, other)
    assert (other / "thesis.txt").read_text() == "years of work"
    bundle = Path(shutil.copytree(lora_bundle, tmp_path / "bundle"))
    (bundle / "notes.txt").write_text("which data this is of")
    with pytest.raises(StoreError, match="not overwritten"):
        fst_dspy.save(program, bundle)
    (bundle / "notes.txt").unlink()
    (bundle / "tools.json").write_text("{}")  # of a bundle of before
    program.say.signature = program.say.signature.with_instructions("New.")
    fst_dspy.save(program, bundle)
    assert not (bundle / "tools.json").exists()
    assert fst_dspy.load(bundle, base=tiny_qwen3).say.signature.instructions == "New."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "other"]


def test_a_save_that_fails_leaves_the_old_bundle(tiny_qwen3, tampered, monkeypatch):
    before = {p: p.read_bytes() for p in tampered.rglob("*") if p.is_file()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", lambda _: full(None, None))
    with pytest.raises(StoreError, match="No space left"):
        fst_dspy.save(adapted(tiny_qwen3), tampered)
    monkeypatch.undo()
    real = os.rename

    def second_fails(source, target):
        if Path(target) == tampered and Path(source).suffix == ".tmp":
            full(source, target)
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(StoreError, match="No space left"):
        fst_dspy.save(adapted(tiny_qwen3), tampered)
    assert {p: p.read_bytes() for p in tampered.rglob("*") if p.is_file()} == before
    assert [p.name for p in tampered.parent.iterdir()] == ["bundle"]


def test_programs_that_cannot_be_saved_say_why(tiny_qwen3, tiny_llama, tmp_path):
    with pytest.raises(ProgramError, match="no predictor"):
        fst_dspy.save(Echo(), tmp_path / "bundle")
    with pytest.raises(ProgramError, match=r"must be a dspy\.Module"):
        fst_dspy.save("program", tmp_path / "bundle")
    two = Twice()
    two.first.lm, two.second.lm = LocalLM(str(tiny_qwen3)), LocalLM(str(tiny_llama))
    with pytest.raises(ProgramError, match="different weights"):
        fst_dspy.save(two, tmp_path / "bundle")
    program = adapted(tiny_qwen3)
    program.say.demos = [dspy.Example(question=object(), answer="x")]
    with pytest.raises(ProgramError, match="not plain JSON"):
        fst_dspy.save(program, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# --- the base and the program ---------------------------------------------------------------------


def test_a_missing_or_different_base_is_named(lora_bundle, tiny_qwen3, tiny_llama, tmp_path):
    expected = LocalLM(str(tiny_qwen3)).model
    with pytest.raises(ModelError, match=rf"{expected}.*pass base="):
        fst_dspy.load(lora_bundle)
    with pytest.raises(ModelError, match=rf"{expected}.*no model folder"):
        fst_dspy.load(lora_bundle, base=tmp_path / "nowhere")
    with pytest.raises(ModelError, match=rf"{expected}, but .* holds tiny-qwen3@"):
        fst_dspy.load(lora_bundle, base=tiny_llama)
    moved = shutil.copytree(tiny_qwen3, tmp_path / "another-name")
    assert fst_dspy.load(lora_bundle, base=moved).say.lm.model.startswith("tiny-qwen3@")


def test_a_model_by_a_relative_path_is_the_same_from_another_folder(
    tiny_qwen3, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_qwen3.parent)
    program, policy = Echo(), LocalLM(tiny_qwen3.name).policy
    monkeypatch.chdir(tmp_path)
    program.say.lm = LocalLM(policy)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1)
    policy.step += 1
    with policy.at(policy.base_version):  # is read again
        assert policy.version() == policy.base_version
    policy.restore(policy.base_version)
    weights = read_manifest(fst_dspy.save(program, tmp_path / "bundle"))["weights"]
    assert weights["kind"] == "full" and weights["base"]["source"] == "folder"


def test_quantized_weights_are_left_to_their_base(tiny_qwen3, tmp_path):
    program = Echo()
    program.say.lm = LocalLM(str(tiny_qwen3))
    program.say.lm.policy.model.is_quantized = True
    weights = read_manifest(fst_dspy.save(program, tmp_path / "bundle"))["weights"]
    assert weights["kind"] == "base" and weights["base"]["source"] == "folder"
    with pytest.raises(ModelError, match="pass base="):
        fst_dspy.load(tmp_path / "bundle", Echo())
    loaded = fst_dspy.load(tmp_path / "bundle", Echo(), base=tiny_qwen3)
    assert loaded.say.lm.model == program.say.lm.model


def test_what_goes_wrong_with_a_model_is_not_told_of_the_folder(tiny_qwen3, tmp_path):
    program = adapted(shutil.copytree(tiny_qwen3, tmp_path / "model"))
    policy = program.say.lm.policy
    program.say.lm = program.say.lm.at(policy.base_version)
    policy.restore(policy.base_version)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1)
    policy.step += 1
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ModelError, match="cannot read the base weights again"):
        fst_dspy.save(program, tmp_path / "bundle")


def test_without_a_program_only_imported_classes_are_made(tampered, tiny_qwen3, tmp_path):
    manifest = read_manifest(tampered)
    marker = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')")
    sys.path.insert(0, str(tmp_path))
    try:
        for name, message in [
            ("evil_module:Program", "has not been imported"),
            ("os:system", "not a class of DSPy programs"),
            ("subprocess:Popen", "not a class of DSPy programs"),
            ("dspy:Predict", "without arguments"),
            ("helpers:Nothing", "not a class"),
            ("fst_dspy", "not a class"),
        ]:
            seal(tampered, {**manifest, "program": name})
            with pytest.raises(ProgramError, match=message):
                fst_dspy.load(tampered, base=tiny_qwen3)
            assert fst_dspy.load(tampered, Echo(), base=tiny_qwen3).say.lm is not None
    finally:
        sys.path.remove(str(tmp_path))
    assert not marker.exists()
    with pytest.raises(ProgramError, match="parameters"):
        fst_dspy.load(tampered, Twice(), base=tiny_qwen3)
    other = Echo()
    other.say = dspy.Predict("question, context -> answer")
    with pytest.raises(ProgramError, match="fields"):
        fst_dspy.load(tampered, other, base=tiny_qwen3)
    with pytest.raises(ProgramError, match="instance"):
        fst_dspy.load(tampered, Echo, base=tiny_qwen3)


# --- damage and malice ----------------------------------------------------------------------------


class Bomb:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def pickle_inside(bundle, manifest, marker):
    (bundle / "weights.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    manifest["files"]["weights.pkl"] = {}


def pickle_for_weights(bundle, manifest, marker):
    (bundle / "tokenizer" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    manifest["files"]["tokenizer/pytorch_model.bin"] = {}


def pickle_under_a_good_name(bundle, manifest, marker):
    (bundle / "adapter.safetensors").write_bytes(pickle.dumps(Bomb(marker)))


def code_inside(bundle, manifest, marker):
    (bundle / "tokenizer" / "tokenization.py").write_text(f"open({str(marker)!r}, 'w')")
    manifest["files"]["tokenizer/tokenization.py"] = {}


def code_asked_for(bundle, manifest, marker):
    path = bundle / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["nested"] = {"auto_map": {"AutoTokenizer": ["evil/repo--tokenization.Evil", None]}}
    path.write_text(json.dumps(config))


def parent_name(bundle, manifest, marker):
    shutil.copy(bundle / "adapter.safetensors", bundle.parent / "outside.safetensors")
    manifest["files"]["../outside.safetensors"] = {}


def absolute_name(bundle, manifest, marker):
    manifest["files"]["/etc/passwd"] = {}


def windows_name(bundle, manifest, marker):
    manifest["files"]["C:\\secrets.json"] = {}


def symlink_out(bundle, manifest, marker):
    outside = bundle.parent / "outside.safetensors"
    shutil.move(bundle / "adapter.safetensors", outside)
    (bundle / "adapter.safetensors").symlink_to(outside)


def symlinked_folder(bundle, manifest, marker):
    shutil.move(bundle / "tokenizer", bundle.parent / "outside")
    (bundle / "tokenizer").symlink_to(bundle.parent / "outside")


def pipe(bundle, manifest, marker):
    (bundle / "program.json").unlink()
    os.mkfifo(bundle / "program.json")


def unknown_file(bundle, manifest, marker):
    (bundle / "adapter_config.json").write_text("{}")


def missing_file(bundle, manifest, marker):
    (bundle / "program.json").unlink()


def adapter_left_out(bundle, manifest, marker):
    (bundle / "adapter.safetensors").unlink()
    del manifest["files"]["adapter.safetensors"]


def another_schema(bundle, manifest, marker):
    manifest["schema_version"] = 2


def another_shape(bundle, manifest, marker):
    path = bundle / "adapter.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    save_file({**tensors, name: torch.zeros(3, 4)}, path)


def another_rank(bundle, manifest, marker):
    manifest["weights"]["lora"]["rank"] = 4096


def one_tensor_less(bundle, manifest, marker):
    path = bundle / "adapter.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def another_value(bundle, manifest, marker):
    path = bundle / "adapter.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path)


def attribute_in_the_state(bundle, manifest, marker):
    path = bundle / "program.json"
    state = json.loads(path.read_text())
    state["say"]["forward"] = "replaced"
    path.write_text(json.dumps(state))


def model_in_the_state(bundle, manifest, marker):
    path = bundle / "program.json"
    state = json.loads(path.read_text())
    state["say"]["lm"] = {"model": "openai/x", "api_base": "http://evil"}
    path.write_text(json.dumps(state))


def base_by_path(bundle, manifest, marker):
    manifest["weights"]["base"] |= {"source": "hub", "id": "/etc"}


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (pickle_inside, "pickle"),
        (pickle_for_weights, "pickle"),
        (pickle_under_a_good_name, "damaged"),
        (code_inside, "is code"),
        (code_asked_for, "auto_map"),
        (parent_name, "leads out"),
        (absolute_name, "absolute"),
        (windows_name, "absolute"),
        (symlink_out, "symbolic link"),
        (symlinked_folder, "symbolic link"),
        (pipe, "not an ordinary file"),
        (unknown_file, "not a file of a bundle"),
        (missing_file, "lacks"),
        (adapter_left_out, "needs"),
        (another_schema, "schema version 2"),
        (another_shape, "other adapters|announced"),
        (another_rank, "4096 was announced"),
        (one_tensor_less, "other adapters"),
        (another_value, "come out as"),
        (attribute_in_the_state, "program.json"),
        (model_in_the_state, "program.json"),
        (base_by_path, "not the id"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hostile_bundle_is_refused_and_runs_nothing(
    tamper, message, tampered, tiny_qwen3, tmp_path
):
    marker, manifest = tmp_path / "ran", read_manifest(tampered)
    tamper(tampered, manifest, marker)
    seal(tampered, manifest)
    with pytest.raises(FSTError, match=message):
        fst_dspy.load(tampered, Echo(), base=tiny_qwen3)
    assert not marker.exists()


def test_what_the_system_leaves_in_a_bundle_is_passed_over(tampered, tiny_qwen3, tmp_path):
    for name in (".DS_Store", "tokenizer/._tokenizer.json", "Thumbs.db"):
        (tampered / name).write_bytes(b"Bud1")
    program = fst_dspy.load(tampered, Echo(), base=tiny_qwen3)
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / ".DS_Store").write_bytes(b"Bud1")
    for folder in (shown, tampered):  # a folder that was looked at is as empty, or a bundle
        program.save(folder)
        assert read_manifest(folder) and not (folder / ".DS_Store").exists()


def test_weights_of_another_shape_or_none_are_refused(full_bundle, tmp_path):
    bundle = Path(shutil.copytree(full_bundle, tmp_path / "bundle"))
    path, name = bundle / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    for changed in (
        {**tensors, name: torch.zeros(3, 3)},
        {n: t for n, t in tensors.items() if n != name},  # transformers would draw one at random
    ):
        save_file(changed, path, metadata={"format": "pt"})
        seal(bundle, read_manifest(bundle))
        with pytest.raises(FSTError, match=r"cannot load the model|come out as"):
            fst_dspy.load(bundle)


def test_every_damaged_or_shortened_file_is_noticed(lora_bundle, tiny_qwen3, tmp_path):
    for path in sorted(lora_bundle.rglob("*.*")):
        name = path.relative_to(lora_bundle)
        data = path.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damage in (data[:middle], b"", flipped):
            shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
            bundle = Path(shutil.copytree(lora_bundle, tmp_path / "bundle"))
            (bundle / name).write_bytes(damage)
            with pytest.raises(StoreError):
                fst_dspy.load(bundle, Echo(), base=tiny_qwen3)


def test_folders_that_are_no_bundles(tiny_llama, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path, tiny_llama):
        with pytest.raises(StoreError, match="bundle"):
            fst_dspy.load(folder, Echo())


# --- fuzzing --------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")])
WORDS = st.sampled_from(["", "..", "/etc/passwd", "../x", "full", "base", "lora", "hub"])
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
VALUES = NUMBERS | WORDS | JSON
FUZZ = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def paths_of(value, prefix=()):
    """Every place in a JSON value."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*prefix, key)
            yield from paths_of(child, (*prefix, key))


def mutated(data, value):
    """A copy with one place replaced, removed or added to."""
    changed = json.loads(json.dumps(value))
    *way, last = data.draw(st.sampled_from(list(paths_of(changed))))
    parent = changed
    for key in way:
        parent = parent[key]
    how = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "replace":
        parent[last] = data.draw(VALUES)
    elif how == "remove":
        del parent[last]
    elif isinstance(parent, dict):
        parent[data.draw(st.text(max_size=8) | WORDS)] = data.draw(VALUES)
    else:
        parent.append(data.draw(VALUES))
    return changed


def load_or_refuse(bundle, base):
    """The state and weights version of the loaded program; ``None`` when it was refused."""
    try:
        loaded = fst_dspy.load(bundle, Echo(), base=base)
    except FSTError:
        return None
    return {"say": {**loaded.say.dump_state(), "lm": None}}, loaded.say.lm


@FUZZ
@given(content=JSON)
def test_fuzz_arbitrary_manifests_are_refused(content, tampered, tiny_qwen3):
    (tampered / "manifest.json").write_text(json.dumps(content))
    assert load_or_refuse(tampered, tiny_qwen3) is None


@FUZZ
@given(data=st.data())
def test_fuzz_a_changed_manifest_is_refused_by_its_seal(data, lora_bundle, tampered, tiny_qwen3):
    manifest = read_manifest(lora_bundle)
    changed = mutated(data, manifest)
    (tampered / "manifest.json").write_text(json.dumps(changed))
    found = load_or_refuse(tampered, tiny_qwen3)
    if json.dumps(changed, sort_keys=True) == json.dumps(manifest, sort_keys=True):
        assert found is not None
    else:
        assert found is None


@FUZZ
@given(data=st.data())
def test_fuzz_a_sealed_manifest_loads_the_same_program_or_nothing(
    data, lora_bundle, tampered, tiny_qwen3
):
    manifest = read_manifest(lora_bundle)
    state = json.loads((lora_bundle / "program.json").read_text())
    changed = mutated(data, manifest)
    seal(tampered, changed, refresh=False)
    found = load_or_refuse(tampered, tiny_qwen3)
    if found is not None:
        loaded, lm = found
        assert loaded == {"say": state["say"]}
        assert lm.model == manifest["weights"]["version"]
        assert {**lm.kwargs, "cache": lm.cache} == changed["predictors"]["say"]["lm"]


@FUZZ
@given(data=st.data())
def test_fuzz_a_changed_program_loads_as_it_reads_or_not_at_all(
    data, lora_bundle, tampered, tiny_qwen3
):
    state = json.loads((lora_bundle / "program.json").read_text())
    changed = data.draw(st.one_of(JSON, st.just(state)))
    if changed is state:
        changed = mutated(data, state)
    (tampered / "program.json").write_text(json.dumps(changed))
    seal(tampered, read_manifest(lora_bundle))
    found = load_or_refuse(tampered, tiny_qwen3)
    if found is not None:
        assert json.dumps(found[0]["say"], sort_keys=True) == json.dumps(
            changed["say"], sort_keys=True
        )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "", "1" * 5000, "NaN"])
def test_json_that_breaks_parsers_is_refused(text, tampered, tiny_qwen3):
    for name in ("program.json", "manifest.json"):
        (tampered / name).write_bytes(text.encode("latin-1"))
        if name == "program.json":
            seal(tampered, read_manifest(tampered))
        assert load_or_refuse(tampered, tiny_qwen3) is None


# --- export ---------------------------------------------------------------------------------------


def logits(model, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 300, (4, 40))
    with torch.no_grad():
        return model(ids).logits


def assert_equal_logits(found, expected):
    """Within 1e-5 of their range: merging adapters rounds each weight, in float32."""
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_export_is_a_plain_model_with_the_live_logits(
    tiny_qwen3, lora_bundle, compiled_full, full_bundle, tmp_path
):
    program = adapted(tiny_qwen3)
    for number, (source, live, base) in enumerate(
        [
            (program, program, None),
            (lora_bundle, program, tiny_qwen3),
            (compiled_full, compiled_full, None),
            (full_bundle, compiled_full, None),
        ]
    ):
        folder = fst_dspy.export(source, tmp_path / str(number), base=base)
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert "lora" not in " ".join(exported.state_dict())
        lm = live.predictors()[0].lm
        with lm.policy.at(lm.model):
            expected = logits(lm.policy.model)
        assert_equal_logits(logits(exported), expected)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = [{"role": "user", "content": "where does visa go?"}]
        assert tokenizer.apply_chat_template(text, tokenize=False) == (
            lm.policy.tokenizer.apply_chat_template(text, tokenize=False)
        )


def test_the_command_exports_bundles_and_runs(tiny_qwen3, lora_bundle, tmp_path):
    from fst_dspy.cli import app

    compiled = compile_greedy(str(tiny_qwen3), {"rank": 4}, log_dir=tmp_path / "run")
    run = compiled.detailed_results.log_dir
    for source, arguments, code, message in [
        (lora_bundle, ["--base", tiny_qwen3], 0, "model folder"),
        (lora_bundle, [], 1, "pass base="),
        (run, ["--base", tiny_qwen3], 0, "model folder"),
        (run, [], 1, "pass base="),
        (tmp_path, [], 1, "neither a bundle nor"),
    ]:
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        command = ["export", str(source), str(folder), *map(str, arguments)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == code, done.output
        assert message in re.sub(r"[\s│]+", " ", done.output)
    fst_dspy.export(run, folder, base=tiny_qwen3)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = compiled.say.lm.policy
    with policy.at(compiled.say.lm.model):
        assert_equal_logits(logits(exported), logits(policy.model))
    with dspy.context(adapter=RawAdapter()):
        assert compiled(question="number 1").answer is not None


def test_a_run_is_exported_in_the_dtype_it_was_trained_in(tiny_qwen3, tmp_path):
    lm = LocalLM(str(tiny_qwen3), dtype="bfloat16", max_tokens=8)  # on this machine not the default
    fst = FST(vowels, arm="gepa_only", log_dir=tmp_path / "run", **SETTINGS)
    with dspy.context(lm=lm, adapter=RawAdapter()):
        fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    folder = fst_dspy.export(tmp_path / "run", tmp_path / "model", base=tiny_qwen3)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
