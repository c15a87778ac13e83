"""The options of a sampling run on a command line: names come from the tables of what they choose. No TensorFlow."""

import argparse

from diffusion.samplers import SAMPLERS, SPACINGS, VARIANCES
from support.console import integer, number

SAMPLER_OPTIONS = (  # arguments of `make_plan`
    *("sampler", "steps", "spacing", "eta", "variance", "corrector", "snr"),
    *("guidance", "guidance_interval"),
)


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how images are sampled; see `diffusion.sampling.make_plan`."""
    add = parser.add_argument
    add(
        "--sampler",
        choices=SAMPLERS,
        help="how images are sampled (what the model's file recommends, else ddpm)",
    )
    add(
        "--steps",
        type=integer(1),
        metavar="N",
        help="number of steps, at most T; 20 to 50 do for ddim and dpm++ (what the file recommends with its sampler, "
        "else all)",
    )
    add(
        "--spacing",
        choices=SPACINGS,
        help="how the steps are spaced (dpm++ and langevin logsnr, else uniform)",
    )
    add("--eta", type=number(0, 1), default=0.0, help="noise of ddim, 0 to 1 (0)")
    add(
        "--variance",
        choices=VARIANCES,
        help="variance of the noise in a step of ddpm (what the file recommends with its sampler, else beta)",
    )
    add("--corrector", type=integer(0, 4095), default=0, metavar="N", help="Langevin steps after each step (0)")
    add("--snr", type=number(1e-6, 10), default=0.16, metavar="RATIO", help="how large those are (0.16)")
    add(
        "--guidance",
        type=number(float("-inf")),
        default=1.0,
        metavar="G",
        help="how strongly the class guides: 0 ignores it, 1 follows it, 2 to 4 exaggerate it; or how far to lead away "
        "from --weaker, 1.5 to 2 (1)",
    )
    add(
        "--guidance-interval",
        type=integer(0),
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="the first and the last t where --guidance holds, else 1 (all)",
    )
    add(
        "--weaker",
        metavar="FILE.keras",
        help="a smaller or less trained model of the same images, which guides away from its own mistakes (none)",
    )


def sampler_options(options: argparse.Namespace) -> dict:
    """What was typed of them, as keyword arguments."""
    return {name: getattr(options, name) for name in SAMPLER_OPTIONS}
