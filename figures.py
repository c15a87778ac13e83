"""The figures of the lecture, drawn from a model: both processes, the schedule, the network, the training.

    python figures.py --model model.keras --data drawings --out figures      all of them, as files
    python figures.py --only forward,schedule                                 some

In IPython:

    import figures; from ddpm import ddpm_schedule
    figures.schedule(ddpm_schedule())

Each function returns a matplotlib figure, but for `reverse_gif`, which writes a file. Colours are those of Okabe and
Ito, for all kinds of eyes.
"""

import os
import sys

if __name__ == "__main__":  # which `python -P` leaves out
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import data
from support import console
from support.console import say

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#777777"
ALL = ("forward", "reverse", "gif", "schedule", "schedules", "network", "interpolation", "training", "classes")
STEPS = (0, 50, 100, 250, 500, 1000)


def forward(image, sched, steps=None, seed=0):
    """One image with more and more noise (slides "Forward diffusion").

    Args:
        image: (height, width, channels), values 0 … 255.
        sched: what `ddpm_schedule` returned.
        steps: the t to show (0, 50, 100, 250, 500, 1000, as fractions of T).
    """
    import tensorflow as tf

    from ddpm import q_sample
    from diffusion.sampling import standard_normal

    steps = steps or fractions(sched)
    x_0 = tf.repeat(tf.constant(data.scaled(image[None])), len(steps), axis=0)
    eps = tf.repeat(standard_normal(seed, 0, tf.range(1), image.shape), len(steps), axis=0)
    x_t = q_sample(x_0, tf.constant(steps), eps, sched)
    return strip([x_t], [f"t = {t}" for t in steps], ["$x_t$"])


def reverse(model, seed=0, steps=None):
    """x_t on the way back, and the estimate x̂_0 of the image from it (slides "Reverse diffusion").

    Args:
        model: a trained network.
        steps: the t to show.
    """
    import tensorflow as tf

    from diffusion import model_file
    from diffusion.denoiser import clipped
    from diffusion.reverse import denoiser_of
    from diffusion.sampling import make_plan, sample

    sched, reverse_steps = sampler(model, 1)
    _, target = model_file.diffusion_of(model)
    denoise = clipped(denoiser_of(model, sched, target, 1), sched)
    shown = steps or fractions(sched)
    titles, noisy, estimates = [], [], []
    for t, x_t in sample(reverse_steps, make_plan(sched), seed, [0], every=True):
        if t in shown:
            titles.append(f"t = {t}")
            noisy.append(x_t[0])
            estimates.append(denoise(x_t, tf.constant([t]))[0][0] if t else x_t[0])
    return strip([noisy, estimates], titles, ["$x_t$", r"$\hat x_0$"])


def interpolation(model, count=8, seed=0):
    """Images from noise between two noises, on the circle on which all are N(0, 1) (DDIM, section 5.3).

    Args:
        count: how many, the two ends included.
    """
    import numpy as np
    import tensorflow as tf

    from diffusion.sampling import make_plan, sample, standard_normal

    angle = tf.constant(np.linspace(0, np.pi / 2, count), tf.float32)[:, None, None, None]

    def between(seed, t, index, image_shape, draw=0):
        one, other = tf.unstack(standard_normal(seed, t, tf.range(2), image_shape, draw))
        return tf.cos(angle) * one + tf.sin(angle) * other

    sched, reverse_steps = sampler(model, count, between)
    *_, (_, x_0) = sample(reverse_steps, make_plan(sched), seed, range(count))
    return strip([x_0], [f"{100 * k // (count - 1)} %" for k in range(count)], [""])


def classes(model, classifier=None, guidance=(0, 1, 2, 4), count=4, steps=50, seed=0):
    """Images of every class (rows) with more and more guidance (columns), from the same noise everywhere.

    Args:
        model: with classes, or without if there is a `classifier`.
        count: how many images each class has in a column, a square number.
        steps: of DDIM.
    """
    import numpy as np

    from ddpm import n_steps, to_pixels
    from diffusion import model_file
    from diffusion.sampling import make_plan, sample
    from support import files

    names = model_file.classes_of(classifier or model)
    sched, reverse_steps = sampler(model, count * len(names), classifier=classifier)
    index, label = np.tile(np.arange(count), len(names)), np.repeat(np.arange(len(names)), count) + 1
    columns = []
    for g in guidance:
        plan = make_plan(sched, "ddim", min(steps, n_steps(sched)), guidance=g)
        *_, (_, x_0) = sample(reverse_steps, plan, seed, index, label=label)
        columns.append([files.grid(to_pixels(images)) for images in np.split(x_0, len(names))])
    return strip(zip(*columns, strict=True), [f"g = {g:g}" for g in guidance], names)


def reverse_gif(model, path, n_sample=9, frames=40, seed=0):
    """Writes the reverse process of a grid of images as an animated GIF that pauses at its end."""
    import numpy as np
    from PIL import Image

    from ddpm import n_steps, to_pixels
    from diffusion.sampling import make_plan, sample
    from support import files

    sched, reverse_steps = sampler(model, n_sample)
    shown = {round(n_steps(sched) * (1 - k / frames) ** 2) for k in range(frames + 1)}  # more of them near 0
    frames_shown = []
    for t, x_t in sample(reverse_steps, make_plan(sched), seed, range(n_sample), every=True):
        if t in shown:
            grid = files.grid(files.enlarged(to_pixels(x_t)))
            frame = Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid)
            frames_shown.append(frame.quantize(64, dither=Image.Dither.NONE))
    durations = np.full(len(frames_shown), 80)
    durations[-1] = 2500
    with files.replacing(path) as draft:
        first, *rest = frames_shown
        first.save(draft, save_all=True, append_images=rest, duration=durations.tolist(), loop=0)


def schedule(sched, name="linear"):
    """The factors of image and noise in x_t, and the signal-to-noise ratio ᾱ_t / (1 - ᾱ_t), against t."""
    import numpy as np

    t = np.arange(len(sched["beta_t"]))
    figure, left, right = two_axes_of_t()
    left.plot(t, sched["sqrtab"], color=BLUE, label=r"image, $\sqrt{\bar\alpha_t}$")
    left.plot(t, sched["sqrtmab"], color=ORANGE, linestyle="--", label=r"noise, $\sqrt{1 - \bar\alpha_t}$")
    left.set_ylabel("factor in $x_t$")
    left.legend()
    right.axhline(1, color=GRAY, linewidth=0.8)  # first, as a logarithmic axis needs a value above 0
    right.semilogy(t[1:], sched["sqrtab"][1:] ** 2 / sched["sqrtmab"][1:] ** 2, color=GREEN, label=name)
    right.set_ylabel("signal-to-noise ratio")
    right.legend()
    return figure


def schedules(T=1000):
    """All noise schedules beside each other: ᾱ_t, and log(ᾱ_t / (1 - ᾱ_t)) (slide "Improvements").

    Dotted: with zero terminal SNR, where the log-SNR of t = T is -∞.
    """
    import numpy as np

    from diffusion.schedules import SCHEDULES, log_snr, make_schedule

    figure, left, right = two_axes_of_t()
    t = np.arange(T + 1)
    for name, colour in zip(SCHEDULES, (BLUE, ORANGE, GREEN), strict=True):
        for zero_snr, style in (False, "-"), (True, ":"):
            ab = make_schedule(name, T=T, zero_snr=zero_snr).alphabar
            known = slice(1, T if zero_snr else T + 1)
            left.plot(t, ab, style, color=colour)
            label = None if zero_snr else name
            right.plot(t[known], log_snr(ab[known]), style, color=colour, label=label)
    left.set_ylabel(r"$\bar\alpha_t$")
    right.set_ylabel("log-SNR")
    right.legend()
    return figure


def network(model):
    """The U-Net of a model with the sizes of its feature maps (slides "U-Net")."""
    import keras.layers as kl
    import matplotlib.pyplot as plt

    import unet

    def sizes(layer):
        return layer.output.shape[1:]

    layers = model.layers
    first = next(layer for layer in layers if isinstance(layer, unet.Conv3Layer))
    downs = [layer for layer in layers if isinstance(layer, unet.UnetDownLayer)]
    pool = next(layer for layer in layers if isinstance(layer, kl.AveragePooling2D))
    wide = next(layer for layer in layers if isinstance(layer, kl.Conv2DTranspose))
    ups = [layer for layer in layers if isinstance(layer, unet.UnetUpLayer)]
    path = [("$x_t$", model.inputs[0].shape[1:]), ("Conv3Layer", sizes(first))]
    path += [("UnetDownLayer", sizes(layer)) for layer in downs]
    path += [("average", sizes(pool)), ("Conv2DTranspose", sizes(wide))]
    path += [("UnetUpLayer", sizes(layer)) for layer in ups]
    path += [(r"Conv2D, $\epsilon_\theta$", model.outputs[0].shape[1:])]
    levels = [0, 0, 1, 2, 3, 4, 3, 2, 1, 0, 0]

    figure, axis = plt.subplots(figsize=(13.5, 4.6), layout="constrained")
    for k, ((label, (height, width, channels)), level) in enumerate(zip(path, levels, strict=True)):
        colour = GRAY if k in (0, len(path) - 1) else BLUE if k < 5 else GREEN if k < 6 else ORANGE
        axis.add_patch(plt.Rectangle((k - 0.43, -level - 0.28), 0.86, 0.56, color=colour, alpha=0.25))
        axis.text(k, -level, f"{label}\n{height}×{width}×{channels}", ha="center", va="center", fontsize=7.5)
        if k:
            start, end = (k - 1 + 0.43, -levels[k - 1]), (k - 0.43, -level)
            axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "black"})
    for start, end in (1, 10), (2, 9), (3, 8), (4, 7):  # joined before the layer `end`
        bend = {"arrowstyle": "->", "color": GRAY, "linestyle": "--", "connectionstyle": "arc3,rad=-0.15"}
        join = (end - 0.5, -(levels[end - 1] + levels[end]) / 2)
        axis.annotate("", join, (start, 0.3 - levels[start]), arrowprops=bend)
    axis.annotate("t / T → TimeLayer\nadded here", (5, -4.3), (5, -5.2), ha="center", fontsize=8,
                  arrowprops={"arrowstyle": "->", "color": "black"})  # fmt: skip
    axis.set_xlim(-0.6, len(path) - 0.4)
    axis.set_ylim(-5.5, 1.3)
    axis.axis("off")
    axis.set_title(f"{model.count_params():,} parameters; dashed: skip connections", fontsize=10)
    return figure


def training(path):
    """Loss and learning rate of `model.csv` against the epoch."""
    import matplotlib.pyplot as plt

    from training import history

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no table {path} for the figure training; choose others with --only")
    rows = [dict(zip(history.COLUMNS, row, strict=True)) for row in history.read_rows(path)]
    if not rows:
        raise ValueError(f"{path} has no epochs yet")
    epochs = [int(row["epoch"]) for row in rows]
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    marker = "o-" if len(rows) < 40 else "-"
    loss = [float(row["loss_mean"]) for row in rows]
    axis.plot(epochs, loss, marker, color=BLUE)
    axis.set_yscale("log" if min(loss) > 0 else "linear")  # with a learned variance it may be negative
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss", color=BLUE)
    axis.grid(alpha=0.3, which="both")
    rate = axis.twinx()
    rate.plot(epochs, [float(row["learning_rate"]) for row in rows], "--", color=ORANGE)
    rate.set_ylabel("learning rate", color=ORANGE)
    rate.set_ylim(0)
    return figure


def two_axes_of_t():
    """A figure with two axes side by side, both against t."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis in left, right:
        axis.set_xlabel("t")
        axis.grid(alpha=0.3)
    return figure, left, right


def fractions(sched):
    """The steps 0, 50, 100, 250, 500, 1000, or the same fractions of another T, each once."""
    from ddpm import n_steps

    return sorted({round(t * n_steps(sched) / 1000) for t in STEPS})


def sampler(model, batch_size, noise=None, classifier=None):
    """Schedule and reverse steps of a model, guided by a classifier if there is one."""
    from diffusion import model_file
    from diffusion.reverse import ReverseSteps

    sched, target = model_file.diffusion_of(model)
    noise = {"noise": noise} if noise else {}
    return sched, ReverseSteps(model, sched, batch_size, target, classifier=classifier, **noise)


def strip(rows, titles, names):
    """Rows of images, in [-1, 1] or int16 pixels, with titles above the columns and names beside the rows."""
    import matplotlib.pyplot as plt
    import numpy as np

    from ddpm import to_pixels

    rows = list(rows)
    size = (1.3 * len(titles) + 0.4, 1.3 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False, layout="constrained")
    for row, images, name in zip(axes, rows, names, strict=True):
        for axis, image in zip(row, images, strict=True):
            image = np.asarray(image)
            pixels = (image if image.dtype.kind in "ui" else to_pixels(image)).astype(np.uint8)
            axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def parse_options(arguments=None):
    parser = console.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="model.keras", metavar="FILE.keras", help="the trained network (model.keras)")
    add("--data", metavar="SOURCE", help="source of the image of `forward` (that of the training images)")
    add("--out", default="figures", metavar="FOLDER", help="where the files go (figures)")
    add("--only", type=console.some_of(ALL), metavar="NAMES", help=f"some of {','.join(ALL)} (all that the model has)")
    add("--classifier", metavar="FILE.keras", help="guides the figure classes (the model itself)")
    add("--seed", type=console.integer(0), default=0, metavar="N", help="of all noise (0)")
    return parser.parse_args(arguments)


def choose_figures(typed, model, classifier):
    """The names of the figures to draw: those that were typed, or all that the model has.

    Raises:
        ValueError: if one was typed that it does not have.
    """
    lacking = {name: why for name in typed or ALL if (why := why_not(name, model, classifier))}
    for name in lacking if typed else ():
        raise ValueError(f"--only {name}: {lacking[name]}")
    return [name for name in typed or ALL if name not in lacking]


def why_not(name, model, classifier):
    """Why a model does not have a figure, or None if it has it."""
    import unet
    from diffusion import model_file

    if name == "classes" and not (classifier or model_file.classes_of(model)):
        return "this model has no classes; train one with --classes, or give a --classifier"
    if name == "network" and not any(isinstance(layer, unet.UnetDownLayer) for layer in model.layers):
        return "it shows the network of the slides, and this model has another one"
    return None


def prepare_files(folder, names, inputs):
    """Makes the folder if it is missing. The path of each figure in it by name, checked to be writable and no input."""
    from support import files

    files.make_folder("--out", folder)
    paths = {name: os.path.join(folder, name + (".gif" if name == "gif" else ".png")) for name in names}
    files.check_outputs([("--out", path) for path in paths.values()], inputs)
    return paths


def draw_for_files():
    """Makes matplotlib draw into files, and alike for everybody: without the style, fonts and windows of the user."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcdefaults()


def main():
    with console.one_line_errors("figures.py"):
        options = parse_options()
        say("figures.py: starting TensorFlow …")
        from support import device

        device.start_tensorflow(parts=device.MOST_PARTS)
        draw_for_files()
        import data
        from diffusion import model_file
        from support import files

        model, book = model_file.open_with_schedule(options.model)
        table = files.table_name(options.model)
        classifier = options.classifier and model_file.open_model(options.classifier, classifier=True)
        if classifier:
            model_file.check_guide(classifier, options.classifier, model, classifier=True)
        if sentence := model_file.warn_of_no_class(book):
            console.warn(sentence)
        names = choose_figures(options.only, model, classifier)
        models = [model_file.locate(path) for path in (options.model, options.classifier) if path]
        inputs = [*models, table, options.data or book.get("data", {}).get("source")]
        paths = prepare_files(options.out, names, inputs)  # better known now than after the work

        def some_image():
            size, _, channels = model.inputs[0].shape[1:]
            images, _ = data.load_images(options.data or book["data"]["source"], size, channels)
            return images[options.seed % len(images)]

        sched, _ = model_file.diffusion_of(model)

        def write(name, path):
            if name == "gif":
                reverse_gif(model, path, seed=options.seed)
                return
            with files.replacing(path) as draft:
                draw[name]().savefig(draft, dpi=120)

        draw = {
            "forward": lambda: forward(some_image(), sched, seed=options.seed),
            "reverse": lambda: reverse(model, options.seed),
            "schedule": lambda: schedule(sched),
            "schedules": schedules,
            "network": lambda: network(model),
            "interpolation": lambda: interpolation(model, seed=options.seed),
            "training": lambda: training(table),
            "classes": lambda: classes(model, classifier, seed=options.seed),
        }
        status = 0
        for name, path in paths.items():
            try:
                write(name, path)
                say(path)
            except Exception as error:  # the others may succeed
                status = max(status, console.report(f"figures.py: {name}", error))
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
