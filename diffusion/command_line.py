"""Command lines of the scripts that sample: a parser for `Sampling`, and the options of `reverse_diffusion.py`.

No TensorFlow, so that `--help` and slips of typing are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection

from diffusion.options import METHODS, OPERATIONS, Sampling
from support import console, files, grids, launcher
from support.checks import LARGEST
from support.places import find_place


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` of the scripts that only read a model."""
    help = "trained model, or drawings for the pretrained one (model.keras)"
    parser.add_argument("--model", default="model.keras", metavar="FILE.keras", help=help)


def add_sampling_options(parser: argparse.ArgumentParser, omit: Collection[str] = ()) -> None:
    """Adds the options of `Sampling` to a parser, but for those that the script has no use for."""
    for field in dataclasses.fields(Sampling):
        if field.name not in omit:
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, default=field.default, help=field.metadata["help"], **field.metadata["parser"])


def add_editing_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options with which `reverse_diffusion.py` begins with image files, see `diffusion/editing.py`."""
    group = parser.add_argument_group("beginning with image files, cropped and scaled as in training")
    one = group.add_mutually_exclusive_group().add_argument
    one("--restore", metavar="FILE", help="image to measure and restore; the grid shows it, what is measured, results")
    one("--vary", metavar="FILE", help="image to vary; the grid begins with it")
    one("--interpolate", nargs=2, metavar=("FILE", "FILE"), help="images to connect by a way of others")
    add = group.add_argument
    what = "what --restore undoes; mask: missing pixels; downscale: low resolution; grey: no colours; blur"
    add("--operation", choices=OPERATIONS, help=what)
    mask = "of mask, an image of the same size, white where it is known, else black (where it is not transparent)"
    add("--mask", metavar="FILE", help=mask)
    factor = (
        "of downscale, how many pixels become one in each direction (2, 4, 8); of blur, its deviation in pixels (1)"
    )
    add("--factor", type=console.number(0.1, LARGEST), metavar="F", help=factor)
    deviation = "standard deviation of the noise in the image, where black is -1 and white 1 (0: rounding alone)"
    add("--deviation", type=console.number(0, LARGEST), metavar="S", help=deviation)
    add("--method", choices=METHODS, help="how to restore (mmps)")
    strength = "above 0 to 1, of --vary: how much may change; of --interpolate: mixes noisy images (noise, by DDIM)"
    add("--strength", type=console.number(0, 1), metavar="S", help=strength)


def check_editing(options: argparse.Namespace) -> str:
    """The word for what is done with image files, for the name of the grid, or `''`.

    Raises:
        ValueError: for options that have no effect together, or that are missing.
    """
    edits = {"restore": "restored", "vary": "varied", "interpolate": "interpolated"}
    edit = next((name for name in edits if getattr(options, name)), None)
    if edit and (options.devices != 1 or find_place().count > 1):
        raise ValueError(f"--{edit} uses one device, several share samples only; omit --devices, or start one task")
    restoring = dict.fromkeys(("operation", "mask", "factor", "deviation", "method"), ("restore",))
    for name, owners in {**restoring, "strength": ("vary", "interpolate")}.items():
        if getattr(options, name) is not None and edit not in owners:
            raise ValueError(f"--{name} applies only to {' and '.join('--' + owner for owner in owners)}; omit it")
    if edit == "restore" and options.operation is None:
        raise ValueError(f"--restore needs an --operation: {', '.join(OPERATIONS)}")
    if edit == "vary" and options.strength is None:
        raise ValueError("--vary needs a --strength above 0, at most 1")
    if options.mask and options.operation != "mask":
        raise ValueError("--mask applies only to --operation mask; omit it")
    if options.operation == "downscale" and options.factor is None:
        raise ValueError("--operation downscale needs a --factor, such as 4")
    return edits.get(edit, "")


def parse_sampling_options(description: str | None, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line of `reverse_diffusion.py`; the result has `out`, `n_sample` and `photos`.

    Raises:
        ValueError: for what argparse does not know to refuse.
    """
    parser = console.Parser(description=description)
    add = parser.add_argument
    count = "number of images, of --interpolate with both ends (16; 8 with image files)"
    add("--n-sample", type=console.integer(1), metavar="N", help=count)
    out = "image file for a grid of all images (samples.png, or NAME-samples.png for a model NAME.keras)"
    add("--out", metavar="FILE", help=out)
    show = "channels that the grid shows, counted from 1: one, or three separated by commas (those of training)"
    add("--show", metavar="N,N,N", type=console.integers(1), help=show)
    npy = "array file for the images without enlargement, int16 from 0 to 255 (none)"
    add("--npy", metavar="FILE.npy", help=npy)
    raw = "write --npy as float32 in the range of values of the training images, not rounded (no)"
    add("--raw", action="store_true", help=raw)
    seed = "integer from 0; the same seed gives the same images (another one every time)"
    add("--seed", type=console.integer(0), metavar="N", help=seed)
    add_model_option(parser)
    launcher.add_devices_option(parser, "the images")
    add_sampling_options(parser)
    add_editing_options(parser)
    options = parser.parse_args(arguments)
    edit = check_editing(options)
    options.photos = [path for path in (options.restore, options.vary, *(options.interpolate or ())) if path]
    options.n_sample = options.n_sample or (8 if edit else 16)
    options.out = options.out or os.path.basename(files.grid_name(options.model, edit))
    grids.check_image_name("--out", options.out)
    if options.npy and not options.npy.endswith(".npy"):
        parser.error(f"--npy must end in .npy, got {options.npy}")
    if options.raw and (edit or not options.npy):
        parser.error(
            "--raw writes the array of --npy" + ("; omit it with image files" if edit else "; add --npy FILE.npy")
        )
    return options
