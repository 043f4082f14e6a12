"""Tools' descriptions as components: read, rewritten in a copy, and seen by the model."""

from __future__ import annotations

import dspy
import pytest
from dspy.utils import DummyLM
from environments import Fragile, Hall

import fst_dspy
from fst_dspy.errors import ConfigError
from fst_dspy.student.candidate import bind, make_candidate, seed_candidate
from fst_dspy.student.tools import tool_texts


def search(query: str, k: int = 3) -> str:
    """Look things up."""
    return "found"


def rewritten(program, component, text):
    own = seed_candidate(program, tools=True)
    assert own.components[component] != text
    return bind(program, make_candidate({**own.components, component: text}))


def test_they_are_components_only_where_that_is_asked_for():
    program = dspy.ReAct("question -> answer", [search])
    assert not any("tool:" in name for name in seed_candidate(program).components)
    own = seed_candidate(program, tools=True)
    assert own.components["react.tool:search"] == "Look things up."
    assert "react.tool:finish" in own.components
    same = bind(program, own)
    assert same.react.signature.instructions == program.react.signature.instructions


@pytest.mark.parametrize("kind", [dspy.ReAct, dspy.ReActV2])
def test_agents_of_dspy_read_the_new_text_and_call_the_same_tool(kind):
    program = kind("question -> answer", [search])
    predictor = next(name for name, _ in program.named_predictors())
    own = dict(program.tools)
    changed = rewritten(program, f"{predictor}.tool:search", "Find facts.\nquery: two words\nOnce.")
    tool = changed.tools["search"]
    assert (tool.desc, tool.args["query"]["description"]) == ("Find facts.\nOnce.", "two words")
    assert tool.args["query"]["type"] == "string"
    assert tool(query="x") == "found"
    assert program.tools == own and program.tools["search"].desc == "Look things up."
    shown = changed.predictors()[0].signature.instructions
    assert ("Find facts." in shown, "Look things up." in shown) == (kind is not dspy.ReActV2, False)
    assert tool_texts(changed)[predictor, "search"] == "Find facts.\nOnce.\nquery: two words"


def test_a_tool_that_the_instructions_no_longer_name_is_named_again():
    program = dspy.ReAct("question -> answer", [search])
    own = seed_candidate(program, tools=True)
    texts = {"react.instructions": "Be quick.", "react.tool:search": "Find facts."}
    changed = bind(program, make_candidate({**own.components, **texts}))
    shown = changed.react.signature.instructions
    assert shown.startswith("Be quick.") and shown.count("Find facts.") == 1


def test_an_agent_within_a_container_has_tools_too():
    class Several(dspy.Module):
        def __init__(self):
            super().__init__()
            self.agents = {"a b": dspy.ReActV2("question -> answer", [search])}

    changed = rewritten(Several(), "agents['a b'].react.tool:search", "Find facts.")
    assert changed.agents["a b"].tools["search"].desc == "Find facts."


def test_a_candidate_for_other_tools_is_refused():
    program = dspy.ReAct("question -> answer", [search])
    with pytest.raises(ConfigError, match="no tool 'fly' of the predictor 'react'"):
        bind(program, make_candidate({"react.tool:fly": "Fly."}))


def shown_to_the_model(program, **fields):
    lm = DummyLM([{"action": "wait"}] * 4)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        program(**fields)
    return "\n".join(message["content"] for message in lm.history[0]["messages"])


def test_environments_tools_are_rewritten_where_the_model_reads_them():
    program = fst_dspy.env(Fragile, max_turns=1)
    changed = rewritten(program, "act.tool:push", "Push it, once.")
    assert "- push: Push it, once.\n- wait: Wait." in shown_to_the_model(changed, harm="no")
    assert "- push: Push the button." in shown_to_the_model(program, harm="no")


def test_of_several_environments_each_has_its_own():
    program = fst_dspy.env({"f": Fragile, "h": Hall}, max_turns=1)
    changed = rewritten(program, "act.tool:f.push", "Push it, once.")
    assert "Push it, once." in shown_to_the_model(changed, environment="f", harm="no")
    assert "Push" not in shown_to_the_model(changed, environment="h", way="left")


def test_an_environments_react_has_its_tools():
    program = fst_dspy.env(Hall, "observation -> answer", agent=dspy.ReAct)
    changed = rewritten(program, "agent.react.tool:go", "Go on.")
    assert "Go on." in changed.agent.react.signature.instructions
