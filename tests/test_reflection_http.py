"""The reflection LM over real HTTP: a scripted OpenAI-compatible server on loopback."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dspy
import pytest

from fst_dspy.candidate import example_id, make_candidate
from fst_dspy.config import FastConfig
from fst_dspy.fast import FastPhase, score
from fst_dspy.population import best, choose
from fst_dspy.proposers import ProposalError, ReflectionLMProposer
from fst_dspy.rollout import RolloutJob
from fst_dspy.types import PredictorTrace, Rollout

# Offline, litellm would try for ten seconds to fetch its price list.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

NAME = "solve.instructions"
SEED = make_candidate({NAME: "Answer the question.", "solve.demos": "[]"})
EXAMPLES = [dspy.Example(q=f"question {n}", a="blue").with_inputs("q") for n in range(20)]
TRAIN, VAL = EXAMPLES[:12], EXAMPLES[12:]
GOOD = "I looked at it.\n```\nAlways answer blue.\n```"


def words(text: str) -> int:
    return len(text.split())


class Script:
    """Answers requests in turn; the last answer is repeated. An int is an HTTP status."""

    def __init__(self) -> None:
        self.answers: list[int | str | bytes] = [GOOD]
        self.prompts: list[str] = []

    def next(self) -> int | str | bytes:
        return self.answers[min(len(self.prompts), len(self.answers)) - 1]


@pytest.fixture
def server() -> Iterator[tuple[Script, str]]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.prompts.append(json.dumps(body.get("messages", body.get("input"))))
            answer = script.next()
            if isinstance(answer, int):
                return self.reply(answer, json.dumps({"error": {"message": "scripted"}}).encode())
            if isinstance(answer, bytes):
                return self.reply(200, answer)
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": answer},
            }
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "scripted"}
            return self.reply(
                200, json.dumps({**reply, "choices": [choice], "usage": usage}).encode()
            )

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield script, f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def reflection_lm(url: str, **settings: Any) -> dspy.LM:
    values = {"num_retries": 0, "cache": False, "engine": "litellm", **settings}
    return dspy.LM("openai/scripted", api_base=url, api_key="x", **values)


class BlueRunner:
    """A model that answers as its instruction says: blue if it says blue."""

    def run(
        self, jobs: Sequence[RolloutJob], *, channel: str, salt: int, version: str | None = None
    ) -> list[Rollout]:
        rollouts = []
        for job in jobs:
            answer = "blue" if "blue" in job.candidate.components[NAME] else "red"
            trace = PredictorTrace("solve", {"q": job.example.q}, {"a": answer}, answer)
            rollouts.append(
                Rollout(
                    example_id=example_id(job.example),
                    candidate_id=job.candidate.id,
                    calls=(),
                    traces=(trace,),
                    reward=float(answer == "blue"),
                    feedback=f"You said {answer}; the sky is blue.",
                    failure=None,
                    policy_version=0,
                )
            )
        return rollouts


def run_phase(proposer: ReflectionLMProposer, iterations: int) -> tuple[str, FastPhase]:
    runner = BlueRunner()
    rows = score(runner, [SEED], VAL, channel="fast", salt=0)
    start = choose([SEED], rows, [example_id(e) for e in VAL], 4, 0)
    phase = FastPhase(FastConfig(minibatch_size=4), proposer, 0)
    end = phase.run(runner, start, TRAIN, VAL, cycle=1, iterations=iterations, policy_version=0)
    return end.candidates[best(end)].components[NAME], phase


@pytest.mark.parametrize("engine", ["litellm", "auto"])
def test_reflection_over_http_changes_the_instruction(
    server: tuple[Script, str], engine: str
) -> None:
    script, url = server
    proposer = ReflectionLMProposer(reflection_lm(url, engine=engine), 50, words)
    text, phase = run_phase(proposer, 1)
    assert text == "Always answer blue."
    assert phase.stats.accepted == 1 and phase.stats.errors == {}
    (prompt,) = script.prompts
    assert "Answer the question." in prompt
    assert "You said red; the sky is blue." in prompt and "question " in prompt
    assert "not be longer than 33 words" in prompt
    assert "labels" not in prompt and "example_id" not in prompt


@pytest.mark.parametrize(
    "bad",
    [
        500,
        429,
        b"not json at all",
        b"{}",
        "",
        "```\n\n```",
        "```\n" + "long " * 60 + "\n```",
    ],
    ids=["500", "429", "garbage", "no choices", "no text", "empty block", "too long"],
)
def test_a_bad_answer_skips_the_iteration(
    server: tuple[Script, str], bad: int | str | bytes
) -> None:
    script, url = server
    script.answers = [bad, GOOD]
    text, phase = run_phase(ReflectionLMProposer(reflection_lm(url), 50, words), 2)
    assert text == "Always answer blue."
    assert sum(phase.stats.errors.values()) == 1
    assert (phase.stats.iterations, phase.stats.accepted) == (2, 1)


def test_a_server_that_is_gone_leaves_the_population_as_it_was() -> None:
    lm = reflection_lm("http://127.0.0.1:9/v1")
    text, phase = run_phase(ReflectionLMProposer(lm, 50, words), 2)
    assert text == SEED.components[NAME]
    assert sum(phase.stats.errors.values()) == 2 and phase.stats.proposals == 0


def test_retries_of_the_lm_hold(server: tuple[Script, str]) -> None:
    script, url = server
    script.answers = [500, GOOD]
    text, phase = run_phase(ReflectionLMProposer(reflection_lm(url, num_retries=2), 50, words), 1)
    assert text == "Always answer blue." and phase.stats.errors == {}
    assert len(script.prompts) == 2


def test_what_was_wrong_is_told(server: tuple[Script, str]) -> None:
    script, url = server
    script.answers = ["word " * 60]
    proposer = ReflectionLMProposer(reflection_lm(url), 50, words)
    with pytest.raises(ProposalError, match="60 tokens, over 50"):
        proposer.propose(SEED.components, {NAME: []}, [NAME])


def test_demos_are_not_rewritten(server: tuple[Script, str]) -> None:
    script, url = server
    proposer = ReflectionLMProposer(reflection_lm(url), 50, words)
    assert proposer.propose(SEED.components, {"solve.demos": []}, ["solve.demos"]) == {}
    assert script.prompts == []
