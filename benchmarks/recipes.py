"""What each improvement of training brings: the first run with one option changed at a time.

    python benchmarks/recipes.py --out recipes                    all, about 4 minutes each on 2 cores
    python benchmarks/recipes.py --out recipes --only "slides;v"   some

Every recipe trains the same network on the same drawings for as many steps, and so for about the same time, and is
measured on new drawings. What is in the folder already is not done again: start it again after an interruption.
"""

import argparse
import json
import os
import subprocess
import sys

import common

SAMPLER = ("--variance", "posterior", "--steps", "50")
MEASURE = ("--data", "new-drawings", "--features", "efficientnet", "--only", "bits,kid", "--count", "500", *SAMPLER)
SHORT, LONG = (("--lr-decay", "none", "--n-epochs", n) for n in ("2", "20"))
RECIPES = {
    "slides": (),
    "slides, another seed": ("--seed", "1"),
    "cosine": ("--schedule", "cosine"),
    "sigmoid": ("--schedule", "sigmoid"),
    "x0": ("--target", "x0"),
    "v": ("--target", "v"),
    "v, zero SNR": ("--target", "v", "--zero-snr"),
    "v, cosine": ("--target", "v", "--schedule", "cosine"),
    "min-SNR": ("--weighting", "min-snr"),
    "x0, min-SNR": ("--target", "x0", "--weighting", "min-snr"),
    "x0, SNR": ("--target", "x0", "--weighting", "snr"),
    "t by log-SNR": ("--t-sampling", "logsnr"),
    "short, no EMA": (*SHORT, "--ema", "0"),
    "short, EMA 0.999, no warm-up": (*SHORT, "--ema", "0.999", "--no-ema-warmup"),
    "short, EMA 0.999": (*SHORT, "--ema", "0.999"),
    "long, no EMA": (*LONG, "--ema", "0"),
    "long, EMA 0.999, no warm-up": (*LONG, "--ema", "0.999", "--no-ema-warmup"),
    "long, EMA 0.999": (*LONG, "--ema", "0.999"),
}


def run(script, *arguments):
    subprocess.run([sys.executable, os.path.join(common.ROOT, script), *arguments], check=True)


def measure(name, folder):
    """The numbers of `evaluate.py` for a recipe, trained first where that has not been done."""
    base = os.path.join(folder, name.replace(", ", "-").replace(" ", "-"))
    model, out = base + ".keras", base + ".json"
    if not os.path.exists(out):
        run("diffusion_model.py", "--preset", "first", "--data", "drawings", "--model", model, "--sample-every", "0",
            *RECIPES[name])  # fmt: skip
        run("evaluate.py", "--model", model, "--out", out, *MEASURE)
    with open(out, encoding="utf-8") as file:
        return json.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="recipes", metavar="FOLDER", help="where models and numbers go (recipes)")
    some = "some of them, with semicolons between: " + "; ".join(RECIPES)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(RECIPES), metavar="NAMES", help=some)
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    rows = [("recipe", "options", "steps", "bits/dim", "KID")]
    for name in options.only:
        numbers = measure(name, options.out)
        bits, kid = (next(row for key, row in numbers.items() if key.startswith(start)) for start in ("bits", "kid"))
        cells = (f"{row['value']:.3f} ± {row['error']:.3f}" for row in (bits, kid))
        rows.append((name, f"`{' '.join(RECIPES[name])}`", f"{numbers['step']:,}", *cells))
    print(common.machine("tensorflow", "keras"))
    common.table(f"the first run with one change; KID of 500 samples by {' '.join(SAMPLER)}", rows)


if __name__ == "__main__":
    main()
