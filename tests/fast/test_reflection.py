"""The reflection LM over real HTTP: a scripted OpenAI-compatible server on loopback."""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dspy
import pytest
from dspy import lm15
from records import make_rollout

from fst_dspy.config import FastConfig
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import best, choose
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.proposal_fn import ProposalFnProposer
from fst_dspy.fast.proposers.protocol import ProposalError
from fst_dspy.fast.proposers.reflection import RETRIED, ReflectionLMProposer, dropped_fields
from fst_dspy.fast.reflector import Trajectory, make_records
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import example_id, make_candidate
from fst_dspy.types import PredictorTrace, Rollout

pytestmark = pytest.mark.slow

# Offline, litellm would try for ten seconds to fetch its price list.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

NAME = "solve.instructions"
SEED = make_candidate({NAME: "Answer the question.", "solve.demos": "[]"})
EXAMPLES = [dspy.Example(q=f"question {n}", a="blue").with_inputs("q") for n in range(20)]
TRAIN, VAL = EXAMPLES[:12], EXAMPLES[12:]
SLOW = "slow"
GOOD = "I looked at it.\n```\nAlways answer blue.\n```"


def words(text: str) -> int:
    return len(text.split())


class Ended(str):
    """An answer that ended in another way than by itself."""

    finish, refusal = "stop", None

    @classmethod
    def by(cls, text: str, finish: str = "stop", refusal: str | None = None) -> "Ended":
        answer = cls(text)
        answer.finish, answer.refusal = finish, refusal
        return answer


class Script:
    """Answers requests in turn; the last answer is repeated. An int is an HTTP status.

    ``asked`` holds what to do when a request comes, by its number.
    """

    def __init__(self) -> None:
        self.answers: list[int | str | bytes] = [GOOD]
        self.prompts: list[str] = []
        self.barrier: threading.Barrier | None = None
        self.asked: dict[int, Callable[[], None]] = {}
        self.over = threading.Event()

    def next(self) -> int | str | bytes:
        return self.answers[min(len(self.prompts), len(self.answers)) - 1]


@pytest.fixture
def server() -> Iterator[tuple[Script, str]]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.prompts.append(json.dumps(body.get("messages", body.get("input"))))
            script.asked.get(len(script.prompts), lambda: None)()
            if script.barrier is not None:
                script.barrier.wait()
            answer = script.next()
            if answer == SLOW:
                script.over.wait(60)
            if isinstance(answer, int):
                return self.reply(answer, json.dumps({"error": {"message": "scripted"}}).encode())
            if isinstance(answer, bytes):
                return self.reply(200, answer)
            choice = {
                "index": 0,
                "finish_reason": getattr(answer, "finish", "stop"),
                "message": {
                    "role": "assistant",
                    "content": answer,
                    "refusal": getattr(answer, "refusal", None),
                },
            }
            usage = {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}
            model = body["model"]
            reply = {"id": "1", "object": "chat.completion", "created": 1, "model": model}
            return self.reply(
                200, json.dumps({**reply, "choices": [choice], "usage": usage}).encode()
            )

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # those are not waited for when it closes

    httpd = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield script, f"http://127.0.0.1:{httpd.server_port}/v1"
    script.over.set()
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def reflection_lm(url: str, **settings: Any) -> dspy.LM:
    values = {"num_retries": 0, "cache": False, "engine": "litellm", **settings}
    return dspy.LM("openai/scripted", api_base=url, api_key="x", **values)


def proposer_of(
    url: str, num_retries: int = 0, timeout: float = 30, **settings: Any
) -> ReflectionLMProposer:
    lm = reflection_lm(url, num_retries=num_retries, timeout=timeout)
    return ReflectionLMProposer(lm, 50, words, **{"pause": 0.01, **settings})


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
                make_rollout(
                    float(answer == "blue"),
                    example_id=example_id(job.example),
                    candidate_id=job.candidate.id,
                    traces=(trace,),
                    feedback=f"You said {answer}; the sky is blue. Lesson: say blue to all.",
                )
            )
        return rollouts


def run_phase(proposer: ReflectionLMProposer, iterations: int) -> tuple[str, FastPhase]:
    runner = BlueRunner()
    rows = evaluate(runner, [SEED], VAL, channel="fast").score_K_V
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
    assert "not be longer than 35 words" in prompt, "two thirds of 3 + 50 tokens"
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
    text, phase = run_phase(proposer_of(url, num_retries=2), 1)
    assert text == "Always answer blue." and phase.stats.errors == {"server": 1}
    assert len(script.prompts) == 2


def test_what_was_wrong_is_told(server: tuple[Script, str]) -> None:
    script, url = server
    script.answers = ["word " * 60]
    proposer = ReflectionLMProposer(reflection_lm(url), 50, words)
    with pytest.raises(ProposalError, match="60 tokens, over 53"):
        proposer.propose(SEED.components, {NAME: []}, [NAME])


def test_demos_are_not_rewritten(server: tuple[Script, str]) -> None:
    script, url = server
    proposer = ReflectionLMProposer(reflection_lm(url), 50, words)
    assert proposer.propose(SEED.components, {"solve.demos": []}, ["solve.demos"]) == {}
    assert script.prompts == []


FAULTS = {
    "rate_limit": 429,
    "server": 500,
    "timeout": SLOW,
    "garbled": b"not json at all",
    "no_text": "",
    "empty": "```\n\n```",
    "too_long": "```\n" + "long " * 60 + "\n```",
    "dropped_field": "```\nJust say it.\n```",
    "truncated": Ended.by("```\nAnswer q, and always", "length"),
    "truncated in a block": Ended.by("```\nAnswer q.\n```\nAnd", "length"),
    "truncated while it thought": Ended.by("", "length"),
    "refused": Ended.by("I'm sorry, but I can't help with q."),
    "refused by the provider": Ended.by("Answer q.", "content_filter"),
    "refused in another field": Ended.by("", refusal="I can't."),
    "garbled text": "```\nAnswer q \ud800.\n```",
}


def limit_of(kind: str) -> float:
    """Seconds a call may take: few where it is to take too long, and else plenty."""
    return 1 if kind == "timeout" else 30


def lessons() -> LessonProposer:
    return LessonProposer(50, words)


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_counted_and_told_and_the_fallback_stands_in(
    server: tuple[Script, str], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    script, url = server
    script.answers = [FAULTS[kind]]
    asks_q = make_candidate({NAME: "Answer q.", "solve.demos": "[]"})
    runner = BlueRunner()
    rows = evaluate(runner, [asks_q], VAL, channel="fast").score_K_V
    start = choose([asks_q], rows, [example_id(e) for e in VAL], 4, 0)
    proposer = proposer_of(url, timeout=limit_of(kind), fallback=lessons())
    phase = FastPhase(FastConfig(minibatch_size=4), proposer, 0)
    end = phase.run(runner, start, TRAIN, VAL, cycle=1, iterations=1, policy_version=0)
    assert phase.stats.errors == {kind.split()[0]: 1}
    assert phase.report()["reflection"]["fallbacks"] == 1
    assert proposer.usage.failures == (kind in RETRIED)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum(f"no usable reflection on {NAME} ({kind.split()[0]})" in one for one in told) == 1
    # The feedback says that the sky is blue; the proposer without an LM puts that in the prompt.
    assert "blue" in end.candidates[best(end)].components[NAME]


@pytest.mark.parametrize("kind", ["rate_limit", "server", "timeout", "garbled", "no_text"])
def test_what_passes_is_retried_and_counted(server: tuple[Script, str], kind: str) -> None:
    script, url = server
    script.answers = [FAULTS[kind], FAULTS[kind], GOOD]
    proposer = proposer_of(url, num_retries=3, timeout=limit_of(kind))
    # The good answer has all the time it needs: the limit is read anew for every attempt.
    script.asked[2] = lambda: proposer.lm.kwargs.update(timeout=30)
    text, phase = run_phase(proposer, 1)
    assert text == "Always answer blue."
    assert phase.stats.errors == {kind: 2} and len(script.prompts) == 3


def test_a_wrong_key_is_not_retried(server: tuple[Script, str]) -> None:
    script, url = server
    script.answers = [401]
    _, phase = run_phase(proposer_of(url, num_retries=5), 1)
    assert phase.stats.errors == {"auth": 1} and len(script.prompts) == 1


def test_pauses_between_retries_grow_and_heed_the_provider(
    server: tuple[Script, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, url = server
    script.answers = [429]
    pauses: list[float] = []
    monkeypatch.setattr("fst_dspy.fast.proposers.reflection.time.sleep", pauses.append)
    proposer = proposer_of(url, num_retries=3, pause=1.0)
    with pytest.raises(ProposalError):
        proposer.propose(SEED.components, {NAME: []}, [NAME])
    assert pauses == [1.0, 2.0, 4.0]


def test_a_provider_that_stays_down_is_left_alone(
    server: tuple[Script, str], caplog: pytest.LogCaptureFixture
) -> None:
    script, url = server
    script.answers = [500]
    with caplog.at_level(logging.WARNING, logger="fst_dspy"):
        text, phase = run_phase(proposer_of(url, fallback=lessons()), 6)
    assert "blue" in text
    assert len(script.prompts) == 3 and phase.stats.errors == {"server": 3}
    usage = phase.report()["reflection"]
    assert usage["fallbacks"] == 6 and "3 calls in a row failed" in usage["stopped"]
    assert [r.message for r in caplog.records if "no longer asked" in r.message] == [
        f"the reflection LM is no longer asked: {usage['stopped']}; going on with the lessons in "
        "the feedback"
    ]


def priced(url: str, **settings: Any) -> ReflectionLMProposer:
    lm = dspy.LM("openai/gpt-4o-mini", api_base=url, api_key="x", **ENGINE)
    return ReflectionLMProposer(lm, 50, words, fallback=lessons(), **settings)


ENGINE: dict[str, Any] = {"num_retries": 0, "cache": False, "engine": "litellm"}


def propose(proposer: ReflectionLMProposer, times: int) -> None:
    for _ in range(times):
        proposer.propose(SEED.components, {NAME: []}, [NAME])


def test_the_cost_budget_holds_and_is_kept_over_a_resume(server: tuple[Script, str]) -> None:
    script, url = server
    one_call = (60 * 0.15 + 40 * 0.60) / 1e6  # USD, litellm's price list
    proposer = priced(url, max_cost=1.5 * one_call)
    propose(proposer, 4)
    assert len(script.prompts) == 2
    assert proposer.usage.cost == pytest.approx(2 * one_call) and proposer.usage.tokens == 200
    assert proposer.usage.fallbacks == 2 and "USD is spent" in str(proposer.usage.stopped)
    resumed = priced(url, max_cost=1.5 * one_call)
    resumed.load_state(json.loads(json.dumps(proposer.state())))
    propose(resumed, 1)
    assert len(script.prompts) == 2 and resumed.usage.fallbacks == 3


def test_the_token_budget_holds_where_no_price_is_known(
    server: tuple[Script, str], caplog: pytest.LogCaptureFixture
) -> None:
    script, url = server
    proposer = proposer_of(url, fallback=lessons(), max_cost=0.001, max_tokens=250)
    with caplog.at_level(logging.WARNING, logger="fst_dspy"):
        propose(proposer, 5)
    assert len(script.prompts) == 3
    assert (proposer.usage.tokens, proposer.usage.cost, proposer.usage.unpriced) == (300, 0.0, 3)
    assert sum("price of reflection LM" in r.message for r in caplog.records) == 1
    assert "250 tokens is spent" in str(proposer.usage.stopped)


def test_several_components_are_reflected_at_the_same_time(server: tuple[Script, str]) -> None:
    script, url = server
    script.barrier = threading.Barrier(2, timeout=60)  # each call waits for the other
    names = ["a.instructions", "b.instructions"]
    texts = proposer_of(url, num_retries=0).propose(
        dict.fromkeys(names, "Answer."), {name: [] for name in names}, names
    )
    assert texts == dict.fromkeys(names, "Always answer blue.")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("Read the ticket.", "Answer with a queue.", ["ticket"]),
        ("Read the ticket.", "Tickets go to silver.", []),
        ("Answer.", "Reply.", []),
        ("Use user_name well.", "Use the user name well.", []),
        ("Use `user_name`.", "Use the user.", ["user_name"]),
        ("The ticketing office.", "The office.", []),
        ("Read the `ticket`.", "请根据ticket选择queue。", []),
        ("请根据ticket选择queue。", "Answer with a queue.", ["ticket"]),
    ],
)
def test_dropped_fields(old: str, new: str, expected: list[str]) -> None:
    records = [{"Inputs": {"ticket": "x", "user_name": "y"}}]
    assert dropped_fields(old, new, records) == expected


def test_an_engines_own_response_tells_how_it_ended() -> None:
    def engine(finish: str) -> Any:
        class Engine:
            def complete(self, request: Any) -> Any:
                part = lm15.TextPart("Answer q, and always")
                message = lm15.Message(role="assistant", parts=(part,))
                return lm15.Response(
                    id="1", model="m", message=message, finish_reason=finish, usage=lm15.Usage()
                )

        return Engine()

    for finish, kind in (("length", "truncated"), ("content_filter", "refused")):
        lm = dspy.LM("local/scripted", engine=engine(finish), cache=False)
        with pytest.raises(ProposalError) as caught:
            ReflectionLMProposer(lm, 50, words).propose(SEED.components, {NAME: []}, [NAME])
        assert caught.value.kind == kind


@pytest.mark.parametrize("engine", ["litellm", "auto"])
def test_retries_are_not_read_from_the_cache(server: tuple[Script, str], engine: str) -> None:
    script, url = server
    script.answers = ["", "", GOOD]
    lm = reflection_lm(url, num_retries=2, cache=True, engine=engine)
    proposer = ReflectionLMProposer(lm, 50, words, pause=0.01)
    assert proposer.propose(SEED.components, {NAME: []}, [NAME])[NAME] == "Always answer blue."
    assert len(script.prompts) == 3 and proposer.take_faults() == {"no_text": 2}


@pytest.mark.parametrize("bad", ["truncated", "refused", "too_long", "empty"])
def test_a_prompt_whose_answer_was_of_no_use_is_asked_anew(
    server: tuple[Script, str], bad: str
) -> None:
    script, url = server
    script.answers = [FAULTS[bad], GOOD]
    lm = reflection_lm(url, cache=True)
    proposer = ReflectionLMProposer(lm, 50, words)
    with pytest.raises(ProposalError):
        proposer.propose(SEED.components, {NAME: []}, [NAME])
    resumed = ReflectionLMProposer(lm, 50, words)
    resumed.load_state(json.loads(json.dumps(proposer.state())))
    assert resumed.propose(SEED.components, {NAME: []}, [NAME])[NAME] == "Always answer blue."
    assert len(script.prompts) == 2


def test_a_good_answer_is_read_from_the_cache(server: tuple[Script, str]) -> None:
    script, url = server
    for _ in range(2):  # as a run that is started again
        proposer = ReflectionLMProposer(reflection_lm(url, cache=True), 50, words)
        assert proposer.propose(SEED.components, {NAME: []}, [NAME])[NAME] == "Always answer blue."
    assert len(script.prompts) == 1


class Says(dspy.LM):
    """A language model that says one thing."""

    def __init__(self, text: str) -> None:
        super().__init__("local/says", cache=False)
        self.text = text

    def __call__(self, *args: Any, **kwargs: Any) -> list[str]:
        return [self.text]


def said(text: str, own: str = "Answer.", name: str = NAME, **inputs: str) -> str:
    """What is proposed where the language model says this."""
    records = [{"Inputs": inputs}] if inputs else []
    return ReflectionLMProposer(Says(text), 50, words).propose(
        {name: own}, {name: records}, [name]
    )[name]


def kind_of_fault(text: str) -> str:
    with pytest.raises(ProposalError) as caught:
        said(text)
    return caught.value.kind


@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nThey want rules.\n</think>\n\nSend visas to silver.",
        "<think>\nIt was ```Answer.```, so...\n</think>\n\n```\nSend visas to silver.\n```",
        "<think>Shall I close with </think>? No.</think>\n```\nSend visas to silver.\n```",
        "They want rules.\n</think>\n\nSend visas to silver.",
        "<think>a</think>\n<seed:think>b</seed:think>Send visas to silver.",
        "[THINK]They want rules.[/THINK]```Send visas to silver.```",
    ],
)
def test_a_thought_is_no_part_of_the_instruction(answer: str) -> None:
    assert said(answer) == "Send visas to silver."


def test_a_thought_without_an_end_was_cut_off() -> None:
    assert kind_of_fault("<think>\nThey want") == "truncated"
    assert kind_of_fault("<think>a</think>\n<think>```They want``` and") == "truncated"
    assert kind_of_fault("<think>They want rules.</think>\n") == "empty"


def test_an_instruction_may_ask_for_thoughts() -> None:
    asks = "Think between <think> and </think>, then answer."
    for answer in (asks, f"```\n{asks}\n```", f"<think>Hm.</think>\n```\n{asks}\n```"):
        assert said(answer) == asks


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm afraid I can't help with that request.", True),
        ("Unfortunately, I cannot help with that.", True),
        ("As an AI language model, I can't write that.", True),
        ("As an AI, I am not able to.", True),
        ("I’m so sorry, no.", True),
        ("I must decline.", True),
        ("As an AI assistant for support, send visa tickets to silver.", False),
        ("As an assistant, you route tickets. I cannot is no answer.", False),
        ("Unfortunate customers go to silver.", False),
    ],
)
def test_what_is_a_refusal(text: str, refused: bool) -> None:
    if refused:
        assert kind_of_fault(text) == "refused"
    else:
        assert said(text) == text


def test_a_tools_description_need_not_name_the_inputs() -> None:
    text, own = "Finds the opening hours of an office.", "Looks up a ticket by number."
    assert said(text, own, "agent.tool:search", ticket="x") == text
    with pytest.raises(ProposalError, match="mentions the input ticket"):
        said(text, own, ticket="x")


def test_an_own_instruction_of_any_length_can_be_added_to() -> None:
    own = "Be polite. " * 50
    more = f"{own}\n" + "Visas go to silver. " * 10
    script = [f"```\n{more}\n```", f"```\n{more} And {own}\n```"]

    class InTurn(Says):
        def __call__(self, *args: Any, **kwargs: Any) -> list[str]:
            return [script.pop(0)]

    lm = InTurn("")
    proposer = ReflectionLMProposer(lm, 50, words)
    first = proposer.propose({NAME: own}, {NAME: []}, [NAME])[NAME]
    assert first == more.strip() and "longer than 100 words" in proposer.prompt_template(NAME)
    resumed = ReflectionLMProposer(lm, 50, words)
    resumed.load_state(json.loads(json.dumps(proposer.state())))
    with pytest.raises(ProposalError, match="over 150"):  # what was written here does not count
        resumed.propose({NAME: first}, {NAME: []}, [NAME])
    assert resumed.limit(NAME) == 150 and resumed.limit("other.instructions") == 50


def test_the_longest_of_the_texts_that_a_run_begins_with_counts() -> None:
    proposer = ReflectionLMProposer(Says("```\nAnswer q.\n```"), 50, words)
    for own in ("Answer.", "be brief " * 40, "Answer now."):
        proposer.propose({NAME: own}, {NAME: []}, [NAME])
    assert proposer.limit(NAME) == 130


def test_a_prompt_holds_no_more_of_feedback_than_of_other_fields(
    server: tuple[Script, str],
) -> None:
    script, url = server
    example, long = EXAMPLES[0], "begun " + "log " * 300_000 + "ended"
    rollout = make_rollout(
        example_id=example_id(example), candidate_id=SEED.id, feedback=f"{long} Lesson: say blue."
    )
    records = make_records(NAME, [Trajectory(example, rollout)] * 12)
    assert records[0]["Feedback"] == rollout.feedback, "who reads lessons reads all of it"
    proposer_of(url).propose(SEED.components, {NAME: records}, [NAME])
    (prompt,) = script.prompts
    assert len(prompt) < 12 * 5000
    assert "begun log" in prompt and "ended Lesson: say blue." in prompt and "left out" in prompt
    shown: list[Any] = []

    def propose(candidate, reflective_dataset, components_to_update):
        shown.extend(reflective_dataset["solve"])
        return {}

    ProposalFnProposer(propose).propose(SEED.components, {NAME: records}, [NAME])
    assert len(shown) == 12 and all(len(record["Feedback"]) < 5000 for record in shown)


def test_a_huge_answer_is_not_tokenized() -> None:
    def count(text: str) -> int:
        assert len(text) < 10_000, "tokenized whole"
        return len(text.split())

    lm = Says("```\n" + "long " * 10_000_000 + "\n```")
    started = time.monotonic()
    with pytest.raises(ProposalError, match="characters") as caught:
        ReflectionLMProposer(lm, 50, count).propose(SEED.components, {NAME: []}, [NAME])
    assert caught.value.kind == "too_long" and time.monotonic() - started < 20


def test_feedback_with_lone_surrogates_teaches_all_the_same() -> None:
    def count(text: str) -> int:
        text.encode()  # as a tokenizer would
        return words(text)

    example = EXAMPLES[0]
    trace = PredictorTrace("solve", {"q": "\udfff"}, {"a": "red"}, "red")
    rollout = Rollout(
        example_id(example), SEED.id, (), (trace,), 0.0, "Lesson: say \ud800 blue.", None, 0
    )
    records = make_records(NAME, [Trajectory(example, rollout)])
    fallback = LessonProposer(50, count)
    proposer = ReflectionLMProposer(Says("```\n\ud800\n```"), 50, count, fallback=fallback)
    texts = proposer.propose(SEED.components, {NAME: records}, [NAME])
    assert texts[NAME].endswith("say \ufffd blue.")


def test_the_prompt_may_be_ones_own(server: tuple[Script, str]) -> None:
    script, url = server
    template = {"solve": "REWRITE <curr_param> AFTER <side_info>", "other": "no"}
    for own in (template, template["solve"]):
        proposer_of(url, template=own).propose(SEED.components, {NAME: []}, [NAME])
    assert all("REWRITE Answer the question." in prompt for prompt in script.prompts)


class Counting(LessonProposer):
    """Counts the records that it learns from."""

    seen = 0

    def observe(self, component, records):
        self.seen += len(records)
        super().observe(component, records)


def test_lessons_are_not_collected_beside_a_reflection_lm_that_works():
    fallback = Counting(50, words)
    proposer = ReflectionLMProposer(Says("```\nDo.\n```"), 50, words, fallback=fallback)
    proposer.observe(NAME, [{}] * 64)  # not even looked at
    assert fallback.seen == 0
    proposer.usage = dataclasses.replace(proposer.usage, fallbacks=1)
    with pytest.raises(KeyError):
        proposer.observe(NAME, [{}] * 64)
    assert fallback.seen == 64


def test_the_prompt_shows_the_whole_trajectory_where_it_is_asked_for(
    server: tuple[Script, str],
) -> None:
    script, url = server
    example = EXAMPLES[0]
    traces = (
        PredictorTrace("search", {"q": "the question"}, {"found": "a far page"}, ""),
        PredictorTrace("solve", {"found": "a far page"}, {"a": "red"}, ""),
    )
    rollout = Rollout(example_id(example), SEED.id, (), traces, 0.0, "Wrong.", None, 0)
    for context in ("step", "trajectory"):
        records = make_records(NAME, [Trajectory(example, rollout)], context)
        proposer_of(url).propose(SEED.components, {NAME: records}, [NAME])
    step, trajectory = script.prompts
    assert "Program Trajectory" not in step and "1 of 2: search" not in step
    for part in ("Program Trajectory", "1 of 2: search", "the question", "2 of 2: solve"):
        assert part in trajectory
