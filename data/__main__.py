"""Prepares images in a file: `python -m data cats`, the cats of the slides; `python -m data drawings`, cartoon cats."""

import argparse
import os
from collections.abc import Sequence

import numpy as np

from data import CATS, cats, drawings, image_files
from support import console, files


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line; `out` is always set in the result."""
    parser = console.Parser(prog="python -m data", description="Prepares data sets for diffusion_model.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=console.Parser)
    about = "the photographs of the slides: Microsoft's cats and dogs (800 MB to download)"
    add = commands.add_parser("cats", help=about, description=f"Prepares {about}.").add_argument
    add("--archive", metavar="FILE", help="zip archive of Microsoft or Kaggle that is already downloaded (none)")
    add(
        "--animals",
        choices=("cats", "dogs", "both"),
        default="cats",
        help="animals to include; labels are 0 for cats and 1 for dogs (cats)",
    )
    add("--image-size", type=console.integer(1), default=64, metavar="PIXELS", help="height and width in pixels (64)")
    add("--out", metavar="FILE.npz", help="output file (data/cats64.npz, named after --animals and --image-size)")
    add("--url", default=cats.URL, help="address to download the archive from (Microsoft's)")
    about = "any number of cartoon cats, with the colours of their fur as classes"
    add = commands.add_parser("drawings", help=about, description=f"Draws {about}.").add_argument
    add("--count", type=console.integer(1), default=16384, metavar="N", help="number of drawings (16384)")
    add("--image-size", type=console.integer(1), default=32, metavar="PIXELS", help="height and width in pixels (32)")
    add("--out", default="drawings.npz", metavar="FILE.npz", help="output file (drawings.npz)")
    options = parser.parse_args(arguments)
    if options.command == "cats":
        if options.archive and not os.path.isfile(options.archive):
            parser.error(f"--archive {image_files.escape_name(options.archive)}: there is no such file")
        name = "cats_and_dogs" if options.animals == "both" else options.animals
        options.out = options.out or os.path.join(os.path.dirname(CATS), f"{name}{options.image_size}.npz")
    if not options.out.endswith(".npz"):
        parser.error(f"--out must end in .npz, got {options.out}")
    return options


def main() -> None:
    """Prepares the data set and prints how many images it has."""
    options = parse_options()
    skipped = []
    with console.one_line_errors(f"python -m data {options.command}"):
        archive = getattr(options, "archive", None)  # drawings have none
        files.check_outputs([("--out", options.out)], [archive])  # fail before the work, not after it
        if options.command == "drawings":
            count = options.count
            images, labels = drawings.draw_cats(options.image_size, count), drawings.choose_furs(count)
            with files.replacing(options.out) as draft:
                np.savez_compressed(draft, images=images, labels=labels, class_names=list(drawings.FURS))
        else:
            archive = archive or cats.download(options.url)
            count, skipped = cats.prepare(archive, options.out, options.animals, options.image_size)
    if skipped:
        console.say(image_files.summarise_skipped(skipped))
    size = f"{options.image_size}×{options.image_size}"
    console.say(f"{count:,} images of {size} pixels in {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
