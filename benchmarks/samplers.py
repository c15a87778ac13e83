"""How good is each sampler with few steps? KID against the number of network calls, and images per second.

    pip install -r requirements-optional.txt
    python benchmarks/samplers.py --model model.keras --data new-drawings --out samplers       about 15 minutes

Writes `kid.png` and `samples.png` into the folder, and prints a table. Numbers are cached in `numbers.json` there, by
model and images: after an interruption start it again.
"""

import argparse
import json
import os
import time

import common
import numpy as np

from support import device

STEPS = (10, 20, 50, 250, 1000)
SAMPLERS = {
    "DDPM, β": {},
    "DDPM, β̃": {"variance": "posterior"},
    "DDIM": {"sampler": "ddim"},
    "DPM-Solver++": {"sampler": "dpm++"},
    "annealed Langevin": {"sampler": "langevin"},
}
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#777777")
BATCH = 50


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model.keras", metavar="FILE.keras", help="trained model (model.keras)")
    parser.add_argument("--data", default="new-drawings", metavar="SOURCE", help="held-out images (new-drawings)")
    parser.add_argument(
        "--count", type=int, default=250, metavar="N", help="number of held-out images, and of samples per row (250)"
    )
    parser.add_argument("--out", default="samplers", metavar="FOLDER", help="folder for the results (samplers)")
    options = parser.parse_args()
    device.start_tensorflow(parts=device.MOST_PARTS)
    import data
    from ddpm import to_pixels
    from diffusion import model_file, reverse, sampling
    from diffusion.options import Sampling
    from evaluation import features, metrics
    from support import console, files

    os.makedirs(options.out, exist_ok=True)
    trained = model_file.open_with_schedule(options.model)
    *size, channels = trained.image_shape
    reverse_steps = reverse.ReverseSteps(trained, BATCH)
    extract = features.extractor("efficientnet")
    real = metrics.random_subset(data.load_images(options.data, tuple(size), channels)[0], options.count)
    real_features = extract(real, console.Bar(len(real), "image").update)

    def generate(count, **how):
        """Images in [-1, 1], and the seconds for them."""
        plan, batches, start = sampling.make_plan(trained.sched, Sampling(**how)), [], time.perf_counter()
        for first in range(0, count, BATCH):
            *_, (_, x_0) = sampling.sample(reverse_steps, plan, 0, range(first, first + BATCH))
            batches.append(x_0.numpy())
        return np.concatenate(batches)[:count], time.perf_counter() - start

    path = os.path.join(options.out, "numbers.json")
    measured = f"{model_file.fingerprint(trained)} beside {data.digest(real)}"
    all_numbers = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            all_numbers = json.load(file)
    numbers = all_numbers.setdefault(measured, {})
    generate(BATCH, steps=2)  # compiles
    for name, how in SAMPLERS.items():
        for count in STEPS:
            key = f"{name}, {count}"
            if key not in numbers:
                x_0, seconds = generate(options.count, **how, steps=count)
                sample_features = extract(to_pixels(x_0).astype(np.uint8))
                kid, error = metrics.with_error(metrics.kid, real_features, sample_features)
                rate = BATCH * -(-options.count // BATCH) / seconds
                numbers[key] = {"kid": float(kid), "error": float(error), "rate": rate, "images": x_0[:2].tolist()}
                with files.replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
                    json.dump(all_numbers, file)
                print(f"{key} steps: KID {kid:.3f} ± {error:.3f}, {rate:.1f} images per second", flush=True)

    draw(numbers, options.out)
    print(common.machine("tensorflow", "keras"))
    rows = [("sampler", *(f"{count} steps" for count in STEPS))]
    for name in SAMPLERS:
        here = [numbers[f"{name}, {count}"] for count in STEPS]
        rows.append((f"{name}: KID", *(f"{n['kid']:.3f} ± {n['error']:.3f}" for n in here)))
        rows.append((f"{name}: images per second", *(f"{n['rate']:.1f}" for n in here)))
    common.table(f"{options.count} samples of {options.model} beside {options.data}", rows)


def draw(numbers, folder):
    """KID against steps, and two samples of each sampler for each number of steps."""
    import figures
    from support import files

    figures.draw_for_files()
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    rows = []
    for (name, _), colour in zip(SAMPLERS.items(), COLOURS, strict=True):
        here = [numbers[f"{name}, {count}"] for count in STEPS]
        kid, error = (np.array([n[key] for n in here]) for key in ("kid", "error"))
        axis.errorbar(STEPS, kid, error, color=colour, marker="o", capsize=2, label=name)
        rows.append([np.array(image) for n in here for image in n["images"]])
    axis.set_xscale("log")
    axis.set_xticks(STEPS, [str(count) for count in STEPS])
    axis.set_xlabel("network calls for an image")
    axis.set_ylabel("KID")
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    axis.legend()
    titles = [text for count in STEPS for text in (f"{count}", "")]
    for name, drawn in ("kid.png", figure), ("samples.png", figures.strip(rows, titles, list(SAMPLERS))):
        with files.replacing(os.path.join(folder, name)) as draft:
            drawn.savefig(draft, dpi=100)


if __name__ == "__main__":
    main()
