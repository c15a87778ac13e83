"""How good a model is: likelihood, loss by t, distance to real images, memorisation.

    python evaluate.py --data new-drawings                         all of it, for a model of the drawings
    python evaluate.py --data held-out --only bits,loss            what needs no samples, in a minute
    python evaluate.py --data FOLDER --figure copies.png           samples and the images nearest to them

Writes a table as JSON beside the model, and prints it. `--data` are images that the model was not trained on;
`held-out` are those that training held out (`diffusion_model.py --validation`).
"""

import contextlib
import json
import os
import sys

if __name__ == "__main__":  # which `python -P` leaves out
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from diffusion.options import add_sampler_options, sampler_options
from support import console, files
from support.console import integer, say

PARTS = ("bits", "loss", "overfitting", "kid", "frechet", "precision", "recall", "copies")


def parse_options(arguments=None):
    parser = console.Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="model.keras", metavar="FILE.keras", help="the trained network (model.keras)")
    add(
        "--data",
        required=True,
        metavar="SOURCE",
        help="held-out images: held-out (those that training held out), new-drawings, a folder, .npy or .npz",
    )
    add(
        "--train",
        metavar="SOURCE",
        help="the training images, for overfitting and copies (those that the metadata name)",
    )
    add("--samples", metavar="FILE.npy", help="samples of the model (else they are generated and cached)")
    add("--n-sample", type=integer(20), default=500, metavar="N", help="how many samples to generate (500)")
    add("--only", type=console.some_of(PARTS), default=PARTS, metavar="PARTS", help=f"some of {','.join(PARTS)} (all)")
    add(
        "--features",
        default="inception",
        metavar="NAME",
        help="what distances are measured on: inception (downloads "
        "its weights), efficientnet (see requirements-optional.txt), pixels, FILE.keras or module:function (inception)",
    )
    add_sampler_options(parser)
    add(
        "--draws",
        type=integer(0),
        default=20,
        metavar="N",
        help="steps t for each image in bits and loss; 0 for every t (20)",
    )
    add(
        "--count",
        type=integer(20),
        default=1000,
        metavar="N",
        help="of held-out images, at most this many at random (1000)",
    )
    add("--figure", metavar="FILE.png", help="samples, and below each its nearest training and held-out image")
    add("--out", metavar="FILE.json", help="the numbers (beside the model: model-evaluation.json)")
    options = parser.parse_args(arguments)
    if bool(options.weaker) != (options.guidance != 1):
        parser.error("--weaker and a --guidance other than 1 go together here, as samples are of no class")
    options.out = options.out or os.path.splitext(options.model)[0] + "-evaluation.json"
    if options.figure:
        files.check_image_name("--figure", options.figure)
    return options


def check_outputs(options, book):
    """Checks, before any work, that the results can be written, and replace neither an input nor each other.

    Raises:
        ValueError, OSError: if not.
    """
    files.check_outputs([("--out", options.out), ("--figure", options.figure)], inputs_of(options, book))


def inputs_of(options, book):
    """The files that an evaluation reads, and names of built-in sources, which are no files."""
    from diffusion import model_file

    models = [model_file.locate(path) for path in (options.model, options.weaker) if path]
    trained_on = [(book.get(images) or {}).get("source") for images in ("data", "validation")]
    return [*models, options.data, options.train, options.samples, options.features, *trained_on]


def check_caches(cache, options, book, weaker, training, generated):
    """Checks that what is cached replaces neither an input nor a result; `generated` says whether samples are.

    Raises:
        ValueError: if it does.
    """
    from evaluation.likelihood import CACHES
    from evaluation.samples import features_path, samples_path

    caches = [f"{cache}-{name}" for name in CACHES]
    caches += [samples_path(cache, options.how, weaker)] if generated else []
    caches += [] if training is None else [features_path(cache, training, options.features)]
    taken = [*inputs_of(options, book), options.out, options.figure]
    files.check_distinct([("the cache", path) for path in caches], taken)


def main():
    with console.one_line_errors("evaluate.py"):
        options = parse_options()
        say("evaluate.py: starting TensorFlow …")
        from support import device

        device.start_tensorflow(parts=device.MOST_PARTS)
        from diffusion import model_file
        from diffusion.sampling import make_plan
        from evaluation.inputs import OF_SAMPLES, load_inputs
        from evaluation.likelihood import likelihood_rows
        from evaluation.samples import generate_samples, sample_rows

        model, book = model_file.open_with_schedule(options.model)
        if {"data", "settings", "progress"} - book.keys():
            raise ValueError(
                f"{options.model} carries no training metadata; evaluate one that diffusion_model.py wrote"
            )
        check_outputs(options, book)
        options.how = sampler_options(options)
        options.how |= model_file.sampler_of(model, options.sampler, options.steps, options.variance)
        make_plan(model_file.diffusion_of(model)[0], **options.how)  # better known now
        weaker = options.weaker and model_file.open_with_schedule(options.weaker)[0]
        if weaker:
            model_file.check_guide(weaker, options.weaker, model, classifier=False)
        if sentence := model_file.warn_of_no_class(book):
            console.warn(sentence)
        held_out, training, samples, extract = load_inputs(model, book, options)

        cache = cache_prefix(options, model_file.fingerprint(model))
        if cache:
            check_caches(cache, options, book, weaker, training, extract and samples is None)
        rows = {}
        if set(options.only) - set(OF_SAMPLES):
            rows |= likelihood_rows(model, book, held_out, training, options, cache)
        if extract:
            samples = generate_samples(model, weaker, options, cache) if samples is None else samples
            rows |= sample_rows(samples, training, held_out, extract, options, cache)
        how = None if options.samples else options.how | {"weaker": options.weaker}  # of a file it is not known
        with files.replacing(options.out) as draft, open(draft, "w", encoding="utf-8") as file:
            json.dump({"model": options.model, "data": options.data, "step": book["progress"]["step"],
                       "features": options.features, "samples": options.samples, "sampler": how, **rows},
                      file, indent=1)  # fmt: skip
        show(rows)
        say(f"written to {options.out}")


def cache_prefix(options, fingerprint):
    """How the names of cached results begin, `FOLDER/model-step4736-1f60a9c2`, or None if none can be written.

    What takes long is cached beside the model for a later run, or beside the results if its folder is read-only.
    """
    name = f"{os.path.splitext(os.path.basename(options.model))[0]}-{fingerprint}"
    for beside in options.model, options.out:
        prefix = os.path.join(os.path.dirname(beside), name)
        with contextlib.suppress(OSError):
            files.check_writable(prefix)
            return prefix
    say(f"nothing is cached for a later run, as no file can be written beside {options.model} or {options.out}")
    return None


def show(rows):
    """Prints the table: name, value ± standard error, remark."""
    width = max(map(len, rows))
    for name, row in rows.items():
        error = f" ± {row['error']:.4f}" if row.get("error") is not None else ""
        say(f"{name:{width}}  {row['value']:8.4f}{error:11}  {row.get('remark', '')}")


if __name__ == "__main__":
    main()
