"""``benchmarks/machines/gpu.py`` runs on the CPU too, and measures what it says."""

import json

import pytest

from benchmarks.machines.gpu import main


@pytest.mark.slow
def test_the_quick_run_on_the_cpu_writes_every_figure_beside_its_floor(tmp_path):
    out = tmp_path / "gpu.json"
    main(device="cpu", quick=True, out=out)
    report = json.loads(out.read_text())
    assert report["machine"]["device"] and report["command"].endswith("--device cpu --quick")
    assert all(rate > 1e6 for rate in report["ceilings"].values())
    (size,) = report["sizes"]
    generation, step, compile_ = (size[name] for name in ("generation", "step", "compile"))
    for figures in (generation, step, compile_):
        assert figures["floor_share"] == figures["floor_seconds"] / figures["seconds"]
        assert figures["floor_seconds"] > 0
    # 8 rows of 6 tokens that no end token cut short; 8 rows of 120 + 6.
    assert generation["tokens_per_second"] == pytest.approx(48 / generation["seconds"])
    assert step["tokens"] == 8 * 126
    decoding = size["decoding"]
    assert decoding["static_seconds"] > 0 < decoding["growing_seconds"]
    assert decoding["agreeing_tokens"] == 1 and decoding["logprob_difference"] < 1e-4
    # Both loops take the same step, or else their times could not be compared.
    assert step["loss"] == pytest.approx(step["plain_loss"], rel=1e-4)
    assert compile_["steps"] == 2 and compile_["kl_to_base"] > 0
    assert compile_["tokens"]["completion"] == 6 * compile_["rollouts"]
