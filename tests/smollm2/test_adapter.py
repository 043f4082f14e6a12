"""The adapter that comes with the package: its size, its terms, its figures."""

from __future__ import annotations

import json

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from fst_dspy.pretrained import smollm2
from fst_dspy.smollm2.figures import SETTINGS


def test_it_is_small_whole_and_of_the_rank_it_says() -> None:
    folder = smollm2.adapter()
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values()) == 4_884_480
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert {name.split(".")[-2] for name in weights} == {"lora_A", "lora_B"}
    assert config["r"] == 16 and config["base_model_name_or_path"].startswith("HuggingFaceTB/")
    assert "Apache" in (folder / "NOTICE").read_text()


def test_its_figures_stand_with_and_without_it_and_on_its_page() -> None:
    found = json.loads((smollm2.adapter() / "figures.json").read_text())
    page = (ROOT / "docs" / "smollm2.md").read_text()
    assert found["with"].keys() == found["without"].keys() == {"perplexity", *map(str, SETTINGS)}
    for setting in map(str, SETTINGS):
        cells = []
        for scores in (found["without"][setting], found["with"][setting]):
            assert 0 <= scores["right"] <= scores["parsed"] <= 1
            right, parsed = scores["right"], scores["parsed"]
            cells.append(f"{right:.2f} ({parsed:.2f}) of {scores['questions']}")
        name = setting.replace("not told", "rules taken out")
        assert f"| {name} | {cells[0]} | {cells[1]} |" in page
    for adapter in ("chat", "xml", "json"):
        name = f"rules, {adapter}, reasoning"
        assert found["with"][name]["parsed"] > 0.8 > 0.2 > found["without"][name]["parsed"]
    told, unsaid = (found["with"][f"rules, chat, reasoning{end}"] for end in ("", ", not told"))
    assert told["right"] > unsaid["right"] + 0.2  # it is the prompt that it goes by
    assert all(f"{found[which]['perplexity']:.1f}" in page for which in ("with", "without"))
    made = json.loads((smollm2.adapter() / "training.json").read_text())
    assert 0 < made["step"] <= made["recipe"]["steps"] and made["held_out"]["exact"] > 0.2


@pytest.mark.slow
def test_the_model_under_it_follows_the_rules_in_its_prompt() -> None:
    import dspy

    import fst_dspy
    from fst_dspy.errors import ModelError

    try:
        lm = fst_dspy.LocalLM("smollm2", temperature=0.0, max_tokens=64)
    except ModelError as error:
        pytest.skip(f"SmolLM2 is not to be had here: {error}")
    rules = {"kettle": "north", "violin": "south", "ladder": "west"}
    text = "\n".join(f"{key} messages go to {place}." for key, place in rules.items())
    signature = dspy.Signature("message -> place", f"Choose the place for the message.\n{text}")
    program = dspy.ChainOfThought(signature)
    with dspy.context(lm=lm):
        asked = {key: f"Somebody asked about the {key} again." for key in rules}
        found = {key: program(message=message).place for key, message in asked.items()}
    assert sum(found[key] == place for key, place in rules.items()) >= 2
    assert lm.version.startswith("smollm2@")
