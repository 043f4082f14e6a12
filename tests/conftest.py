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
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # names that stand for no model are asked for in tests
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import save_model

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
