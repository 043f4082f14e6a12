"""Tiny random models with tokenizers of their own, made once a session."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fst_dspy.lm.engine as engine_module
from fst_dspy.lm.requests import Pending
from fst_dspy.model.policy import Policy

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Only the tests of the GPU use one, in this process or another: others compare to rounding."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# How long an example takes says something about the machine only, and a failure must come back.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

TEXTS = [
    "You answer questions about tickets. Send the ticket to the right queue.",
    "[[ ## question ## ]]\nwhere does a visa ticket go?\n\n[[ ## answer ## ]]\nsilver queue",
    "[[ ## reasoning ## ]]\nThe rule says visa goes to silver.\n\n[[ ## completed ## ]]",
    "Your input fields are: 1. `question` (str). Your output fields are: 1. `answer` (str).",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?{}\"'`#[]()",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # far from uniform, so that greedy and nucleus tests mean something
}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 tokens, with ``<|im_end|>`` as its end token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def make_model(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> torch.nn.Module:
    """A random model of one of the three kinds, in float32."""
    shape = SHAPE | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if kind == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(**shape, num_hidden_layers=2, head_dim=8, tie_word_embeddings=True)
        )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2))
    layers = ["conv", "full_attention", "conv"]
    return Lfm2ForCausalLM(
        Lfm2Config(
            **shape,
            num_hidden_layers=3,
            layer_types=layers,
            conv_L_cache=4,
            conv_bias=False,
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=True,
        )
    )


def save_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a tiny model with its tokenizer, as a user's model folder would be."""
    tokenizer = make_tokenizer()
    make_model(kind, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache() -> None:
    """An empty response cache for every test, and none on disk."""
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    dspy.cache.reset_memory_cache()


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen3."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_lfm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Lfm2: convolutions and attention."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-lfm2", "lfm2")


@pytest.fixture(params=["qwen3", "llama", "lfm2"])
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """Folder of each tiny model in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def repeatable_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed for every call without one, the same however threads run and in every run of the test.

    Calls are told apart as rollouts are: by their prompt and how often it was asked before.
    """
    real, asked, guard = engine_module.prepare, Counter[tuple[int, ...]](), threading.Lock()

    def prepare(policy: Policy, request: dspy.lm15.Request, seed: int) -> Pending:
        pending = real(policy, request, seed)
        if request.config.seed is None:
            prompt = pending.generation.prompt_ids_T
            with guard:
                asked[prompt] += 1
                own = Random(repr((prompt, asked[prompt]))).getrandbits(63)
            pending.generation = replace(pending.generation, seed=own)
        return pending

    monkeypatch.setattr(engine_module, "prepare", prepare)


@pytest.fixture
def jobs_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of experiments without a process each, which spends its time on importing."""
    from fst_dspy.experiments import Job, process, runner, stream_worker, streams, worker

    runs = {Job.module: worker.run_job, streams.MODULE: stream_worker.run_stream}

    def start(folder: Path, job: Job, workers: int) -> SimpleNamespace:
        code = process.work(runs[job.module], str(folder))
        return SimpleNamespace(returncode=code, poll=lambda: code)

    monkeypatch.setattr(runner, "_start", start)
