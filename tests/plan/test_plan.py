"""Plans against what models really are, and what they advise."""

import json
from pathlib import Path

import dspy
import pytest
import torch
from chat_families import save_family
from model_sizes import QWEN
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig
from typer.testing import CliRunner

import fst_dspy
from fst_dspy.cli.app import app
from fst_dspy.config import FSTConfig, LoraConfig
from fst_dspy.errors import ModelError
from fst_dspy.loop import parts
from fst_dspy.model import hardware
from fst_dspy.model.policy import Policy
from fst_dspy.model.sizes import active_count, described, parameter_count
from fst_dspy.plan import plan as plan_module
from fst_dspy.plan.files import plan_of_files
from fst_dspy.plan.memory import fitting_lora, memory_of, trainable_count
from fst_dspy.plan.plan import make_plan
from fst_dspy.plan.prompts import Prompts, prompts_of
from fst_dspy.types import Arm

GIB = 2**30
EXAMPLES = [
    dspy.Example(question="where does a visa ticket go? " * 4, answer="x").with_inputs("question")
]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    Qwen3Config(**QWEN).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    return tmp_path


def machine(monkeypatch: pytest.MonkeyPatch, gib: float, *, bfloat16: bool = True) -> None:
    monkeypatch.setattr(plan_module, "total_memory", lambda device: int(gib * GIB))
    monkeypatch.setattr(plan_module, "measured_flops", lambda *_: 1e12)  # whatever else it does
    for module in (hardware, plan_module):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: bfloat16)


def planned(folder: Path, arm: Arm = "fst", **settings: object) -> plan_module.Plan:
    config = FSTConfig.make(**{"max_cycles": 2, **settings})
    program = dspy.Predict("question -> answer")
    return plan_of_files(folder, program, EXAMPLES, config, device="cpu", arm=arm)


def test_a_model_of_qwens_size_is_planned_with_all_defaults(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 64)
    plan = planned(qwen)
    assert plan.parameters == plan.trainable == 596_049_920
    assert (plan.dtype, plan.adapters, plan.problems) == ("bfloat16", None, ())
    assert plan.learning_rate == pytest.approx(1.1e-5)  # and not the embedded model's
    memory = plan.memory
    assert memory.weights == memory.gradients == 2 * plan.parameters
    assert memory.optimizer == 12 * plan.parameters  # 16 bytes a parameter with the two above
    assert 10 * GIB < plan.peak_memory < 0.8 * 64 * GIB
    assert plan.max_tokens == 512 and not plan.prompts_counted
    assert 60 < plan.prompt_tokens < 400
    assert plan.steps == 12 and plan.rollouts_per_step == 64
    assert plan.rollouts > 2 * (6 * 64 + 48)
    assert plan.seconds > plan.steps * plan.seconds_per_step > 0
    assert plan.timing == "estimated"


def test_a_plan_counts_the_validation_examples_that_there_are(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 64)
    program, config = dspy.Predict("question -> answer"), FSTConfig.make(max_cycles=2)
    few, many, asked = (
        plan_of_files(qwen, program, EXAMPLES, config, device="cpu", val_examples=count)
        for count in (8, 500, None)
    )
    assert asked.rollouts == many.rollouts == few.rollouts + 3 * (48 - 8)


def test_adapters_are_trained_where_all_weights_do_not_fit(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 8)
    plan = planned(qwen)
    assert plan.adapters == 16 and plan.problems == ()
    assert plan.learning_rate > 1e-4  # ten times that of all weights
    assert plan.trainable < 0.03 * plan.parameters
    full = planned(qwen, lora=False)
    assert full.adapters is None and "lora=True" in full.problems[0]


def test_what_text_would_take_later_is_told_beside_the_memory(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(arm: Arm = "fst", **settings: object) -> bool:
        plan = planned(qwen, arm, **settings)
        words = f"; {plan.later_memory / GIB:.3g} GiB more if text comes to teach the weights"
        assert plan.later_memory in (0, 4 * plan.parameters)
        return dict(plan.lines())["memory"].endswith(words)

    machine(monkeypatch, 64)
    assert told() and told("rl_only")
    assert not (told("gepa_only") or told(slow_signal="reward") or told(slow_signal="both"))
    assert not told(teacher_update_rate=1.0)


def test_adapters_are_advised_wherever_all_weights_are_trained(qwen: Path) -> None:
    prompts = Prompts(1, 350, True)
    plan = make_plan(
        described(qwen), "qwen", FSTConfig.make(lora=False), prompts,
        dtype=torch.bfloat16, device=torch.device("cuda"), max_tokens=512, context=4096,
        flops=1e14, total=16 * GIB,
    )  # fmt: skip
    (problem,) = plan.problems
    assert "may not fit" in problem and "lora=True" in problem


def test_on_a_gpu_all_rows_of_a_step_are_counted_that_memory_holds(qwen: Path) -> None:
    own, sixteen, all_of_them = (
        make_plan(
            described(qwen), "qwen", FSTConfig.make(lora=False, micro_batch_size=rows),
            Prompts(1, 350, True), dtype=torch.bfloat16, device=torch.device("cuda"),
            max_tokens=24, context=4096, flops=1e14, total=139 * GIB,
        )
        for rows in (None, 16, 64)
    )  # fmt: skip
    assert own.memory == all_of_them.memory  # as SlowTrainer does
    assert own.memory.activations == pytest.approx(4 * sixteen.memory.activations)


def test_the_time_of_a_mixture_is_that_of_the_experts_in_use() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16, "head_dim": 8,
             "num_attention_heads": 4, "vocab_size": 64, "num_experts": 16}  # fmt: skip
    with torch.device("meta"):
        few, all_of_them = (
            AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, num_experts_per_tok=used))
            for used in (2, 16)
        )
    experts = 2 * 16 * 3 * 32 * 16
    assert active_count(all_of_them) == parameter_count(all_of_them) == parameter_count(few)
    assert active_count(few) == parameter_count(few) - experts * 14 // 16


def test_what_does_not_fit_at_all_is_told(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1)
    assert "smaller model" in planned(qwen).problems[0]


def test_float32_where_the_cpu_has_no_bfloat16(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 64, bfloat16=False)
    plan = planned(qwen)
    assert plan.dtype == "float32" and plan.memory.optimizer == 8 * plan.parameters


@pytest.mark.parametrize("lora", [False, True])
def test_what_a_run_folder_takes_is_planned(
    lora: bool, tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "free_bytes", lambda folder: 10)
    fst = fst_dspy.FST(
        lambda gold, pred, *_: float(len(pred.answer) % 7),
        lora=lora, log_dir=tmp_path, max_cycles=3, on_no_signal="warn",
        val_size=2, first_cycle_iterations=1, minibatch_size=2, max_tokens=4,
        steps_per_cycle=1, problems_per_step=1, group_size=4,
    )  # fmt: skip
    lm = fst_dspy.LocalLM(str(tiny_qwen3), device="cpu")
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        other = [dspy.Example(question="why?", answer="x").with_inputs("question")]
        fst.compile(dspy.Predict("question -> answer"), trainset=EXAMPLES, valset=other)
    plan = json.loads((tmp_path / "plan.json").read_text())
    # Three checkpoints, of which one is being written, and two versions.
    weight, state = (4, 12) if lora else (4, 8)
    assert plan["disk"] == plan["trainable"] * (3 * (weight + state) + 2 * weight)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 2 * plan["trainable"] * weight < kept < plan["disk"]
    assert any("choose another log_dir" in problem for problem in plan["problems"])


@pytest.mark.parametrize("name", ["qwen3-moe", "mamba2"])
def test_adapters_are_counted_as_they_are_made(name: str, tmp_path: Path) -> None:
    policy = Policy.load(save_family(tmp_path, name), device="cpu")
    lora = LoraConfig(rank=4)
    shapes = policy.adapter_shapes(lora).values()
    counted = trainable_count(policy.model, lora)
    assert counted == sum(torch.Size(shape).numel() for shape in shapes)
    policy.add_lora(lora, 0)
    assert counted == sum(weight.numel() for weight in policy.trainable_state().values())
    assert trainable_count(policy.model, lora) == counted
    assert trainable_count(policy.model, None) == parameter_count(policy.model)


def test_adapters_that_a_model_cannot_have_are_told(tmp_path: Path) -> None:
    policy = Policy.load(save_family(tmp_path, "qwen3-moe"), device="cpu")
    with pytest.raises(ModelError, match=r"dropout=0\.1.*Qwen3Moe.*other lora settings"):
        trainable_count(policy.model, LoraConfig(rank=2, dropout=0.1))


def test_the_choice_of_adapters_is_a_matter_of_size(tiny_qwen3: Path) -> None:
    model = Policy.load(tiny_qwen3, device="cpu").model
    cpu = torch.device("cpu")
    need = memory_of(model, torch.float32, None).peak(cpu)
    assert fitting_lora(model, torch.float32, cpu, int(need / 0.8) + 1) is None
    assert fitting_lora(model, torch.float32, cpu, int(need / 0.8) - 9) == LoraConfig()


def test_prompts_are_rendered_as_the_adapter_does() -> None:
    class Two(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = dspy.Predict("question -> notes")
            self.second = dspy.Predict("question, notes -> answer")

    found = prompts_of(Two(), EXAMPLES, lambda text: len(text.split()))
    assert found.calls == 2 and found.counted
    alone = prompts_of(dspy.Predict("question -> notes"), EXAMPLES, lambda text: len(text.split()))
    assert alone.calls == 1 and found.tokens > alone.tokens > len(EXAMPLES[0].question.split())


def test_measured_times_take_the_place_of_estimates(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 64)
    plan = planned(qwen)
    learned = plan.seconds_per_step * 3 / 4  # an estimate still: nothing has been learned so far
    # Eight rollouts of a problem, two under each of four candidates, whose prompts are read once.
    assert plan.read_share == 0.5
    read = plan.prompt_tokens / 2 + plan.max_tokens
    sampled = 64 * 2 * read / (plan.prompt_tokens + plan.max_tokens)
    slower = plan.measured(seconds=96.0, rollouts=48)  # two seconds a rollout
    assert slower.timing == "measured"
    assert slower.seconds_per_step == pytest.approx(sampled + learned)
    apart = plan.rollouts - 64 * plan.steps
    assert slower.seconds == pytest.approx(2 * apart + plan.steps * slower.seconds_per_step)
    assert (slower.rollouts, slower.steps) == (plan.rollouts, plan.steps)
    tokens = {"prompt": 48 * 3 * plan.prompt_tokens, "completion": 48 * 3 * plan.max_tokens}
    longer = plan.measured(96.0, 48, tokens=tokens)
    assert longer.seconds_per_step == pytest.approx(sampled + 3 * learned)
    short = plan.measured(96.0, 48, tokens={"prompt": 4800, "completion": 0})
    assert short.seconds_per_step == pytest.approx(64 + learned * 50 / read)
    fewer = plan.measured(96.0, 48, allowed=plan.rollouts // 2)
    assert fewer.rollouts == plan.rollouts // 2 and fewer.steps == round(
        plan.steps * fewer.rollouts / plan.rollouts
    )
    alone = planned(qwen, arm="rl_only")
    assert alone.read_share == 1 / 8 and alone.seconds_per_step < plan.seconds_per_step


def test_the_command_prints_json_and_its_exit_code_tells(qwen: Path) -> None:
    done = CliRunner().invoke(
        app, ["plan", "triage", "--model", "embedded", "--device", "cpu", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["learning_rate"] == 3e-4 and found["prompts_counted"]
    assert found["dtype"] == "float32" and found["adapters"] is None
    done = CliRunner().invoke(
        app, ["plan", "triage", "--model", str(qwen), "--device", "cpu", "--set", "lora=true"]
    )
    assert "596 M parameters" in " ".join(done.output.split())


@pytest.mark.parametrize("device", ["foo", "meta", "gpu:7"])
def test_a_device_that_there_is_not_is_told(device: str) -> None:
    done = CliRunner().invoke(app, ["plan", "triage", "--device", device])
    assert done.exit_code == 1 and f"there is no device '{device}'" in done.output


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        planned(tmp_path / "none")
