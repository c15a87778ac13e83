"""`python -m data cats`: brings the cats of the slides and writes `data/cats64.npz`."""

import argparse
import os
import sys

from data import CATS, cats, pictures


def main():
    parser = argparse.ArgumentParser(prog="python -m data", description="Prepares data sets for diffusion_model.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("cats", help="Microsoft's cats and dogs, as on the slides (800 MB to download)")
    options.add_argument(
        "--archive", metavar="FILE", help="the archive, if it was fetched before (or Kaggle's train.zip)"
    )
    options.add_argument("--animals", choices=["cats", "dogs", "both"], default="cats", help="default: cats")
    options.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="default: 64")
    options.add_argument(
        "--out", metavar="FILE.npz", help="default: data/cats64.npz, named after the animals and the size"
    )
    options.add_argument("--url", default=cats.URL, help="where the archive is, if it has moved")
    options = parser.parse_args()
    if options.image_size < 1:
        parser.error(f"--image-size must be a positive number of pixels, got {options.image_size}")
    if options.archive and not os.path.isfile(options.archive):
        parser.error(f"--archive: there is no file {pictures.printable(options.archive)}")
    name = "cats_and_dogs" if options.animals == "both" else options.animals
    out = options.out or os.path.join(os.path.dirname(CATS), f"{name}{options.image_size}.npz")
    if not out.endswith(".npz"):
        parser.error(f"--out must end in .npz, got {out}")

    try:
        archive = options.archive or cats.download(options.url)
        count, left_out = cats.prepare(archive, out, options.animals, options.image_size)
    except (ValueError, OSError) as error:
        sys.exit(f"python -m data cats: {error}")
    if left_out:
        print(pictures.summary(left_out))
    print(f"{count:,} pictures of {options.image_size}×{options.image_size} pixels in {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
