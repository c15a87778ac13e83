"""How good is each method of restoring, for each operation, and what does it cost?

    pip install -r requirements-optional.txt
    python benchmarks/restore.py --model drawings --data new-drawings       about an hour on 2 cores
    python benchmarks/restore.py --only bias                                a minute, needs no model
    python benchmarks/restore.py --only figure --out restore.png            two minutes

Three tables: how far mean and deviation are from the closed form where everything is Gaussian (bias); error and
KID of restored images beside those of trivial answers, which see the same (images); the time of a step beside that of a
step without a measurement (time). And a figure: images, what is measured of them, and what is restored (figure).
"""

import argparse
import dataclasses
import time

import common
import numpy as np

from support import console, device

PARTS = ("bias", "images", "time", "figure")
STEPS = (10, 50, 250)  # of the bias
OPERATIONS = {"mask": {}, "downscale ×4": {"factor": 4}, "grey": {}, "blur": {"factor": 2.0}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="drawings", metavar="FILE.keras", help="trained model (drawings)")
    parser.add_argument("--data", default="new-drawings", metavar="SOURCE", help="held-out images (new-drawings)")
    parser.add_argument("--count", type=int, default=250, metavar="N", help="number of held-out images (250)")
    parser.add_argument("--deviations", type=float, nargs="+", default=[0.0, 0.2], help="of the noise (0 0.2)")
    parser.add_argument(
        "--only", type=console.some_of(PARTS), default=PARTS, help="some of bias,images,time,figure (all)"
    )
    parser.add_argument("--out", default="restore.png", metavar="FILE", help="the figure (restore.png)")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="some methods, separated by commas (all)")
    parser.add_argument(
        "--iterations",
        type=console.integers(1),
        metavar="N,N",
        help="mmps with so many iterations instead of --methods",
    )
    parser.add_argument("--steps", type=int, help="steps of the sampler (what the model's file recommends)")
    parser.add_argument("--features", default="efficientnet", help="of KID (efficientnet)")
    options = parser.parse_args()
    device.start_tensorflow(parts=device.MOST_PARTS)
    from diffusion.posterior import METHODS, MMPS

    numbers = map(int, options.iterations.split(",")) if options.iterations else ()
    more = {f"mmps, {k}": dataclasses.replace(MMPS, iterations=k) for k in numbers}
    METHODS.update(more)
    options.methods = list(more) or options.methods or list(METHODS)
    print(common.machine("tensorflow", "keras"))
    for part in options.only:
        {"bias": bias, "images": images, "time": seconds, "figure": figure}[part](options)


def bias(options):
    """Gaussian images of 4×4 pixels whose neighbours are alike, half of them known, with and without noise."""
    import tensorflow as tf

    from diffusion import posterior, sampling
    from diffusion.denoiser import denoiser
    from diffusion.options import Sampling
    from diffusion.samplers import step
    from diffusion.schedules import make_schedule

    sched, count = make_schedule("cosine"), 1000
    place = np.stack(np.meshgrid(*[np.arange(4)] * 2), axis=-1).reshape(-1, 2)
    covariance = 0.2 * np.exp(-np.sum((place[:, None] - place) ** 2, axis=-1) / 8) + 0.002 * np.eye(16)
    values, vectors = (tf.constant(part, tf.float32) for part in np.linalg.eigh(covariance))
    known = (place.sum(axis=1) % 2 == 0).astype(np.float32)
    y = known * np.random.default_rng(0).multivariate_normal(np.zeros(16), covariance)
    alphabar = tf.constant(sched.alphabar, tf.float32)

    def predict(inputs):
        ab = tf.gather(alphabar, tf.cast(tf.round(1000 * inputs[1]), tf.int32))
        along = tf.reshape(inputs[0], (-1, 16)) @ vectors
        return tf.reshape(tf.sqrt(1 - ab) / (ab * values + 1 - ab) * along @ tf.transpose(vectors), (-1, 4, 4, 1))

    rows = [("method", "σ", *(f"{count} steps" for count in STEPS))]
    for name in options.methods:
        method = posterior.METHODS[name]
        for sigma in 1 / 255, 0.2:
            gain = covariance * known @ np.linalg.inv(known[:, None] * covariance * known + sigma**2 * np.eye(16))
            mean, spread = gain @ y, np.sqrt(np.diag(covariance - gain @ (known[:, None] * covariance)))
            denoise = posterior.measured(
                denoiser(predict, sched),
                sched,
                method,
                lambda x: x * known.reshape(4, 4, 1),
                tf.constant(np.broadcast_to(y.reshape(4, 4, 1), (count, 4, 4, 1)), tf.float32),
                tf.fill([count], np.float32(sigma**2)),
            )
            one = tf.function(lambda x, t, row, z, denoise=denoise: step(denoise, x, t, row, z, x)[0], autograph=False)
            cells = []
            for steps in STEPS:
                plan = sampling.make_plan(sched, Sampling("ddim", steps, eta=1.0))
                if method.revisits[1]:
                    plan = sampling.revisit(plan, sched, *method.revisits)
                x = tf.random.stateless_normal((count, 4, 4, 1), (0, 0))
                for k, (t, row) in enumerate(zip(plan.times, plan.coefficients, strict=False)):
                    z = tf.random.stateless_normal(x.shape, (1, k))
                    x = one(x, tf.fill([count], int(t)), tf.constant(row), z)
                found = x.numpy().reshape(count, -1)
                off = np.sqrt(np.mean((found.mean(axis=0) - mean) ** 2) / np.mean(spread**2))
                cells.append(f"{off:.2f}, {np.sqrt(np.mean(found.var(axis=0)) / np.mean(spread**2)):.2f}")
            rows.append((name, f"{sigma:.3f}", *cells))
    common.table("Error of the mean in true standard deviations, and standard deviation / true one", rows)


def images(options):
    """Root mean squared error in grey levels, of A x̂ beside y too, and KID to the images themselves."""
    import reverse_diffusion as rd
    from data import load_images
    from diffusion import generate, measurement
    from evaluation import features, metrics

    height, width, channels = generate.open_model(options.model).image_shape
    real, _ = load_images(options.data, (height, width), channels)
    real = metrics.random_subset(real, options.count + 500)
    real, others = real[: options.count], real[options.count :]
    extract, x_0 = features.extractor(options.features), np.float32(real) / 127.5 - 1
    other_features = extract(others)
    mask = square_hole(height, width)
    rows = [("operation", "σ", "answer", "error", "‖A x̂ − y‖", "KID")]
    for operation, how in OPERATIONS.items():
        name = operation.split()[0]
        known = {"mask": mask} if name == "mask" else {}
        for sigma in options.deviations:
            y = measurement.measure(x_0, name, **how, **known)
            noise = np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
            y = y + sigma * noise * (mask[..., None] if known else 1)
            answers = {"trivial": trivial(name, y, mask, real.shape[1:])}
            for method in options.methods:
                start, more = time.perf_counter(), {"steps": options.steps, "seed": 0, "verbose": 0, **how, **known}
                answers[method] = rd.restore(y, name, sigma, options.model, method=method, **more)
                console.say(f"{operation}, {sigma}, {method}: {time.perf_counter() - start:.0f} s")
            for answer, found in answers.items():
                again = measurement.measure(np.float32(found) / 127.5 - 1, name, **how, **known)
                error, off = (
                    127.5 * np.sqrt(np.mean(part**2)) for part in (np.float32(found) / 127.5 - 1 - x_0, again - y)
                )
                kid, deviation = metrics.with_error(metrics.kid, other_features, extract(found.astype(np.uint8)))
                rows.append((operation, sigma, answer, f"{error:.1f}", f"{off:.1f}", f"{kid:.3f} ± {deviation:.3f}"))
                print(*rows[-1], flush=True)
    common.table(f"{options.count} images of {options.data}, {options.model}", rows)


def square_hole(height, width):
    """A mask whose middle is missing."""
    mask = np.ones((height, width), bool)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = False
    return mask


def figure(options, shown=4):
    """A row for each operation: an image, what is measured of it, and what is restored."""
    import reverse_diffusion as rd
    from data import load_images
    from diffusion import generate, measurement
    from support import files, plots

    plots.draw_for_files()
    height, width, channels = shape = generate.open_model(options.model).image_shape
    real, rows = load_images(options.data, (height, width), channels)[0], []
    for k, (operation, how) in enumerate(OPERATIONS.items()):
        name, photo = operation.split()[0], real[k : k + 1]
        how = how | ({"mask": square_hole(height, width)} if name == "mask" else {})
        y = measurement.measure(photo / 127.5 - 1, name, **how)
        restored = rd.restore(y, name, 0.0, options.model, n_sample=shown, seed=0, verbose=0, **how)
        rows.append([*photo, *measurement.as_pictures(y, shape), *restored])
    titles = ["image", "measured", "restored", *[""] * (shown - 1)]
    with files.replacing(options.out) as draft:
        plots.strip(rows, titles, list(OPERATIONS)).savefig(draft, dpi=100)
    print(options.out)


def trivial(operation, y, mask, image_shape):
    """The answers without a model: the mean of the known pixels, bicubic enlargement, grey, and the measurement."""
    from PIL import Image

    from ddpm import to_pixels

    if operation == "mask":
        return to_pixels(np.where(mask[..., None], y, y[:, mask].mean(axis=1)[:, None, None]))
    if operation == "downscale":
        size, planes = image_shape[1::-1], np.moveaxis(y, -1, 1)
        enlarged = [[np.array(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in i] for i in planes]
        return to_pixels(np.moveaxis(np.array(enlarged), 1, -1))
    return to_pixels(np.broadcast_to(y, (len(y), *image_shape)))


def seconds(options):
    """Of a step for 8 images, beside one without a measurement."""
    import tensorflow as tf

    from diffusion import generate, reverse, sampling
    from diffusion.measurement import Task
    from diffusion.options import Sampling

    trained = generate.open_model(options.model)
    shape, count = trained.image_shape, 8
    given = tf.zeros((count, *shape)), tf.ones((count, *shape[:2], 1)), tf.fill([count], 1e-4)
    rows, tasks = [("method", "ms a step", "ratio")], {"none": None}
    tasks |= {name: Task("mask", name) for name in options.methods}
    plan, takers = sampling.make_plan(trained.sched, Sampling(steps=20)), {}
    for name, task in tasks.items():
        steps = reverse.ReverseSteps(trained, count, task=task)
        takers[name] = lambda steps=steps, task=task: list(
            sampling.sample(steps, plan, 0, range(count), measurement=given if task else ())
        )
        takers[name]()
    taken = {name: [] for name in takers}
    for _ in range(5):  # in turn, as others may use this machine
        for name, take in takers.items():
            taken[name] += common.time_calls(take, 1)
    medians = {name: 1000 * np.median(times) / 20 for name, times in taken.items()}
    rows += [(name, f"{ms:.0f}", f"{ms / medians['none']:.1f}") for name, ms in medians.items()]
    common.table(f"A step for {count} images of {options.model}", rows)


if __name__ == "__main__":
    main()
