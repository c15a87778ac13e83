"""Generates images with a trained network, starting from noise.

    import reverse_diffusion as rd; a = rd.my_sample(); plt.imshow(a[0])        in IPython
    python reverse_diffusion.py --n-sample 16 --out samples.png

Slides: "Reverse diffusion example, code". The mathematics of a step is in `ddpm.py`.
"""

import functools
import importlib.util
import numbers
import os
import secrets
import sys
import threading

OURS = ("ddpm", "unet", "diffusion", "support")


def check_imports(names=OURS):
    """Checks that Python finds our modules and not some of the same name, beside a notebook for example.

    Raises:
        ImportError: names the file that is in the way, and says what to do.
    """
    folder = os.path.dirname(os.path.realpath(__file__))
    for name in names:
        module = sys.modules.get(name)
        found = getattr(module, "__file__", None) if module else getattr(importlib.util.find_spec(name), "origin", None)
        ours = os.path.join(folder, name + ".py"), os.path.join(folder, name, "__init__.py")
        if module or found:
            path = os.path.realpath(found) if found else f"a module {name} without a file"
            if path not in ours:
                raise ImportError(
                    f"{path} is in the way of {name}.py in {folder}: rename it, or put {folder} first in sys.path, "
                    "and start Python again"
                )


_lock = threading.RLock()


def one_at_a_time(function):
    """Makes a function wait while another thread runs it: Keras cannot trace a model in two threads.

    What could never run here is refused before: in a forked process nobody might release the lock.
    """

    @functools.wraps(function)
    def locked(*arguments, **named):
        check_imports()
        from support import device

        device.check_process()
        with _lock:
            return function(*arguments, **named)

    return locked


@one_at_a_time
def my_sample(
    image_shape=None,
    n_sample=1,
    model="model.keras",
    seed=None,
    variance=None,
    clip=True,
    verbose=1,
    *,
    sampler=None,
    steps=None,
    spacing=None,
    eta=0.0,
    label=None,
    guidance=1.0,
    guidance_interval=None,
    classifier=None,
    weaker=None,
    noise=None,
    corrector=0,
    snr=0.16,
):
    """Samples images (DDPM algorithm 2).

    The first call for a model and a batch size compiles, which takes seconds. Compiled steps are cached for the two
    latest models and twelve batch sizes; a batch is padded to the next of them. Threads may call it at once; processes
    must be spawned, not forked after the first call.

    Args:
        image_shape: (height, width, channels), only to check the model's.
        n_sample: how many images; with `noise` as many as it holds.
        model: a path, `'drawings'` for the pretrained model of this project, or a Keras model that takes [x_t, t/T] or
            [x_t, t/T, label] and predicts the noise. The noise schedule comes from the metadata of the model; without
            metadata it is that of the slides.
        seed: an integer; image k of a seed is the same however many are sampled. None for different ones every time.
        variance: of a step of ddpm, `'beta'`, `'posterior'` or `'learned'`, see `diffusion.samplers.coefficients`; None
            for what the file recommends with its sampler, else β.
        clip: whether estimates of x_0 are clipped, see `ddpm.p_sample`.
        verbose: 0 for silence, 1 for a bar that counts t down.
        sampler: `'ddpm'`, `'ddim'`, `'dpm++'` or `'langevin'`, see `diffusion.samplers.coefficients`; None for what the
            file recommends; ddpm with all steps if it recommends nothing or `variance` is chosen.
        steps: how many steps, 1 … T; None for as many as the file recommends with its sampler, else all. 20 to 50 do
            for ddim and dpm++.
        spacing: of the steps, `'uniform'` in t, `'quadratic'` or `'logsnr'`; None for what suits the sampler.
        eta: of ddim, 0 (no noise) … 1.
        label: a class, as its name, which is text, or its number from 0, an integer; or one for each image; None for
            images of all kinds.
        guidance: how strongly the class guides: 0 ignores it, 1 follows it, 2 to 4 exaggerate it; or how far to lead
            away from what `weaker` estimates, 1.5 to 2; see `diffusion.denoiser`.
        guidance_interval: the first and the last t where `guidance` holds, else 1; None for all t.
        classifier: a path or a model of `--network classifier`, which guides in place of the model's own classes.
        weaker: a path or a smaller or less trained model of the same images, which guides away from its own mistakes
            (autoguidance); a label is then followed as it is.
        noise: an array or tensor (n_sample, height, width, channels), x_T; None to draw it from the seed.
        corrector: how many Langevin steps follow each step, 0 … 4095; each asks the network once more.
        snr: how large those are, 1e-6 … 10.

    Returns:
        int16 array (n_sample, height, width, channels), values 0 … 255.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the model cannot be used, another argument is invalid, or this process was forked after a call.
        FloatingPointError: if images come out with values that are NaN or infinite.
        ImportError: if a module of the same name is in the way of one of ours.
    """
    from support import device

    if not (isinstance(n_sample, numbers.Integral) and n_sample >= 1):
        raise ValueError(f"n_sample must be an integer of at least 1, got {n_sample}")
    seed = secrets.randbits(31) if seed is None else seed
    if not (isinstance(seed, numbers.Integral) and 0 <= seed < 2**63):
        raise ValueError(f"seed must be an integer of at least 0, got {seed}")

    # Our pre-trained model, and the noise schedule that it was trained with.
    device.start_tensorflow()
    import numpy as np

    from ddpm import to_pixels
    from diffusion import generate, model_file
    from diffusion.sampling import make_plan
    from support import console

    model, shape = generate.open_model(model)
    if classifier and weaker:
        raise ValueError("classifier and weaker both guide; choose one")
    classifier = generate.open_guide("classifier", classifier, model)
    weaker = generate.open_guide("weaker", weaker, model)
    if image_shape is not None and (np.ndim(image_shape) != 1 or tuple(image_shape) != shape):
        raise ValueError(f"this model generates images of shape {shape}, not {image_shape}")
    if noise is not None:
        noise = generate.as_images("noise", noise, shape, kinds="f")
        if n_sample not in (1, len(noise)):
            raise ValueError(f"noise for {len(noise)} images makes as many, not n_sample = {n_sample}")
        n_sample = len(noise)
    labels = generate.as_labels(label, n_sample, model, classifier)
    generate.check_guidance(label, guidance, classifier, weaker)
    if verbose and (label is None or (guidance != 1 and not weaker)):
        warn(model_file.warn_of_no_class(model_file.metadata(model)))

    sched, steps_for = generate.reverse_steps(model, classifier, weaker)
    how = {**model_file.sampler_of(model, sampler, steps, variance), "spacing": spacing, "eta": eta}
    how |= {"corrector": corrector, "snr": snr, "guidance": guidance, "guidance_interval": guidance_interval}
    plan, progress = make_plan(sched, **how), console.Countdown if verbose else None
    how = {"seed": seed, "clip": bool(clip), "start": noise, "progress": progress}
    return to_pixels(generate.run_plan(plan, steps_for, model, labels, **how))


@one_at_a_time
def invert(images, model="model.keras", steps=None, verbose=1, *, label=None):
    """The noise that DDIM turns into given images: `my_sample(noise=…, sampler="ddim", clip=False)` leads back.

    The more steps, the nearer; each asks the network twice. Estimates of x_0 are never clipped on this way. Models that
    predict x_0 begin at some noise, see `diffusion.sampling.make_inversion`.

    Args:
        images: (n, height, width, channels), integers 0 … 255 or floating-point numbers in [-1, 1]; those that all lie
            in 0 … 1 get a warning.
        model: see `my_sample`.
        steps: how many steps, 1 … T; None for all.
        verbose: 0 for silence, 1 for a bar that counts t up, and warnings.
        label: the class of the images, or one for each, see `my_sample`.

    Returns:
        float32 array (n, height, width, channels).

    Raises:
        FileNotFoundError, ValueError, FloatingPointError, ImportError: as `my_sample`.
    """
    from support import device

    device.start_tensorflow()
    import numpy as np

    import data
    from diffusion import generate, model_file
    from diffusion.sampling import make_inversion
    from support import console
    from support.checks import check_finite

    model, shape = generate.open_model(model)
    images = generate.as_images("images", images, shape)
    integers = images.dtype.kind in "ui"
    low, high = (0, 255) if integers else (-1, 1)
    if not np.all((images >= low) & (images <= high)):
        raise ValueError(f"images must lie in {low} … {high}, got {images.min():g} … {images.max():g}")
    x_0 = np.float32(data.scaled(images) if integers else images)
    labels = generate.as_labels(label, len(images), model)
    if verbose and not integers and images.min() >= 0:
        warn(
            "images in 0 … 1 are taken as grey to white, as black is -1; if 0 is meant to be black, give 2 * images - 1"
        )
    if verbose and label is None:
        warn(model_file.warn_of_no_class(model_file.metadata(model)))

    sched, steps_for = generate.reverse_steps(model, None, None)
    plan = make_inversion(sched, steps, model_file.diffusion_of(model)[1])
    progress = console.Countdown if verbose else None
    noise = generate.run_plan(plan, steps_for, model, labels, clip=False, start=x_0, progress=progress)
    check_finite(noise)
    return noise


def warn(sentence):
    """Prints a sentence on stderr, if there is one."""
    from support import console

    if sentence:
        console.warn(sentence)


def read_label(word, names):
    """A label as typed on a command line, where digits may be the name of a class, which goes first, or its number."""
    from support.console import say

    if not word.isdecimal():
        return word
    named = word in (names or [])
    number = names.index(word) if named else int(word)
    if named:
        say(f"--label {word} is the class of that name, number {number}")
    elif number < len(names or []):
        say(f"--label {word} is the class with that number, {names[number]}")
    return number


def read_labels(words, model, classifier):
    """The labels that were typed for a model, or for the classifier that guides it: one, or a list of several."""
    from diffusion import generate, model_file

    model, _ = generate.open_model(model)
    names = model_file.classes_of(generate.open_guide("classifier", classifier, model) or model)
    label_of = {word: read_label(word, names) for word in words}
    return label_of[words[0]] if len(words) == 1 else [label_of[word] for word in words]


def parse_options(arguments=None):
    from diffusion.options import add_sampler_options
    from support import console

    parser = console.Parser(description=__doc__)
    parser.add_argument("--n-sample", type=console.integer(1), default=16, metavar="N", help="how many images (16)")
    parser.add_argument(
        "--out", metavar="FILE", help="one grid of all images (samples.png; of a model NAME.keras, NAME-samples.png)"
    )
    parser.add_argument("--npy", metavar="FILE.npy", help="also write the exact pixels, int16 0 … 255")
    parser.add_argument(
        "--seed", type=console.integer(0), metavar="N", help="for the same images again (different ones every time)"
    )
    parser.add_argument(
        "--model",
        default="model.keras",
        metavar="FILE.keras",
        help="the trained network, or drawings, a pretrained one (model.keras)",
    )
    add_sampler_options(parser)
    parser.add_argument(
        "--label",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="class of the images, by name or number from 0, or one for each; one that begins with a dash as "
        "--label=CLASS (all kinds)",
    )
    parser.add_argument(
        "--classifier", metavar="FILE.keras", help="a model of --network classifier that guides to the class (none)"
    )
    options = parser.parse_args(arguments)
    from support import files

    options.out = options.out or os.path.basename(files.grid_name(options.model))
    files.check_image_name("--out", options.out)
    if options.npy and not options.npy.endswith(".npy"):
        parser.error(f"--npy must end in .npy, got {options.npy}")
    return options


def main():
    from support import console, device

    with console.one_line_errors("reverse_diffusion.py"):
        options = parse_options()
        console.say("reverse_diffusion.py: starting TensorFlow …")
        device.start_tensorflow(parts=min(options.n_sample, device.MOST_PARTS))
        from diffusion import model_file
        from diffusion.options import sampler_options
        from support import files

        models = [model_file.locate(path) for path in (options.model, options.classifier, options.weaker) if path]
        files.check_outputs([("--out", options.out), ("--npy", options.npy)], models)
        how = sampler_options(options)
        how |= {name: getattr(options, name) for name in ("classifier", "weaker")}
        label = options.label and read_labels(options.label, options.model, options.classifier)
        images = my_sample(None, options.n_sample, options.model, options.seed, label=label, **how)
        files.save_grid(images, options.out)
        if options.npy:
            files.save_array(images, options.npy)
        what = "1 image" if options.n_sample == 1 else f"{options.n_sample} images"
        console.say(f"{what} in {options.out}" + (f" and {options.npy}" if options.npy else ""))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # which `python -P` leaves out
    main()
