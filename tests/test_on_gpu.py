"""`benchmarks/on_gpu.py` on the CPU: every part in small, what its checks need, and a report that nothing can lose."""

import dataclasses
import json
import sys

import common
import numpy as np
import on_gpu
import pytest
from conftest import ROOT, tiny_network
from gpu_checks import scripts
from gpu_checks.time import union

TINY = dataclasses.replace(on_gpu.TINY, image_size=8, batch=2, steps=3, matrix=8)


@pytest.fixture
def tiny(monkeypatch, tiny_networks):
    """Networks of two weights, and scripts that run in this process."""
    import tensorflow as tf

    import diffusion_model
    import unet
    from support.signals import Interruption
    from training import settings

    monkeypatch.setattr(unet, "NaiveUnet", tiny_network)
    monkeypatch.setattr(common, "operations", lambda *setting: 1e3)

    def train_here(name, *words, folder, until):
        monkeypatch.chdir(folder)
        options = settings.parse_options("", [str(word) for word in words])
        diffusion_model.train_model(options, options["model"], Interruption())
        return 0, "device    CPU\nEpoch :0 loss :3.0\n", None

    monkeypatch.setattr(scripts, "run", train_here)
    # It cannot be undone, and would take XLA from the tests that follow in this process.
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: None)
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


FAST = (
    "find_device",
    "train_in_bfloat16",
    "resume_exactly",
    "training_tf32_xla",
    "training_bfloat16_xla_in_two_parts",
    "reverse_steps",
    "losses_bfloat16",
)


@pytest.mark.parametrize("name", FAST)
def test_a_check_runs_in_small(tiny, name):
    result = on_gpu.CHECKS[name].function(TINY)
    assert result and json.loads(json.dumps(result)) == result
    numbers = [value for value in result.values() if isinstance(value, float)]
    assert np.all(np.isfinite(numbers)) and all(number >= 0 for number in numbers)


def test_the_profile_names_what_runs(tiny):
    result = on_gpu.CHECKS["profile_of_training"].function(TINY)
    assert 0 <= result["fraction of the time the device waits"] < 1 and result["busy, ms a step"] > 0
    assert len(result) == 13


def test_a_resumed_run_that_differs_is_a_failure(tiny, monkeypatch):
    run_script, runs = scripts.run, []

    def forgetful(name, *words, folder, until):
        runs.append(words)
        return run_script(name, *words, "--learning-rate", 1e-3 * len(runs), folder=folder, until=until)

    monkeypatch.setattr(scripts, "run", forgetful)
    with pytest.raises(RuntimeError, match="differ by up to"):
        on_gpu.CHECKS["resume_exactly"].function(TINY)


def test_memory_advice_is_followed_until_a_batch_fits(monkeypatch):
    tried, run_out_of_memory = [], on_gpu.CHECKS["run_out_of_memory"].function

    def train(size, folder, *words):
        tried.append(size.batch)
        (np.save(f"{folder}/images.npy", np.zeros(1)), None)
        fits = size.batch <= 4
        return (0, "", None) if fits else (1, f"do not fit in memory; add --batch-size {size.batch // 2}", None)

    monkeypatch.setattr(scripts, "train", train)
    assert run_out_of_memory(dataclasses.replace(TINY, absurd_batch=16)) == {"tried": [16, 8, 4], "fits": 4}
    monkeypatch.setattr(scripts, "train", lambda *more: (1, "Killed", None))
    with pytest.raises(RuntimeError, match="no advice at batches of 16:\nKilled"):
        run_out_of_memory(dataclasses.replace(TINY, absurd_batch=16))


def test_union_is_the_time_that_intervals_cover():
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert union([]) == 0


@pytest.mark.parametrize(
    "needs, facts, why",
    [
        (("tensorflow",), {}, None),
        (("tensorflow", "gpu"), {"gpus": 1}, None),
        (("tensorflow", "gpu"), {"gpus": 0}, "needs a GPU"),
        (("tensorflow", "gpu"), {}, "needs a GPU"),
        (("tensorflow", "gpus"), {"gpus": 1}, "needs several GPUs"),
        (("no_such_package",), {"gpus": 1}, "needs the package no_such_package"),
    ],
)
def test_check_without_its_requirements_says_what_it_needs(needs, facts, why):
    assert on_gpu.missing(needs, facts) == why


def test_processes_stand_for_several_gpus_in_small():
    assert [on_gpu.missing(("gpus",), {"gpus": gpus}, tiny=True) for gpus in (0, 1)] == [None, "needs several GPUs"]


def run(monkeypatch, folder, outcomes, *words):
    """Runs `main` with stand-ins for the processes of the checks; returns what ran, and the report."""
    ran, limits = [], {}

    def run_check(name, options, facts, seconds):
        ran.append(name)
        limits[name] = seconds
        return outcomes.get(name, ("ok", {"result": {"gpus": 0}}))

    monkeypatch.setattr(on_gpu, "run_check", run_check)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--tiny", "--out", str(folder), *words])
    on_gpu.main()
    assert all(
        limits[name] <= 4 * on_gpu.CHECKS[name].seconds for name in ran[1:] if on_gpu.CHECKS[name].part != "good"
    )
    return ran, json.loads((folder / "report.json").read_text())["checks"]


def test_a_report_continues_where_it_was_cut_off(monkeypatch, tmp_path, capsys):
    error = {"error": "Traceback\nValueError: | broken"}
    ran, checks = run(monkeypatch, tmp_path, {"train_in_float16": ("failed", error)}, "--only", "runs")
    assert ran[0] == "find_device" and "run_out_of_memory" not in ran
    assert checks["run_out_of_memory"] == {"part": "runs", "status": "skipped", "seconds": 0.0, "why": "needs a GPU"}
    assert "will be skipped: run_out_of_memory, needs a GPU" in capsys.readouterr().out
    page = (tmp_path / "report.md").read_text()
    assert "| train in float16 | failed: see below |" in page and "ValueError: | broken" in page

    assert run(monkeypatch, tmp_path, {}, "--only", "runs")[0] == ["find_device"]
    assert run(monkeypatch, tmp_path, {}, "--only", "runs", "--again")[0] == ["find_device", "train_in_float16"]
    ran, checks = run(monkeypatch, tmp_path, {}, "--only", "right", "--minutes", "0")
    assert ran == ["find_device"] and checks["losses_tf32"]["status"] == "not reached"
    ran, checks = run(monkeypatch, tmp_path, {}, "--only", "right")
    assert "losses_tf32" in ran and checks["losses_tf32"]["status"] == "ok"


def test_slow_checks_come_last_before_the_final_training(monkeypatch, tmp_path):
    slow = {"losses_float32": ("out of time", {"why": "not done"})}
    only = ("--only", "right,good")
    first, _ = run(monkeypatch, tmp_path, slow | {"losses_tf32": slow["losses_float32"]}, *only, "--minutes", "5")
    assert first[1] == "losses_float32" and first[-1] == "train_for_the_rest"
    (tmp_path / "report.json").write_text((tmp_path / "report.json").read_text().replace('"ok"', '"not reached"'))
    again, checks = run(monkeypatch, tmp_path, {}, *only)
    assert again[-3:] == ["losses_float32", "losses_tf32", "train_for_the_rest"]
    assert checks["losses_float32"]["status"] == "ok"


def test_a_report_belongs_to_one_device(monkeypatch, tmp_path):
    named = {"find_device": ("ok", {"result": {"gpus": 1, "name": "one"}})}
    run(monkeypatch, tmp_path, named, "--only", "good")
    with pytest.raises(SystemExit, match="report of one, and this is two"):
        run(monkeypatch, tmp_path, {"find_device": ("ok", {"result": {"gpus": 1, "name": "two"}})})


def test_the_full_sizes_are_not_for_a_computer_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "run_check", lambda *arguments: ("ok", {"result": {"gpus": 0}}))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--tiny"):
        on_gpu.main()


@pytest.mark.parametrize(
    "facts, batch", [("550.54, 15360 MiB", 32), ("550, 81559 MiB", 64), ("1, 24564 MiB\n1, 24564 MiB", 32), ("", 64)]
)
def test_a_batch_fits_on_the_card(facts, batch):
    assert on_gpu.full_size({"driver, memory": facts}) == dataclasses.replace(on_gpu.FULL, batch=batch)


def test_checks_are_in_the_order_of_their_parts():
    parts = [part for part, *_ in on_gpu.CHECKS.values()]
    assert parts == sorted(parts, key=on_gpu.PARTS.index) and set(parts) == set(on_gpu.PARTS)


@pytest.mark.parametrize("broken, status", [(False, "ok"), (True, "failed"), (None, "out of time")])
def test_a_check_in_a_process_of_its_own(monkeypatch, tmp_path, broken, status):
    program = tmp_path / "program.py"
    ends = {False: "print('RESULT {\"a\": 1}')", True: "raise ValueError('whole error')", None: "time.sleep(60)"}
    program.write_text(f"import time\nprint('chatter')\n{ends[broken]}\n")
    monkeypatch.setattr(on_gpu, "__file__", str(program))
    options = on_gpu.parse_options(["--out", str(tmp_path)])
    got, more = on_gpu.run_check("find_device", options, {}, 1 if broken is None else 20)
    assert got == status
    assert {"ok": "a", "failed": "whole error", "out of time": "within 1 s"}[status] in str(more)


@pytest.mark.slow
def test_all_checks_run_in_small(run, tmp_path):
    """The real processes, five minutes of them."""
    process = run(f"{ROOT}/benchmarks/on_gpu.py", "--tiny", "--minutes", "15", "--out", "out", timeout=1000)
    assert process.returncode == 0, process.stderr
    checks = json.loads((tmp_path / "out" / "report.json").read_text())["checks"]
    assert checks.keys() == on_gpu.CHECKS.keys()
    assert {check["status"] for check in checks.values()} <= {"ok", "skipped"}
