"""Compiled programs on tiny models, and ways to tamper with their bundles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import dspy
import torch
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import FST, LocalLM

SETTINGS = {
    "max_cycles": 2,
    "steps_per_cycle": 2,
    "group_size": 4,
    "population_size": 2,
    "problems_per_step": 3,
    "first_cycle_iterations": 2,
    "minibatch_size": 3,
    "max_tokens": 8,
    "val_size": 4,
    "learning_rate": 5e-4,
}


def compile_greedy(model: str, lora=False, **options) -> dspy.Module:
    """A compiled Echo that answers greedily, on weights that training has moved.

    The best weights may be the student's own, which would make a weak test: so the first seed
    under which they are not.
    """
    for seed in range(8):
        lm = LocalLM(model, temperature=0.0, max_tokens=8, cache=False)
        fst = FST(vowels, seed=seed, lora=lora, **{"track_stats": True, **SETTINGS, **options})
        with dspy.context(lm=lm, adapter=RawAdapter()):
            compiled = fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
        if compiled.say.lm.model != lm.policy.base_version:
            return compiled
    raise AssertionError("no seed trained weights better than the base's")


def answers(program: dspy.Module, count: int = 20) -> list[str]:
    """What the model wrote for each question; an empty answer counts as one."""

    def answer(question: str) -> str:
        try:
            return program(question=question).answer
        except dspy.utils.exceptions.AdapterParseError as error:
            return f"unparsed {error.lm_response}"

    with dspy.context(adapter=RawAdapter(use_json_adapter_fallback=False)):
        return [answer(q.question) for q in questions(count)]


def adapted(model: Path, rank: int = 4) -> dspy.Module:
    """An Echo on LoRA weights that were not trained but drawn: quick to make."""
    from fst_dspy.config import LoraConfig

    lm = LocalLM(str(model), temperature=0.0, max_tokens=8, cache=False)
    lm.policy.add_lora(LoraConfig(rank=rank), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in lm.policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    program = Echo()
    program.say.lm = lm.at(lm.policy.keep())
    return program


def read_manifest(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def seal(bundle: Path, manifest: dict, *, refresh: bool = True) -> None:
    """Write a manifest as its maker would: with the right hashes of the files that it lists."""
    if refresh:
        for name in manifest["files"]:
            path = bundle / name
            if path.is_file():
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                manifest["files"][name] = {"sha256": digest, "bytes": len(data)}
    plain = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    manifest = {**plain, "seal": hashlib.sha256(text.encode()).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
