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


SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of batches, as each costs 10 MiB that TensorFlow never gives back
MODELS = 2  # of which compiled steps are cached
_lock = threading.RLock()


def one_at_a_time(function):
    """Makes a function wait while another thread runs it: Keras cannot trace a model in two threads."""

    @functools.wraps(function)
    def locked(*arguments, **named):
        with _lock:
            return function(*arguments, **named)

    return locked


@one_at_a_time
def my_sample(
    image_shape=None,
    n_sample=1,
    model="model.keras",
    seed=None,
    variance="beta",
    clip=True,
    verbose=1,
    *,
    sampler=None,
    steps=None,
    spacing=None,
    eta=0.0,
    noise=None,
    corrector=0,
    snr=0.16,
):
    """Samples images (DDPM algorithm 2).

    The first call for a model and a batch size compiles, which takes seconds. Compiled steps are cached for the two
    latest models and twelve batch sizes; a batch is padded to the next of them. Threads may call it at once.

    Args:
        image_shape: (height, width, channels), only to check the model's.
        n_sample: how many images; with `noise` as many as it holds.
        model: a path, or a Keras model that takes [x_t, t/T] and predicts the noise. The noise schedule comes from the
            metadata of the model; without metadata it is that of the slides.
        seed: an integer; image k of a seed is the same however many are sampled. None for different ones every time.
        variance, clip: see `ddpm.p_sample`.
        verbose: 0 for silence, 1 for a bar that counts t down.
        sampler: `'ddpm'` (None), `'ddim'`, `'dpm++'` or `'langevin'`, see `diffusion.samplers.coefficients`.
        steps: how many steps, 1 … T; None for all. 20 to 50 do for ddim and dpm++.
        spacing: of the steps, `'uniform'` in t, `'quadratic'` or `'logsnr'`; None for what suits the sampler.
        eta: of ddim, 0 (no noise) … 1.
        noise: an array or tensor (n_sample, height, width, channels), x_T; None to draw it from the seed.
        corrector: how many Langevin steps follow each step, 0 … 4095; each asks the network once more.
        snr: how large those are, 1e-6 … 10.

    Returns:
        int16 array (n_sample, height, width, channels), values 0 … 255.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the model cannot be used, or another argument is invalid.
        ImportError: if a module of the same name is in the way of one of ours.
    """
    check_imports()
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
    from diffusion.sampling import make_plan

    model, shape = open_model(model)
    if image_shape is not None and (np.ndim(image_shape) != 1 or tuple(image_shape) != shape):
        raise ValueError(f"this model generates images of shape {shape}, not {image_shape}")
    if noise is not None:
        noise = as_images("noise", noise, shape, kinds="f")
        if n_sample not in (1, len(noise)):
            raise ValueError(f"noise for {len(noise)} images makes as many, not n_sample = {n_sample}")
        n_sample = len(noise)
    sched, steps_for = reverse_steps(model)
    plan = make_plan(sched, "ddpm" if sampler is None else sampler, steps, spacing, eta, variance, corrector, snr)
    return to_pixels(run_plan(steps_for, plan, model, n_sample, seed, bool(clip), noise, verbose))


@one_at_a_time
def invert(images, model="model.keras", steps=None, verbose=1):
    """The noise that DDIM turns into given images: `my_sample(noise=…, sampler="ddim", clip=False)` leads back.

    The more steps, the nearer. Estimates of x_0 are never clipped on this way.

    Args:
        images: (n, height, width, channels), integers 0 … 255 or floating-point numbers in [-1, 1].
        model: see `my_sample`.
        steps: how many steps, 1 … T; None for all.
        verbose: 0 for silence, 1 for a bar that counts t up.

    Returns:
        float32 array (n, height, width, channels).

    Raises:
        FileNotFoundError, ValueError, ImportError: as `my_sample`.
    """
    check_imports()
    from support import device

    device.start_tensorflow()
    import numpy as np

    import data
    from diffusion.sampling import make_inversion

    model, shape = open_model(model)
    images = as_images("images", images, shape)
    integers = images.dtype.kind in "ui"
    low, high = (0, 255) if integers else (-1, 1)
    if not np.all((images >= low) & (images <= high)):
        raise ValueError(f"images must lie in {low} … {high}, got {images.min():g} … {images.max():g}")
    x_0 = data.scaled(images) if integers else images
    sched, steps_for = reverse_steps(model)
    return run_plan(
        steps_for, make_inversion(sched, steps), model, len(images), 0, False, x_0.astype(np.float32), verbose
    )


def as_images(name, images, shape, kinds="uif"):
    """Arrays, tensors or lists of numbers, of NumPy's `kinds`, as an array (n, *shape), n ≥ 1.

    Raises:
        ValueError: if they are none.
    """
    import numpy as np

    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != shape or not len(images):
        wanted = ", ".join(map(str, ("n", *shape)))
        raise ValueError(f"{name} must be an array of shape ({wanted}), n at least 1, got {images.shape}")
    if images.dtype.kind not in kinds or not np.all(np.abs(images) < 1e30):
        what = "floating-point numbers" if kinds == "f" else "numbers"
        raise ValueError(f"{name} must be an array of finite {what}, got {images.dtype}")
    return images


def run_plan(steps_for, plan, model, n_sample, seed, clip, start, verbose):
    """Runs the steps of a plan for all images in batches; float32 (n_sample, height, width, channels)."""
    import numpy as np

    from diffusion.sampling import sample
    from support import console
    from support.execution import even_batches

    _, batch_size = even_batches(model, n_sample)
    batch_size = min((size for size in SIZES if size >= batch_size), default=batch_size)
    batches, steps = -(-n_sample // batch_size), steps_for(clip, batch_size)
    done = []
    for batch in range(batches):
        # The last batch is filled up, not shorter, and so needs no compilation of its own.
        index = np.arange(batch * batch_size, (batch + 1) * batch_size)
        some = None if start is None else np.asarray(start, np.float32)[index % n_sample]
        title = f"{batch + 1}/{batches} " if batches > 1 else ""
        countdown = console.Countdown(plan.times, title) if verbose else None
        for t, x_t in sample(steps, plan, seed, index, some):
            if countdown:
                countdown.show(t)
        done.append(np.asarray(x_t))
    return np.concatenate(done)[:n_sample]


def open_model(model):
    """A model given as itself or by its path, and the shape of its images."""
    from support import checkpoint

    if isinstance(model, str | os.PathLike):
        model = load(*load_key(model))
    elif not getattr(model, "inputs", None):
        raise ValueError(f"model must be a path, or a Keras model that has been built, got {type(model).__name__}")
    else:
        checkpoint.check_network(model, "this")
    return model, tuple(model.inputs[0].shape[1:])


def load_key(path):
    """The real path of a file, and a stamp that differs when the file has changed."""
    path = os.path.realpath(path)
    status = os.stat(path) if os.path.exists(path) else None
    return path, status and (status.st_ino, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=MODELS)
def load(path, stamp):
    """The model in a file, cached until two others or newer ones are asked for."""
    from support import checkpoint

    return checkpoint.open_model(path)


@functools.lru_cache(maxsize=MODELS)
def reverse_steps(model):
    """The schedule of a model, and a function of (clip, batch_size) that returns its compiled steps.

    They are cached as long as the model is one of the latest, since they take seconds to compile.
    """
    from support import checkpoint
    from support.execution import ReverseSteps

    sched, target = checkpoint.diffusion_of(model)
    return sched, functools.cache(lambda clip, batch_size: ReverseSteps(model, sched, batch_size, target, clip))


def parse_options(arguments=None):
    from support import console

    parser = console.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-sample", type=console.integer(1), default=16, metavar="N", help="how many images (16)")
    parser.add_argument(
        "--out", metavar="FILE", help="one grid of all images (samples.png; of a model NAME.keras, NAME-samples.png)"
    )
    parser.add_argument("--npy", metavar="FILE.npy", help="also write the exact pixels, int16 0 … 255")
    parser.add_argument(
        "--seed", type=console.integer(0), metavar="N", help="for the same images again (different ones every time)"
    )
    parser.add_argument(
        "--model", default="model.keras", metavar="FILE.keras", help="the trained network (model.keras)"
    )
    console.add_sampler_options(parser)
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
        from support import files

        for path in filter(None, (options.out, options.npy)):
            files.check_writable(path)  # better known now than after the work
        console.say("reverse_diffusion.py: starting TensorFlow …")
        device.start_tensorflow(parts=min(options.n_sample, device.MOST_PARTS))
        images = my_sample(None, options.n_sample, options.model, options.seed, **console.sampler_options(options))
        files.save_grid(images, options.out)
        if options.npy:
            files.save_array(images, options.npy)
        what = "1 image" if options.n_sample == 1 else f"{options.n_sample} images"
        console.say(f"{what} in {options.out}" + (f" and {options.npy}" if options.npy else ""))


if __name__ == "__main__":
    main()
