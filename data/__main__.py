"""`python -m data cats`: brings the cats of the slides and writes `data/cats64.npz`."""

import os

from data import CATS, cats, image_files
from support import console, files


def parse_options(arguments=None):
    parser = console.Parser(prog="python -m data", description="Prepares data sets for diffusion_model.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=console.Parser)
    cats_parser = commands.add_parser("cats", help="Microsoft's cats and dogs, as on the slides (800 MB to download)")
    add = cats_parser.add_argument
    add("--archive", metavar="FILE", help="the archive, if it was fetched before (or Kaggle's train.zip)")
    add(
        "--animals",
        choices=("cats", "dogs", "both"),
        default="cats",
        help="both keeps labels, 0 cats and 1 dogs (cats)",
    )
    add("--image-size", type=console.integer(1), default=64, metavar="PIXELS", help="square pictures (64)")
    add("--out", metavar="FILE.npz", help="what to write (data/cats64.npz, or after the animals and the size)")
    add("--url", default=cats.URL, help="where the archive is, if it has moved")
    options = parser.parse_args(arguments)
    if options.archive and not os.path.isfile(options.archive):
        parser.error(f"--archive: there is no file {image_files.printable(options.archive)}")
    name = "cats_and_dogs" if options.animals == "both" else options.animals
    options.out = options.out or os.path.join(os.path.dirname(CATS), f"{name}{options.image_size}.npz")
    if not options.out.endswith(".npz"):
        parser.error(f"--out must end in .npz, got {options.out}")
    return options


def main():
    options = parse_options()
    with console.one_line_errors("python -m data cats"):
        files.check_writable(options.out)  # better known now than after the download
        archive = options.archive or cats.download(options.url)
        count, left_out = cats.prepare(archive, options.out, options.animals, options.image_size)
    if left_out:
        console.say(image_files.summary(left_out))
    size = f"{options.image_size}×{options.image_size}"
    console.say(f"{count:,} pictures of {size} pixels in {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
