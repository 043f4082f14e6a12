"""What we rely on of DSPy's insides, listed in ``fst_dspy/student/candidate.py``.

Each test is named after, or names, what is missing or otherwise. Only DSPy is called.
"""

from __future__ import annotations

import contextvars
import copy
import logging
import pickle
import threading
from dataclasses import fields
from typing import Any

import dspy
import pytest
from dspy import lm15
from dspy.dsp.utils.settings import DEFAULT_CONFIG

pytestmark = pytest.mark.insides

SIGNATURE = dspy.Signature("ticket -> place", "Say where.")
ANSWER = "[[ ## place ## ]]\nlocker\n\n[[ ## completed ## ]]"


class Engine:
    """Answers the same each time, or raises; keeps the requests."""

    def __init__(self, text: str = ANSWER, finish_reason: str = "stop") -> None:
        self.text, self.finish_reason = text, finish_reason
        self.requests: list[lm15.Request] = []
        self.error: Exception | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return lm15.Response(
            id=None,
            model=request.model,
            message=lm15.Message(role="assistant", parts=(lm15.TextPart(self.text),)),
            finish_reason=self.finish_reason,
            usage=lm15.Usage(input_tokens=3, output_tokens=2),
            provider_data={"completion_ids": [1, 2]},
        )


class AsyncEngine(Engine):
    async def complete(self, request: lm15.Request) -> lm15.Response:
        return super().complete(request)


class SavedEngine(Engine):
    def dump_state(self) -> dict[str, Any]:
        return {"text": self.text}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> SavedEngine:
        return cls(state["text"])


class Program(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.say = dspy.Predict(SIGNATURE)

    def forward(self, ticket: str) -> dspy.Prediction:
        return self.say(ticket=ticket)


def language_model(engine: Engine, **kwargs: Any) -> dspy.LM:
    return dspy.LM("local@1", engine=engine, cache=False, num_retries=0, **kwargs)


# --- examples, programs and their state -----------------------------------------------------------


def test_example_input_keys() -> None:
    example = dspy.Example(ticket="x", place="y")
    assert example._input_keys is None
    assert set(example.with_inputs("ticket")._input_keys) == {"ticket"}


def test_module_compiled_hides_the_parts_of_a_module() -> None:
    outer = dspy.Module()
    outer.inner = Program()
    assert outer.inner._compiled is False
    assert [name for name, _ in outer.named_predictors()] == ["inner.say"]
    outer.inner._compiled = True
    assert outer.named_parameters() == [], "_compiled no longer freezes"
    assert [name for name, _ in outer.inner.named_predictors()] == ["say"]


def test_module_state_is_what_bundles_hold() -> None:
    program = Program()
    program.say.demos = [dspy.Example(ticket="a", place="b")]
    state = program.dump_state()
    assert state == {
        "say": {
            "traces": [],
            "train": [],
            "demos": [{"ticket": "a", "place": "b"}],
            "signature": {
                "instructions": "Say where.",
                "fields": [
                    {"prefix": "Ticket:", "description": "${ticket}"},
                    {"prefix": "Place:", "description": "${place}"},
                ],
            },
            "lm": None,
        }
    }, "Module.dump_state"
    state["say"]["signature"]["instructions"] = "Say it."
    program.load_state(state)
    assert program.say.signature.instructions == "Say it.", "Module.load_state"
    assert program.say.lm is None and len(program.say.demos) == 1


def test_get_dependency_versions() -> None:
    from dspy.utils.saving import get_dependency_versions

    assert get_dependency_versions()["dspy"] == dspy.__version__


def test_module_deepcopy() -> None:
    program = Program()
    program.say.lm = language_model(Engine())
    program.say.callbacks = [object()]
    program.lock = threading.Lock()  # cannot be copied: DSPy then copies attribute by attribute
    copied = program.deepcopy()
    assert type(copied) is Program and copied.say is not program.say
    assert copied.say.lm.engine is program.say.lm.engine
    assert copied.lock is program.lock, "Module.deepcopy falls back to references"


def test_predict_takes_its_texts_and_its_lm_from_attributes() -> None:
    engine, other = Engine(), Engine()
    predict = dspy.Predict(SIGNATURE)
    predict.signature = predict.signature.with_instructions("Guess where.")
    predict.demos = [dspy.Example(ticket="a", place="b")]
    predict.lm = language_model(engine)
    assert predict(ticket="x").toDict() == {"place": "locker"}
    messages = engine.requests[0].messages
    assert "Guess where." in text_of(engine.requests[0])
    assert [message.role for message in messages][-3:] == ["user", "assistant", "user"]
    predict(lm=language_model(other), ticket="x")
    assert (len(engine.requests), len(other.requests)) == (1, 1), "Predict's lm= argument"


def text_of(request: lm15.Request) -> str:
    """All of a request's text, wherever the system message is."""
    system = request.system if isinstance(request.system, str) else request.system or ()
    parts = [system] if isinstance(system, str) else [part.text for part in system]
    return "\n".join([*parts, *(part.text for m in request.messages for part in m.parts)])


# --- the adapter ----------------------------------------------------------------------------------


def test_chat_adapter_writes_what_the_embedded_model_was_trained_on() -> None:
    demo = dspy.Example(ticket="a", place="b")
    system, *turns = dspy.ChatAdapter().format(SIGNATURE, [demo], {"ticket": "x"})
    assert system == {
        "role": "system",
        "content": "Your input fields are:\n1. `ticket` (str):\n"
        "Your output fields are:\n1. `place` (str):\n"
        "All interactions will be structured in the following way, with the appropriate values "
        "filled in.\n\n[[ ## ticket ## ]]\n{ticket}\n\n[[ ## place ## ]]\n{place}\n\n"
        "[[ ## completed ## ]]\nIn adhering to this structure, your objective is: \n"
        "        Say where.",
    }
    assert turns == [
        {"role": "user", "content": "[[ ## ticket ## ]]\na"},
        {"role": "assistant", "content": "[[ ## place ## ]]\nb\n\n[[ ## completed ## ]]\n"},
        {
            "role": "user",
            "content": "[[ ## ticket ## ]]\nx\n\nRespond with the corresponding output fields, "
            "starting with the field `[[ ## place ## ]]`, and then ending with the marker for "
            "`[[ ## completed ## ]]`.",
        },
    ]
    said = dspy.ChatAdapter().format_assistant_message_content(SIGNATURE, {"place": "b"})
    assert said == turns[1]["content"], "ChatAdapter.format_assistant_message_content"


def test_chat_adapter_format_system_message_can_be_put_on_the_instance() -> None:
    adapter = copy.copy(dspy.ChatAdapter())
    asked = []

    def written(signature: Any) -> str:
        asked.append(signature)
        return "as written"

    adapter.format_system_message = written
    engine = Engine()
    with dspy.context(lm=language_model(engine), adapter=adapter):
        dspy.Predict(SIGNATURE)(ticket="x")
    assert asked == [SIGNATURE] and "as written" in text_of(engine.requests[0])


def test_chat_adapter_use_json_adapter_fallback() -> None:
    from dspy.utils.exceptions import AdapterParseError

    calls = {}
    for fallback in (True, False):
        adapter, engine = copy.copy(dspy.ChatAdapter()), Engine("nothing of the kind")
        adapter.use_json_adapter_fallback = fallback
        with (
            dspy.context(lm=language_model(engine), adapter=adapter),
            pytest.raises(AdapterParseError) as raised,
        ):
            dspy.Predict(SIGNATURE)(ticket="x")
        assert list(raised.value.signature.output_fields) == ["place"]
        calls[fallback] = len(engine.requests)
    assert calls[False] == 1 < calls[True], "use_json_adapter_fallback"


# --- callbacks, settings, history -----------------------------------------------------------------


def test_callbacks_of_a_predictor_hear_its_calls_also_those_that_fail() -> None:
    from dspy.utils.callback import BaseCallback

    heard: list[Any] = []

    class Hears(BaseCallback):
        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append((call_id, instance, inputs["kwargs"]))

        def on_module_end(
            self, call_id: str, outputs: Any, exception: BaseException | None = None
        ) -> None:
            heard.append((call_id, outputs, exception))

    engine = Engine()
    program = Program()
    program.say.lm = language_model(engine)
    program.say.callbacks = [*program.say.callbacks, Hears()]
    program(ticket="x")
    engine.text = "nothing of the kind"
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(adapter=adapter), pytest.raises(Exception, match="place"):
        program(ticket="y")
    first, first_end, second, second_end = heard  # the predictor's alone, not the program's
    assert first[1] is second[1] is program.say
    assert (first[2], second[2]) == ({"ticket": "x"}, {"ticket": "y"}), "inputs['kwargs']"
    assert first[0] == first_end[0] != second[0] == second_end[0], "call_id"
    assert isinstance(first_end[1], dspy.Prediction) and first_end[2] is None
    assert second_end[1] is None and second_end[2] is not None


def test_settings_go_along_with_context_variables() -> None:
    seen = []
    with dspy.context(adapter=dspy.JSONAdapter()):
        context = contextvars.copy_context()
    for run in (context.run, lambda function: function()):
        thread = threading.Thread(target=run, args=(lambda: seen.append(dspy.settings.adapter),))
        thread.start()
        thread.join()
    assert isinstance(seen[0], dspy.JSONAdapter) and not isinstance(seen[1], dspy.JSONAdapter)


def test_settings_tell_which_are_as_they_come() -> None:
    assert DEFAULT_CONFIG.keys() <= dspy.settings.config.keys()
    of_a_call = {"callbacks", "trace", "send_stream", "usage_tracker", "caller_modules"}
    assert of_a_call <= DEFAULT_CONFIG.keys() and DEFAULT_CONFIG["rm"] is None
    with dspy.context(rm="shelf"):
        assert dspy.settings.config["rm"] == "shelf" and DEFAULT_CONFIG["rm"] is None


def test_history_holds_usage_and_cost_unless_disable_history() -> None:
    lm = language_model(Engine())
    with dspy.context(disable_history=True):
        lm("hi")
    assert lm.history == [], "disable_history"
    with dspy.context(disable_history=False):
        assert lm("hi") == [ANSWER]
    entry = lm.history[-1]
    assert entry["usage"]["total_tokens"] == 5, "history's usage"
    assert "cost" in entry, "history's cost"


def test_a_truncated_answer_is_told_by_the_logger_dspy_clients_lm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = language_model(Engine(finish_reason="length"))
    # DSPy's loggers do not propagate once it has set them up.
    logger = logging.getLogger("dspy.clients.lm")
    logger.addHandler(caplog.handler)
    try:
        lm("hi")
    finally:
        logger.removeHandler(caplog.handler)
    assert any("truncated" in record.getMessage() for record in caplog.records)


# --- the language model and its engine ------------------------------------------------------------


def test_lm_copy_sets_attributes_and_the_settings_of_calls() -> None:
    engine, other, later = Engine(), Engine(), AsyncEngine()
    lm = language_model(engine, temperature=0.5)
    copied = lm.copy(
        model="local@2", cache=True, num_retries=2, temperature=0.9, top_p=0.8,
        engine=other, async_engine=later,
    )  # fmt: skip
    assert (copied.model, copied.cache, copied.num_retries) == ("local@2", True, 2)
    assert copied.kwargs["temperature"] == 0.9 and copied.kwargs["top_p"] == 0.8, "LM.kwargs"
    assert lm.model == "local@1" and lm.kwargs["temperature"] == 0.5 and not lm.cache
    assert copied.engine is other and lm.engine is engine, "LM.engine"
    assert type(copied) is type(lm) and copied.history is not lm.history
    copied.copy(cache=False)("hi")
    assert other.requests[0].model == "local@2", "Request.model is LM.model"
    config = other.requests[0].config
    assert (config.temperature, config.top_p) == (0.9, 0.8), "Request.config"


def test_lm_infer_provider_is_asked_when_the_engine_is_there() -> None:
    from dspy.clients.provider import Provider

    class Own(dspy.LM):
        def infer_provider(self) -> Provider:
            assert isinstance(self.engine, Engine)
            provider = Provider()
            provider.finetunable = True
            return provider

    assert Own("local@1", engine=Engine()).provider.finetunable


def test_lm_state_holds_the_engines() -> None:
    lm = dspy.LM("local@1", engine=SavedEngine("mine"), temperature=0.5)
    state = lm.dump_state()
    assert state["engine"]["state"] == {"text": "mine"}, "the engine's dump_state"
    loaded = type(lm).load_state(
        {name: value for name, value in state.items() if name != "_dspy_lm_class"},
        allow_custom_lm_class=True,
    )
    assert loaded.engine.text == "mine" and loaded.kwargs["temperature"] == 0.5
    assert pickle.loads(pickle.dumps(loaded)).engine.text == "mine", "LM.__setstate__"
    assert copy.copy(loaded).engine is loaded.engine, "LM.__copy__"


def test_lm15_requests_and_their_config() -> None:
    assert {field.name for field in fields(lm15.Request)} >= {
        "model", "messages", "system", "tools", "config",
    }  # fmt: skip
    known = {"temperature", "top_p", "max_tokens", "stop", "seed", "logprobs"}
    refused = {
        "top_k", "response_format", "tool_choice", "reasoning", "frequency_penalty",
        "presence_penalty", "probabilities", "extensions",
    }  # fmt: skip
    other = {"cache", "service_tier", "store", "user_id"}  # a provider's, which change no answer
    assert {field.name for field in fields(lm15.Config)} == known | refused | other, "lm15.Config"
    config = lm15.Config()
    assert all(not getattr(config, name) for name in known | refused | other)


@pytest.mark.parametrize(
    "kind",
    [
        "ContextLengthError",
        "UnsupportedModelError",
        "UnsupportedFeatureError",
        "InvalidRequestError",
    ],
)
def test_lm15_errors_are_not_retried(kind: str) -> None:
    engine = Engine()
    error = getattr(lm15, kind)
    engine.error = error("no", feature="x") if "Feature" in kind else error("no")
    assert isinstance(engine.error, lm15.LM15Error)
    with pytest.raises(dspy.LMError) as raised:
        language_model(engine).copy(num_retries=3)("hi")
    assert len(engine.requests) == 1, f"{kind} was retried"
    assert isinstance(raised.value.code, str) and raised.value.retry_after is None


# --- training -------------------------------------------------------------------------------------


def test_provider_jobs_and_formats() -> None:
    from concurrent.futures import Future

    from dspy.clients.provider import Provider, ReinforceJob, TrainingJob
    from dspy.clients.utils_finetune import GRPOStatus, TrainDataFormat, TrainingStatus

    provider = Provider()
    assert (provider.finetunable, provider.reinforceable) == (False, False)
    assert (provider.TrainingJob, provider.ReinforceJob) == (TrainingJob, ReinforceJob)
    job = ReinforceJob(language_model(Engine()), {"seed": 1})
    assert (job.train_kwargs, job.checkpoints, job.last_checkpoint) == ({"seed": 1}, {}, None)
    assert issubclass(TrainingJob, Future)
    states = ["not_started", "pending", "running", "succeeded", "failed", "cancelled"]
    assert [TrainingStatus[name].value for name in states] == states
    assert (TrainDataFormat.CHAT, TrainDataFormat.GRPO_CHAT) == ("chat", "grpo_chat")
    assert set(GRPOStatus.__annotations__) == {
        "job_id", "status", "current_model", "checkpoints", "last_checkpoint", "pending_batch_ids",
    }  # fmt: skip


def test_lm_finetune_and_reinforce_go_through_the_provider() -> None:
    from dspy.clients.provider import Provider, ReinforceJob, TrainingJob

    class Own(Provider):
        def __init__(self) -> None:
            super().__init__()
            self.finetunable = self.reinforceable = True
            self.TrainingJob, self.ReinforceJob = TrainingJob, Job

        def finetune(
            self, job: Any, model: str, train_data: Any, train_data_format: Any, train_kwargs: Any
        ) -> str:
            assert (train_data, train_data_format, train_kwargs) == ([1], None, {"seed": 1})
            return f"{model}+"

    class Job(ReinforceJob):
        def initialize(self) -> None:
            self.begun = True

    lm = dspy.LM("local@1", engine=Engine(), provider=Own())
    trained = lm.finetune([1], None, {"seed": 1}).result(timeout=10)
    assert isinstance(trained, dspy.LM) and trained.model == "local@1+", "Provider.finetune"
    assert lm.reinforce({"seed": 1}).begun, "ReinforceJob.initialize"


def test_teleprompter_compile_is_heard_once_and_better_together_joins() -> None:
    from dspy.teleprompt import Teleprompter
    from dspy.utils.callback import BaseCallback

    heard = []

    class Hears(BaseCallback):
        def on_compile_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            heard.append(type(instance))

    class Own(Teleprompter):
        def compile(self, student: Any, *, trainset: Any, **kwargs: Any) -> Any:
            return student

    with dspy.context(callbacks=[Hears()]):
        Own().compile(Program(), trainset=[])
    assert heard == [Own], "Teleprompter.compile"
    assert dspy.BetterTogether.STRAT_SEP == " -> ", "BetterTogether.STRAT_SEP"
