"""Draws the figures of the lecture from a trained model: noising, sampling, noise schedules, network, loss.

    python figures.py --model model.keras --data drawings --out figures      all of them, as files
    python figures.py --only forward,schedule                                 some

In IPython:
    import figures; from ddpm import ddpm_schedule; figures.schedule(ddpm_schedule())

Each function returns a matplotlib figure, except for `reverse_gif`, which writes a file.
"""

import math
import os
import sys

if __name__ == "__main__":  # which `python -P` leaves out
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from support.packages import check_packages

    check_packages()
import numpy as np

import data
from diffusion.command_line import add_model_option
from support import console, device, files, grids
from support.console import say
from support.plots import draw_for_files, strip
from training.architecture import network
from training.curves import no_table, schedule, schedules, training

ALL = (
    *("forward", "reverse", "gif", "views", "schedule", "schedules"),
    *("network", "interpolation", "training", "distortion", "classes"),
)
OF_NO_MODEL = ("toy",)  # drawn only if named
STEPS = (0, 50, 100, 250, 500, 1000)


def forward(image, sched, steps=None, seed=0):
    """One image with more and more noise (slides "Forward diffusion").

    Args:
        image: (height, width, channels), values 0 … 255.
        sched: what `ddpm_schedule` returned.
        steps: the t to show (0, 50, 100, 250, 500, 1000, as fractions of T).
    """
    import tensorflow as tf

    from ddpm import from_pixels, q_sample, to_pixels
    from diffusion.sampling import standard_normal

    steps = steps or choose_steps(sched)
    x_0 = tf.repeat(tf.constant(from_pixels(image[None])), len(steps), axis=0)
    eps = tf.repeat(standard_normal(seed, 0, tf.range(1), image.shape), len(steps), axis=0)
    x_t = q_sample(x_0, tf.constant(steps), eps, sched)
    return strip([to_pixels(x_t)], [f"t = {t}" for t in steps], ["$x_t$"])


def reverse(model, seed=0, steps=None):
    """x_t on the way back, and the estimate x̂_0 of the image from it (slides "Reverse diffusion").

    Args:
        model: a trained network.
        steps: the t to show.
    """
    from ddpm import to_pixels

    shown = estimates(model, seed, steps)
    rows = [(x_t, estimate.x_0 if estimate else x_t) for _, x_t, estimate in shown]
    names = ["$x_t$", r"$\hat x_0$"]
    return strip(to_pixels(rows)[:, :, 0].swapaxes(0, 1), [f"t = {t}" for t, *_ in shown], names)


def views(model, seed=0, steps=None):
    """One prediction in four views (slides "Improvements"): x_t on the way back, image x̂_0, noise ε̂, velocity ε̂ - x̂_0.

    The score is -ε̂ / √(1 - ᾱ_t). Noise and velocity are shown at half their contrast.
    """
    from ddpm import to_pixels

    shown = [(t, x_t, estimate) for t, x_t, estimate in estimates(model, seed, steps) if t]
    rows = [(x_t, estimate.x_0, estimate.eps / 2, (estimate.eps - estimate.x_0) / 2) for _, x_t, estimate in shown]
    names = ["$x_t$", r"$\hat x_0$", r"$\hat\epsilon$", r"$\hat\epsilon - \hat x_0$"]
    return strip(to_pixels(rows)[:, :, 0].swapaxes(0, 1), [f"t = {t}" for t, *_ in shown], names)


def estimates(model, seed, steps):
    """t, x_t and its clipped estimate, None at t = 0, for the t to show of one reverse process; see `reverse`."""
    import tensorflow as tf

    from diffusion.denoiser import clipped
    from diffusion.reverse import denoiser_of

    trained, generate = prepare_sampling(model, 1)
    denoise, steps = clipped(denoiser_of(trained, 1), trained.sched), steps or choose_steps(trained.sched)
    shown = [(t, x_t) for t, x_t in generate(seed, [0], every=True) if t in steps]
    return [(t, x_t, denoise(x_t, tf.constant([t])) if t else None) for t, x_t in shown]


def toy(seed=0):
    """Points in the plane in place of images: noising, sampling and score (see `training/toy.py`); half a minute."""
    from training import toy as process

    points = process.swiss_roll(32, seed)
    return process.draw(process.train(points, "flow", "flow", seed=seed), points, seed)


def interpolation(model, count=8, seed=0):
    """Images that DDIM makes of noises between two noises (DDIM, section 5.3).

    The noises lie on a circle, on which every point is distributed as N(0, 1). DDIM adds no noise after the start, so
    that similar noises become similar images.

    Args:
        count: how many images, both ends included.
    """
    import tensorflow as tf

    from ddpm import to_pixels

    _, generate = prepare_sampling(model, count)
    _, (one, other) = next(generate(seed, range(2)))  # the x_T from which these two images are sampled
    angle = tf.linspace(0.0, math.pi / 2, count)[:, None, None, None]
    start = tf.cos(angle) * one + tf.sin(angle) * other
    *_, (_, x_0) = generate(seed, range(count), start=start, sampler="ddim")
    return strip([to_pixels(x_0)], [f"{100 * k // (count - 1)} %" for k in range(count)], [""])


def classes(model, classifier=None, guidance=(0, 1, 2, 4), count=4, steps=50, seed=0):
    """Images of every class (rows) with more and more guidance (columns), from the same noise everywhere.

    Args:
        model: with classes, or without if there is a `classifier`.
        count: how many images each class has in a column, a square number.
        steps: number of DDIM steps.
    """
    from ddpm import n_steps, to_pixels
    from diffusion import model_file

    names = model_file.describe(classifier or model).classes
    trained, generate = prepare_sampling(model, count * len(names), classifier)
    index, label = np.tile(np.arange(count), len(names)), np.repeat(np.arange(len(names)), count) + 1
    steps, columns = min(steps, n_steps(trained.sched)), []
    for g in guidance:
        *_, (_, x_0) = generate(seed, index, label=label, sampler="ddim", steps=steps, guidance=g)
        columns.append([grids.grid(images) for images in np.split(to_pixels(x_0), len(names))])
    return strip(zip(*columns, strict=True), [f"g = {g:g}" for g in guidance], names)


def reverse_gif(model, path, n_sample=9, frames=40, seed=0):
    """Writes the reverse process of a grid of images as an animated GIF that pauses at its end."""
    from ddpm import n_steps, to_pixels

    trained, generate = prepare_sampling(model, n_sample)
    shown = {round(n_steps(trained.sched) * (1 - k / frames) ** 2) for k in range(frames + 1)}  # more of them near 0
    steps = generate(seed, range(n_sample), every=True)
    grids.save_animation([to_pixels(x_t) for t, x_t in steps if t in shown], path)


def distortion(trained, source, count=100, draws=40):
    """How soon the reverse process knows an image: error of x̂_0 beside the bits received (DDPM, section 4.3).

    Args:
        source: of images, of which `count` are measured at so many `draws` of t each.
    """
    from diffusion.reverse import denoiser_of
    from evaluation.likelihood import measure_denoising, rate_and_distortion
    from training.curves import rate_distortion

    images, denoise = load_images(source, trained)[:count], denoiser_of(trained, 1)
    measured = measure_denoising(denoise, trained.sched, images, draws, 50, levels=trained.levels)
    return rate_distortion(*rate_and_distortion(measured, trained.sched))


def choose_steps(sched):
    """The steps 0, 50, 100, 250, 500, 1000, or the same fractions of another T, each once."""
    from ddpm import n_steps

    return sorted({round(t * n_steps(sched) / 1000) for t in STEPS})


def prepare_sampling(model, batch_size, classifier=None):
    """A model with what is known of it, and a function that samples as `diffusion.sampling.sample` does.

    It takes a seed, the numbers of the images, `every`, `start` and `label`, and options of `Sampling`.
    """
    from diffusion import model_file
    from diffusion.options import Sampling
    from diffusion.reverse import ReverseSteps
    from diffusion.sampling import make_plan, sample

    trained = model_file.describe(model)
    taken = ReverseSteps(trained, batch_size, classifier=classifier and model_file.describe(classifier))

    def generate(seed, index, every=False, start=None, label=None, **how):
        plan = make_plan(trained.sched, Sampling(label=label, **how))
        return sample(taken, plan, seed, index, start, every, label)

    return trained, generate


def parse_options(arguments=None):
    parser = console.Parser(description=__doc__)
    add = parser.add_argument
    add_model_option(parser)
    add(
        "--data",
        metavar="SOURCE",
        help="images for the figures forward and distortion: drawings, a folder, or a .npy or .npz file (the training "
        "images)",
    )
    add("--out", default="figures", metavar="FOLDER", help="folder for the figures (figures)")
    names = f"figures to draw, separated by commas: {', '.join(ALL)} (all that fit the model), {', '.join(OF_NO_MODEL)}"
    add("--only", type=console.some_of(ALL + OF_NO_MODEL), metavar="NAMES", help=names)
    add(
        "--classifier",
        metavar="FILE.keras",
        help="classifier that guides in the figure classes (none: the model itself)",
    )
    add(
        "--seed",
        type=console.integer(0),
        default=0,
        metavar="N",
        help="seed of all noise, and number of the image in the figure forward, an integer from 0 (0)",
    )
    return parser.parse_args(arguments)


def choose_figures(typed, trained, classifier, table):
    """The names of the figures to draw: those that were typed, or all that the model has.

    Raises:
        ValueError: if one was typed that it does not have.
    """
    import unet

    missing = {}
    if not (classifier or trained.classes):
        missing["classes"] = "this model has no classes; train one with --classes, or give a --classifier"
    if not any(isinstance(layer, unet.UnetDownLayer) for layer in trained.network.layers):
        missing["network"] = "it shows the network of the slides; name a model of --network naive"
    if not os.path.exists(table):
        missing["training"] = no_table(table)
    for name in filter(missing.get, typed or ()):
        raise ValueError(f"--only {name}: {missing[name]}")
    return typed or [name for name in ALL if name not in missing]


def prepare_files(folder, names, inputs):
    """Makes the folder if it is missing. The path of each figure in it by name, checked to be writable and no input."""
    files.make_folder("--out", folder)
    paths = {name: os.path.join(folder, name + (".gif" if name == "gif" else ".png")) for name in names}
    files.check_outputs([("--out", path) for path in paths.values()], inputs)
    return paths


def save_figure(figure, path):
    """Writes a figure and says where it is."""
    with files.replacing(path) as draft:
        figure.savefig(draft, dpi=120)
    say(path)


def load_images(source, trained):
    """The images of a source, integers 0 … levels, in the shape that the model takes."""
    if source is None:
        raise ValueError("the model's file does not name its training images; give a source with --data")
    *size, channels = trained.image_shape
    return data.load_images(source, size, channels, scale=trained.scale)[0]


def load_image(source, trained, number):
    """One image of a source, 0 … 255; after the last the first again."""
    images = load_images(source, trained)
    return trained.scale.to_bytes(images[number % len(images)])


def main():
    with console.one_line_errors("figures.py"):
        options = parse_options()
        say("figures.py: starting TensorFlow …")
        device.start_tensorflow(parts=device.MOST_PARTS)
        draw_for_files()
        from diffusion import model_file

        if set(options.only or ALL) <= set(OF_NO_MODEL):
            save_figure(toy(options.seed), *prepare_files(options.out, OF_NO_MODEL, []).values())
            return
        trained = model_file.open_with_schedule(options.model)
        model, metadata, sched = trained.network, trained.metadata, trained.sched
        classifier = options.classifier and model_file.open_model(options.classifier, classifier=True)
        if classifier:
            model_file.check_guide(classifier, options.classifier, trained, classifier=True)
        if sentence := model_file.warn_of_no_class(trained):
            console.warn(sentence)
        models = [model_file.locate(path) for path in (options.model, options.classifier) if path]
        table, source = files.table_name(models[0]), options.data or metadata.get("data", {}).get("source")
        names = choose_figures(options.only, trained, classifier, table)
        paths = prepare_files(options.out, names, [*models, table, source])  # better known now than after the work

        draw = {
            "forward": lambda: forward(load_image(source, trained, options.seed), sched, seed=options.seed),
            "reverse": lambda: reverse(model, options.seed),
            "views": lambda: views(model, options.seed),
            "schedule": lambda: schedule(sched, metadata["diffusion"].get("schedule", "linear")),
            "schedules": lambda: schedules(learned=sched if trained.schedule_layer else None),
            "network": lambda: network(model),
            "toy": lambda: toy(options.seed),
            "interpolation": lambda: interpolation(model, seed=options.seed),
            "training": lambda: training(table),
            "distortion": lambda: distortion(trained, source),
            "classes": lambda: classes(model, classifier and classifier.network, seed=options.seed),
        }
        status = 0
        for name, path in paths.items():
            try:
                if name == "gif":
                    reverse_gif(model, path, seed=options.seed)
                    say(path)
                else:
                    save_figure(draw[name](), path)
            except Exception as error:  # the others may succeed
                status = max(status, console.report(f"figures.py: {name}", error))
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
