"""Generates images with a trained network, starting from noise.

    import reverse_diffusion as rd; a = rd.my_sample(); plt.imshow(a[0])        in IPython
    python reverse_diffusion.py --n-sample 16 --out samples.png

Slides: "Reverse diffusion example, code". The mathematics of a step is in `ddpm.py`.
"""

import functools
import importlib.util
import os
import sys

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
                    f"{path} hides the module {name} in {folder}; rename it, or put {folder} first in sys.path, and "
                    "start Python again"
                )


def one_at_a_time(function):
    """Checks what is imported, and makes a function wait while another thread runs it."""

    @functools.wraps(function)
    def alone(*arguments, **named):
        check_imports()
        from support import device

        with device.one_at_a_time():
            return function(*arguments, **named)

    return alone


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
    raw=False,
    first=0,
):
    """Samples images (DDPM algorithm 2).

    The first call for a model and a batch size compiles, which takes seconds. Compiled steps are cached for the two
    latest models and twelve batch sizes; a batch is padded to the next of them. Threads may call it at once; processes
    must be spawned, not forked after the first call.

    Args:
        image_shape: (height, width, channels), only to check the model's.
        n_sample: how many images; with `noise` as many as it holds.
        model: a path, `'drawings'` for the pretrained model of this project, or a Keras model that takes [x_t, t/T] or
            [x_t, t/T, label] and predicts the noise. The noise schedule comes from its metadata, else is the slides'.
        seed, first: an integer, whose image k is always the same (None for another one), and the first image's number.
        verbose: 0 for silence, 1 for a bar that counts t down.
        noise: an array or tensor (n_sample, height, width, channels), x_T; None to draw it from the seed.
        raw: whether to return float32 in the range of values of the training images, not rounded.

        How to sample (`diffusion.options.Sampling`; None for what the file recommends, or what suits the sampler):
        sampler: `'ddpm'`, `'ddim'`, `'dpm++'` or `'langevin'`, see `diffusion/samplers.py`.
        steps: how many, 1 … T; 20 to 50 do for ddim and dpm++.
        spacing, eta: of the steps, `'uniform'` in t, `'quadratic'` or `'logsnr'`; noise of ddim, 0 … 1.
        variance: of a step of ddpm, `'beta'`, `'posterior'` or `'learned'`, see `diffusion.samplers.coefficients`.
        clip: whether estimates of x_0 are clipped, see `ddpm.p_sample`.
        corrector, snr: how many Langevin steps follow each step, 0 … 4095, and how large they are, 1e-6 … 10.
        label: a class, as its name, which is text, or its number from 0, an integer; or one for each image; None for
            images of all kinds.
        guidance: how strongly the class guides: 0 ignores it, 1 follows it, 2 to 4 exaggerate it; or how far to lead
            away from what `weaker` estimates, 1.5 to 2; see `diffusion/denoiser.py`.
        guidance_interval: the first and the last t where `guidance` holds, else 1; None for all t.
        classifier: a path or a model of `--network classifier`, which guides in place of the model's own classes.
        weaker: a path or a smaller or less trained model of the same images, which guides away from its own mistakes
            (autoguidance); a label is then followed as it is.

    Returns:
        int16 array (n_sample, height, width, channels), values 0 … 255, unless they are `raw`.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the model cannot be used, another argument is invalid, or this process was forked after a call.
        FloatingPointError: if images come out with values that are NaN or infinite.
        ImportError: if a module of the same name is in the way of one of ours.
    """
    from diffusion.options import Sampling

    asked = Sampling.among(locals())
    generate = start_generating()
    from ddpm import to_pixels
    from diffusion.sampling import make_plan
    from support.checks import check_number

    check_number("n_sample", n_sample, 1, integer=True)
    # Our pre-trained model, with the noise schedule that it was trained with.
    trained = generate.open_model(model)
    generate.check_shape(image_shape, trained)
    plan = make_plan(trained.sched, trained.choose(asked))
    x_T = generate.as_x_T(noise, n_sample, trained.image_shape)  # None to draw it
    count = n_sample if x_T is None else len(x_T)
    x_0 = generate.sample_images(plan, trained, asked, count, seed, first=first, start=x_T, **shown(verbose))
    return trained.scale.to_values(x_0) if raw else to_pixels(x_0)


@one_at_a_time
def invert(images, model="model.keras", steps=None, verbose=1, *, label=None):
    """The noise that DDIM turns into given images: `my_sample(noise=…, sampler="ddim", clip=False)` leads back.

    Args:
        images: (n, height, width, channels), integers 0 … 255 or floating-point numbers in [-1, 1]; those that all lie
            in 0 … 1 get a warning.
        steps: how many steps, 1 … T; None for all. The more, the nearer; each asks the network twice.
        model, verbose, label: see `my_sample`.

    Returns:
        float32 array (n, height, width, channels). What is raised: as in `my_sample`.
    """
    return start_generating("editing").invert_images(images, model, steps, label, **shown(verbose))


@one_at_a_time
def restore(measurement, operation, deviation=0.0, model="model.keras", *, verbose=1, **named):
    """Images from blurred, small, grey, incomplete or noisy ones: arguments as in `diffusion.editing.restore`."""
    return start_generating("editing").restore(measurement, operation, deviation, model, **named, **shown(verbose))


@one_at_a_time
def inpaint(images, mask, model="model.keras", *, verbose=1, **named):
    """Images whose pixels are filled in where the mask is 0: arguments as in `diffusion.editing.inpaint`."""
    return start_generating("editing").inpaint(images, mask, model, **named, **shown(verbose))


@one_at_a_time
def vary(images, strength, model="model.keras", *, verbose=1, **named):
    """Variations of images: arguments as in `diffusion.editing.vary`."""
    return start_generating("editing").vary(images, strength, model, **named, **shown(verbose))


@one_at_a_time
def interpolate(a, b, count, model="model.keras", *, verbose=1, **named):
    """Images on the way from one image to another: arguments as in `diffusion.editing.interpolate`."""
    return start_generating("editing").interpolate(a, b, count, model, **named, **shown(verbose))


def start_generating(module="generate"):
    """A module of `diffusion` that needs TensorFlow."""
    from support import device

    device.start_tensorflow()
    return importlib.import_module(f"diffusion.{module}")


def shown(verbose):
    """Functions that show progress and warnings, or none."""
    from support import console

    return {"progress": console.Countdown, "warn": console.warn} if verbose else {}


def edit_files(options, sampling):
    """What the grid shows first, and the images, of --restore, --vary or --interpolate."""
    from data.image_files import read_mask, read_one

    editing, model = start_generating("editing"), options.model
    height, width, channels = start_generating().open_model(model).image_shape
    how = {"seed": options.seed, **sampling, **shown(1)}
    photo, *other = (read_one(path, (height, width), channels) for path in options.photos)
    if other:
        return [], editing.interpolate(photo, *other, options.n_sample, model, strength=options.strength, **how)
    if options.vary:
        return [photo], editing.vary(photo[None], options.strength, model, n_sample=options.n_sample, **how)
    how |= {name: getattr(options, name) for name in ("n_sample", "operation", "factor", "mask", "deviation", "method")}
    if options.operation == "mask":
        how["mask"] = read_mask(options.mask or options.restore, options.restore, (height, width))
    return editing.try_out(photo, model=model, **how)


def main():
    from diffusion.command_line import parse_sampling_options
    from diffusion.options import Sampling
    from support import console, device, files, grids, launcher
    from support.worker import at_work

    with at_work("reverse_diffusion.py") as worker:
        options = parse_sampling_options(__doc__)
        arguments = Sampling.among(vars(options)).arguments()
        launcher.launch_if_several(worker, "reverse_diffusion.py", options.devices, most=options.n_sample)
        console.say("reverse_diffusion.py: starting TensorFlow …")
        device.start_tensorflow(parts=min(options.n_sample, device.MOST_PARTS))
        from diffusion import generate, model_file, sharing
        from support.scale import Scale

        models = [model_file.locate(path) for path in (options.model, options.classifier, options.weaker) if path]
        files.check_outputs([("--out", options.out), ("--npy", options.npy)], [*models, *options.photos, options.mask])
        if options.label:
            arguments["label"], notes = generate.read_labels(options.label, options.model, options.classifier)
            for note in notes:
                console.say(note)
        trained, before = generate.open_model(options.model), []
        chosen = trained.shown(options.show)
        if options.photos:
            before, images = edit_files(options, arguments)
        else:
            images = sharing.share_images(worker, my_sample, options, arguments)
        if options.npy:
            files.save_array(images, options.npy)
        if options.raw:
            images = Scale(trained.scale.black, trained.scale.white).store(images)
        grids.save_grid([*before, *images], options.out, shown=chosen)
        what = f"{options.n_sample} image{'s' * (options.n_sample > 1)} in {options.out}"
        console.say(what + (f" and {options.npy}" if options.npy else ""))
        if sentence := grids.describe_shown(chosen, trained.image_shape[-1]):
            console.say(sentence)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # which `python -P` leaves out
    importlib.import_module("support.packages").check_packages()
    main()
