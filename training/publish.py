"""Writes a copy of a trained model for sampling, without optimizer and raw weights: a third of the size.

    python -m training.publish model.keras models/drawings.keras

The copy samples and is evaluated like the original, and `--init` starts a new model from it. Training cannot resume
from it.
"""

import os

from support import console, device, files
from support.console import say


def main() -> None:
    """Reads the command line and writes the file."""
    with console.one_line_errors("training.publish"):
        parser = console.Parser(prog="python -m training.publish", description=__doc__)
        parser.add_argument("model", metavar="FILE.keras", help="trained model, or drawings for the pretrained one")
        parser.add_argument("out", metavar="NEW.keras", help="file for the copy")
        options = parser.parse_args()
        if not options.out.endswith(".keras"):
            parser.error(f"the file to write must end in .keras, got {options.out}")
        device.start_tensorflow(parts=1)
        from diffusion import model_file

        files.check_outputs([("NEW.keras", options.out)], [model_file.locate(options.model)])
        trained = model_file.open_model(options.model, classifier=None)
        model, metadata = trained.network, trained.metadata
        for images in filter(None, (metadata.get("data"), metadata.get("validation"))):
            images["source"] = images["source"] and os.path.basename(images["source"])  # no path of this machine
        with files.replacing(options.out) as draft:
            model.save(draft)
        say(f"{options.out}: {model.count_params():,} parameters, {os.path.getsize(options.out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
