"""Generates images with a trained network, starting from noise.

    import reverse_diffusion as rd; a = rd.my_sample(); plt.imshow(a[0])        in IPython
    python reverse_diffusion.py --n-sample 16 --out samples.png

Slides: "Reverse diffusion example, code". The mathematics of a step is in `ddpm.py`.
"""

import functools
import importlib.util
import os
import secrets
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
        verbose: 0 for silence, 1 for a bar that counts t down.
        noise: an array or tensor (n_sample, height, width, channels), x_T; None to draw it from the seed.
        raw: whether to return float32 in the range of values of the training images, not rounded.

        How to sample (`diffusion.options.Sampling`; None for what the file recommends, or what suits the sampler):
        sampler: `'ddpm'`, `'ddim'`, `'dpm++'` or `'langevin'`, see `diffusion/samplers.py`.
        steps: how many, 1 … T; 20 to 50 do for ddim and dpm++.
        spacing: of the steps, `'uniform'` in t, `'quadratic'` or `'logsnr'`.
        eta: noise of ddim, 0 … 1.
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
    from support import console, device
    from support.checks import MOST, check_number

    check_number("n_sample", n_sample, 1, integer=True)
    seed = secrets.randbits(31) if seed is None else seed
    check_number("seed", seed, 0, MOST, integer=True)
    device.start_tensorflow()
    from ddpm import to_pixels
    from diffusion import generate, model_file
    from diffusion.sampling import make_plan

    # Our pre-trained model, with the noise schedule that it was trained with.
    trained = generate.open_model(model)
    generate.check_shape(image_shape, trained)
    guides = {kind: generate.open_guide(kind, guide, trained) for kind, guide in asked.guides().items()}
    plan = make_plan(trained.sched, trained.choose(asked))

    x_T = generate.as_x_T(noise, n_sample, trained.image_shape)  # None to draw it
    labels = generate.as_labels(label, n_sample if x_T is None else len(x_T), trained, guides["classifier"])
    if verbose and (label is None or (guidance != 1 and not weaker)):
        warn(model_file.warn_of_no_class(trained))
    run = {"seed": seed, "clip": clip, "start": x_T, "progress": console.Countdown if verbose else None}
    x_0 = generate.run_plan(plan, trained, labels, **run, **guides)
    return generate.to_raw(x_0, trained) if raw else to_pixels(x_0)


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
    from support import console, device
    from support.checks import check_finite

    device.start_tensorflow()
    from diffusion import generate, model_file
    from diffusion.sampling import make_inversion

    trained = generate.open_model(model)
    x_0 = generate.as_x_0(images, trained.image_shape)
    labels = generate.as_labels(label, len(x_0), trained)
    if verbose:
        warn(generate.warn_of_range(images), label is None and model_file.warn_of_no_class(trained))
    plan, progress = make_inversion(trained.sched, steps, trained.target), console.Countdown if verbose else None
    noise = generate.run_plan(plan, trained, labels, clip=False, start=x_0, progress=progress)
    check_finite(noise)
    return noise


def warn(*sentences):
    """Prints sentences on stderr, but for those that are None or False."""
    from support import console

    for sentence in filter(None, sentences):
        console.warn(sentence)


def main():
    from diffusion.options import Sampling, parse_sampling_options
    from support import console, device

    with console.one_line_errors("reverse_diffusion.py"):
        options = parse_sampling_options(__doc__)
        arguments = Sampling.among(vars(options)).arguments()
        console.say("reverse_diffusion.py: starting TensorFlow …")
        device.start_tensorflow(parts=min(options.n_sample, device.MOST_PARTS))
        from data.pixels import Scale
        from diffusion import generate, model_file
        from support import files, grids

        models = [model_file.locate(path) for path in (options.model, options.classifier, options.weaker) if path]
        files.check_outputs([("--out", options.out), ("--npy", options.npy)], models)
        if options.label:
            arguments["label"], notes = generate.read_labels(options.label, options.model, options.classifier)
            for note in notes:
                console.say(note)
        trained = generate.open_model(options.model)
        channels, settings = trained.image_shape[-1], trained.metadata.get("settings", {})
        shown = grids.parse_shown(options.show or settings.get("show"), channels)
        images = my_sample(None, options.n_sample, options.model, options.seed, raw=options.raw, **arguments)
        if options.npy:
            files.save_array(images, options.npy)
        if options.raw:
            images = Scale(trained.scale["black"], trained.scale["white"]).store(images)
        grids.save_grid(images, options.out, shown=shown)
        what = "1 image" if options.n_sample == 1 else f"{options.n_sample} images"
        console.say(f"{what} in {options.out}" + (f" and {options.npy}" if options.npy else ""))
        if sentence := grids.describe_shown(shown, channels):
            console.say(sentence)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # which `python -P` leaves out
    main()
