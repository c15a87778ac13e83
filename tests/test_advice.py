"""Advice on settings."""

import os
import re
import types

import pytest
import tensorflow as tf
from conftest import TINY
from tensorflow.python.client import device_lib

import ddpm
import diffusion_model
from support import device
from training import advice, preparation, settings


@pytest.mark.parametrize(
    "beta1, beta2, T, way_out",
    [
        (1e-4, 0.02, 1000, None),  # the slides
        (1e-4, 0.5, 20, None),  # the tests
        (0.3, 0.3, 20, None),
        (1e-4, 0.02, 100, "--beta2 0.2"),
        (1e-4, 0.02, 500, None),
        (1e-4, 0.02, 400, "--beta2 0.05"),
        (1e-4, 0.02, 30, "--beta2 0.67"),
        (1e-4, 1e-3, 1000, "--beta2 0.02"),
        (1e-6, 1e-6, 5000, "--beta2 0.004"),
        (0.01, 0.02, 100, "--beta2 0.2"),
        (1e-4, 0.02, 20, "--T 1000"),  # a β₂ of 1 is none
        (1e-4, 0.05, 5, "--T 500"),
        (0.3, 0.3, 2, "--T 50"),
        (0.5, 0.5, 1, "--T 25"),
        (1e-6, 1e-5, 10, "--T 1000 --beta2 0.02"),
    ],
)
def test_schedule_that_ends_far_from_noise_gets_useful_advice(beta1, beta2, T, way_out):
    sentence, left = advice.on_schedule(beta1, beta2, T), float(ddpm.ddpm_schedule(beta1, beta2, T)["sqrtab"][-1])
    assert (sentence is None) == (way_out is None) == (left <= 0.1)
    if sentence:
        assert sentence.endswith(f"; try {way_out}") and f"{left:.2g} times" in sentence
        better = {"beta1": beta1, "beta2": beta2, "T": T}
        better |= {name: float(value) for name, value in re.findall(r"--(beta2|T) (\S+)", way_out)}
        assert ddpm.ddpm_schedule(**better)["sqrtab"][-1] <= 0.01


def test_schedule_advice_is_given_only_to_new_models(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "choose_data", lambda *more: more[2].update(classes=[]) or (None, None))
    monkeypatch.setattr(preparation, "build_network", lambda *more: None)
    for options, path, told in (
        ({"T": 100, "schedule": "linear"}, "new.keras", True),
        ({}, "new.keras", False),
        ({}, "model.keras", False),
    ):
        if path == "model.keras":  # whose schedule is fixed
            monkeypatch.setattr(advice, "on_schedule", pytest.fail)
        with pytest.raises(AttributeError, match="labels"):  # of the images, which comes next
            preparation.prepare(options, path)
        assert ("try --beta2 0.2" in capsys.readouterr().out) == told


def test_weighting_that_leaves_pure_noise_untrained_gets_advice():
    assert "where --schedule flow leaves no signal; try --weighting none" in advice.on_weighting(
        "--schedule flow", "min-snr"
    )
    assert advice.on_weighting("--zero-snr", "none") is None and advice.on_weighting(None, "snr") is None


@pytest.mark.parametrize("capability, has", [((7, 5), False), ((8, 0), True), ((9, 0), True), (None, True)])
def test_gpus_have_bfloat16_since_ampere(monkeypatch, capability, has):
    details = {"device_name": "Card"} | ({"compute_capability": capability} if capability else {})
    monkeypatch.setattr(device, "_gpus", lambda: [details])
    assert device.has_bfloat16() == has
    assert (advice.on_precision("bfloat16", has) is None) == has and advice.on_precision("float32", has) is None


@pytest.mark.parametrize("capability, told", [((7, 5), True), ((8, 0), False)])
def test_a_gpu_without_bfloat16_is_told_of_float16(train_tiny, monkeypatch, capability, told):
    monkeypatch.setattr(device, "_gpus", lambda: [{"device_name": "Card", "compute_capability": capability}])
    said = train_tiny(*TINY, "--n-epochs", "1", "--precision", "bfloat16")
    assert "device    Card, bfloat16" in said and ("--precision float16" in said) == told
    assert "--precision float16" not in train_tiny("--n-epochs", "2", "--precision", "float32")


@pytest.mark.parametrize(
    "there, hidden, seen, told",
    [
        (True, None, [], True),
        (True, "-1", [], False),
        (True, None, ["GPU"], False),
        (False, None, [], False),
    ],
)
def test_a_gpu_that_tensorflow_cannot_use_is_reported(train_tiny, monkeypatch, there, hidden, seen, told):
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: there if path == "/dev/nvidia0" else exists(path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(device, "has_gpu", lambda: bool(seen))
    assert device.overlooks_gpu() == told
    if told:
        assert "TensorFlow cannot use the GPU here" in train_tiny(*TINY, "--n-epochs", "1")


@pytest.mark.parametrize("gigabytes, large", [((80, 16), True), ((16, 80), False)])
def test_first_gpu_decides_and_its_memory_is_not_taken(monkeypatch, gigabytes, large):
    def list_local_devices(config):
        assert config.gpu_options.allow_growth
        kinds = [("CPU", 1), *(("GPU", size) for size in gigabytes)]
        return [types.SimpleNamespace(device_type=kind, memory_limit=size * 1e9) for kind, size in kinds]

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device_lib, "list_local_devices", list_local_devices)
    assert device.large_gpu() == large


@pytest.mark.parametrize(
    "where, error, words",
    [
        ("prepare", tf.errors.ResourceExhaustedError(None, None, "OOM"), "network does not fit"),
        (
            "train",
            tf.errors.ResourceExhaustedError(None, None, "OOM"),
            "add --parts 2 --sequential, which needs less, or --batch-size 8, or end",
        ),
        (
            "train",
            tf.errors.NotFoundError(None, None, "No algorithm worked! Error messages:"),
            "add --parts 2 --sequential, which needs less, or --batch-size 8, or end",
        ),
        ("train", tf.errors.NotFoundError(None, None, "another"), None),
    ],
)
def test_too_little_memory_of_a_gpu_gets_a_sentence(train_tiny, monkeypatch, capsys, where, error, words):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(preparation if where == "prepare" else diffusion_model, where, fail)
    with pytest.raises(SystemExit if words else tf.errors.NotFoundError) as end:
        train_tiny(*TINY, "--n-epochs", "1", "--batch-size", "16")
    if words:
        assert end.value.code == 1 and words in capsys.readouterr().err


def test_loss_of_the_first_run_is_compared_with_a_measured_loss():
    first = {**settings.PRESETS["first"], "n_epochs": 32, "flip": False}
    assert advice.on_loss(first, "drawings", 2, 0.034) == "mean loss of a step 0.034; expected 0.0325"
    assert advice.on_loss(first, "drawings", 2, 0.043).endswith("expected 0.0325: it should be lower")
    assert advice.on_loss(first, "drawings", 3, 0.034) is None
    assert advice.on_loss(first, "/home/me/cats", 2, 0.034) is None
    for name, value in (
        *(("image_size", 64), ("channels", 1), ("flip", True), ("classes", True), ("network", "naive"), ("n_feat", 16)),
        *(("widths", "1,2"), ("blocks", 2), ("attention", 2), ("patch", 1), ("batch_size", 32), ("n_epochs", 40)),
        *(("optimizer", "adam"), ("learning_rate", 1e-3), ("lr_decay", "none"), ("warmup", 0), ("T", 500)),
        *(("schedule", "linear"), ("zero_snr", True), ("target", "eps"), ("weighting", "none")),
        *(("t_sampling", "logsnr"), ("dropout", 0.1)),
    ):
        assert advice.on_loss(first | {name: value}, "drawings", 2, 0.034) is None, name
    assert settings.STEPS["first"] // 128 == 32  # of 2,048 drawings


def test_loss_of_a_cpu_hour_is_compared_with_a_measured_loss():
    hour = {**settings.PRESETS["cpu-hour"], "n_epochs": settings.STEPS["cpu-hour"] // 128, "flip": False}
    assert advice.on_loss(hour, "drawings", 8, 1.0).endswith("expected 0.0935: it should be lower")
    assert advice.on_loss(hour | {"n_epochs": 32}, "drawings", 8, 1.0) is None
    assert advice.on_loss(hour | {"n_feat": 32}, "drawings", 8, 1.0) is None
    assert advice.on_loss(hour, "/home/me/cats", 8, 1.0) is None


def test_learning_rate_of_another_batch_size_is_mentioned():
    preset = {**settings.PRESETS["slides"], "preset": "slides"}
    assert advice.on_batch_size(preset) is None
    assert advice.on_batch_size({**preset, "batch_size": 256, "learning_rate": 4e-3}) is None
    assert "0.001 was chosen for batches of 64 images, not 256" in advice.on_batch_size({**preset, "batch_size": 256})
