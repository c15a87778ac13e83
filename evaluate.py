"""Measures how good a model is: likelihood, loss by t, distance to real images, memorisation.

    python evaluate.py --data new-drawings                         everything, for a model of the drawings
    python evaluate.py --data held-out --only bits,loss            only what needs no samples: a minute
    python evaluate.py --data FOLDER --figure copies.png           samples and the images nearest to them

Prints a table, and writes it as JSON beside the model. `--data` are images that the model was not trained on;
`held-out` means the images that training held out (`diffusion_model.py --validation`), or else the test part of the
named set that it used, such as mnist-test.
"""

import contextlib
import json
import os
import sys

if __name__ == "__main__":  # `python -P` does not look for imports beside the script
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from support.packages import check_packages

    check_packages()
from diffusion.command_line import add_model_option, add_sampling_options
from diffusion.options import Sampling
from support import console, files, grids, launcher
from support.console import integer, say
from support.worker import at_work

PARTS = ("bits", "loss", "overfitting", "fid", "kid", "frechet", "precision", "recall", "copies")


def parse_options(arguments=None):
    parser = console.Parser(description=__doc__)
    add = parser.add_argument
    add_model_option(parser)
    add(
        "--data",
        metavar="SOURCE",
        help="images that the model was not trained on: held-out (those that training held out, else the test part of "
        "a named set), a folder, a .npy or .npz file, or a name such as new-drawings or mnist-test (required, unless "
        "--only fid and --statistics are given)",
    )
    add(
        "--train",
        metavar="SOURCE",
        help="training images of the model, for overfitting, copies and --figure (where they were during training)",
    )
    add(
        "--samples",
        metavar="FILE.npy",
        help="samples of the model, as from reverse_diffusion.py --npy (generated now, and cached beside the model)",
    )
    add("--n-sample", type=integer(20), default=500, metavar="N", help="number of samples, at least 20 (500)")
    add(
        "--only",
        type=console.some_of(PARTS),
        metavar="PARTS",
        help=f"what to measure, separated by commas: {', '.join(PARTS)} (all, but fid only with --features fid, and "
        "frechet only with others)",
    )
    add(
        "--features",
        default="inception",
        metavar="NAME",
        help="extractor of the features that images are compared in: inception (downloads its weights), fid (the "
        "network of published FIDs), vgg16, efficientnet (see requirements-optional.txt for these), pixels, a Keras "
        "model FILE.keras or a function module:function (inception)",
    )
    add(
        "--statistics",
        metavar="FILE.npz",
        help="mean and covariance of the features of real images, arrays mu and sigma, to measure the FID to, instead "
        "of to --data (none)",
    )
    add(
        "--save-statistics",
        metavar="FILE.npz",
        help="a new file for those of --data, to be read with --statistics (none)",
    )
    add_sampling_options(parser, omit=("label", "classifier"))  # samples have no class
    add(
        "--draws",
        type=integer(0),
        default=20,
        metavar="N",
        help="number of t at which each image is measured for bits, loss and overfitting; 0 for all t (20)",
    )
    add(
        "--count",
        type=integer(20),
        default=1000,
        metavar="N",
        help="largest number of held-out images, at least 20; of more a random subset is used (1000)",
    )
    add(
        "--figure",
        metavar="FILE.png",
        help="image file for 8 samples, each above its nearest training and held-out image (none)",
    )
    launcher.add_devices_option(parser, "the images that are generated and measured")
    add("--out", metavar="FILE.json", help="file for the results (NAME-evaluation.json beside the model NAME.keras)")
    options = parser.parse_args(arguments)
    # The Fréchet distance of the features `fid` is the FID.
    options.only = options.only or [
        part for part in PARTS if part != ("frechet" if options.features == "fid" else "fid")
    ]
    if problem := find_contradiction(options):
        parser.error(problem)
    options.out = options.out or os.path.splitext(options.model)[0] + "-evaluation.json"
    if options.figure:
        grids.check_image_name("--figure", options.figure)
    return options


def find_contradiction(options):
    """A sentence on options that do not go together, or None."""
    fid, statistics = "fid" in options.only, options.statistics or options.save_statistics
    if fid and options.features != "fid":
        return "--only fid needs --features fid"
    if statistics and not fid:
        return "--statistics and --save-statistics are for the FID; add --features fid, and fid to --only"
    if options.statistics and options.save_statistics:
        return "--save-statistics writes the statistics of --data, and --statistics replaces them; omit one of both"
    if options.save_statistics and not options.save_statistics.endswith(".npz"):
        return f"--save-statistics must end in .npz, got {options.save_statistics}"
    if options.save_statistics and os.path.exists(options.save_statistics):
        return f"{options.save_statistics} exists; read it with --statistics, or choose another --save-statistics"
    if not options.data and not (options.statistics and options.only == ["fid"] and not options.figure):
        return "the following arguments are required: --data"
    return None


def check_outputs(options, metadata):
    """Checks, before any work, that the results can be written, and replace neither an input nor each other.

    Raises:
        ValueError, OSError: if not.
    """
    outputs = [("--out", options.out), ("--figure", options.figure), ("--save-statistics", options.save_statistics)]
    files.check_outputs(outputs, input_paths(options, metadata))


def input_paths(options, metadata):
    """All that an evaluation reads: files, and names of built-in sources."""
    from diffusion import model_file

    models = [model_file.locate(path) for path in (options.model, options.weaker) if path]
    trained_on = [(metadata.get(images) or {}).get("source") for images in ("data", "validation")]
    return [*models, options.data, options.train, options.samples, options.features, options.statistics, *trained_on]


def check_caches(caches, options, metadata):
    """Checks that cached files replace neither an input nor a result.

    Raises:
        ValueError: if one does.
    """
    taken = [*input_paths(options, metadata), options.out, options.figure, options.save_statistics]
    files.check_distinct([("the cache", path) for path in caches], taken)


def main():
    with at_work("evaluate.py") as worker:
        options = parse_options()
        asked = Sampling.among(vars(options))
        launcher.launch_if_several(worker, "evaluate.py", options.devices)
        say("evaluate.py: starting TensorFlow …")
        from support import device

        device.start_tensorflow(parts=device.MOST_PARTS)
        import numpy as np

        from diffusion import model_file
        from diffusion.sampling import make_plan
        from evaluation.inputs import SAMPLE_PARTS, Sources, load_inputs
        from evaluation.likelihood import likelihood_rows, measurement_paths
        from evaluation.samples import features_path, generate_samples, sample_rows, samples_path
        from evaluation.statistics import load_statistics

        trained = model_file.open_with_schedule(options.model)
        metadata = trained.metadata
        if {"data", "settings", "progress"} - metadata.keys():
            raise ValueError(
                f"{options.model} has no training metadata; name a model that diffusion_model.py has saved"
            )
        if worker.first:
            check_outputs(options, metadata)
        sampling = trained.choose(asked)
        make_plan(trained.sched, sampling)  # reports invalid options before the long work
        weaker = options.weaker and model_file.open_with_schedule(options.weaker)
        if weaker:
            model_file.check_guide(weaker, options.weaker, trained, classifier=False)
        if sentence := model_file.warn_of_no_class(trained):
            console.warn(sentence)
        held_out, training, samples, extract = load_inputs(
            trained,
            Sources(options.model, options.data, options.train, options.samples),
            parts=options.only,
            figure=bool(options.figure),
            features=options.features if worker.first else "pixels",  # only the first needs them
            count=options.count,
            n_sample=options.n_sample,
        )

        as_bytes = trained.scale.to_bytes  # but for the likelihood, which is of all that the images hold
        seen, seen_held_out = (images if images is None else as_bytes(images) for images in (training, held_out))
        statistics = None
        if options.statistics and worker.first:
            dimensions = extract(np.zeros((1, *trained.image_shape[:2], 3), np.uint8)).shape[1]
            statistics = load_statistics(options.statistics, dimensions)

        cache = cache_prefix(options.model, options.out, model_file.fingerprint(trained))
        if cache:
            caches = measurement_paths(cache)
            caches += [samples_path(cache, sampling, weaker)] if extract and samples is None else []
            caches += [] if training is None else [features_path(cache, seen, options.features)]
            check_caches(caches, options, metadata)
        rows = {}
        if set(options.only) - set(SAMPLE_PARTS):
            how = {"parts": options.only, "draws": options.draws, "cache": cache, "worker": worker}
            rows |= likelihood_rows(trained, held_out, training, **how)
        if extract and samples is None:
            how = {"n_sample": options.n_sample, "sampling": sampling, "cache": cache, "worker": worker}
            samples = generate_samples(trained, weaker, **how)
        if not worker.first:
            return
        if extract:
            rows |= sample_rows(
                samples,
                seen,
                seen_held_out,
                extract,
                features=options.features,
                parts=options.only,
                figure=options.figure,
                cache=cache,
                shown=trained.shown(),
                statistics=statistics,
                save_to=options.save_statistics,
            )
        inputs = {
            "model": options.model,
            "data": options.data,
            "step": metadata["progress"]["step"],
            "features": options.features,
            "statistics": options.statistics,
            "samples": options.samples,
            "sampler": None if options.samples else sampling.arguments(),  # unknown for a file
        }
        with files.replacing(options.out) as draft, open(draft, "w", encoding="utf-8") as file:
            json.dump(inputs | rows, file, indent=1)
        show(rows)
        say(f"results written to {options.out}")


def cache_prefix(model, out, fingerprint):
    """How the names of cached results begin, `FOLDER/model-step4736-1f60a9c2`, or None if none can be written.

    What takes long is cached for a later run: beside the model, or beside the results if its folder is read-only.
    """
    name = f"{os.path.splitext(os.path.basename(model))[0]}-{fingerprint}"
    for neighbour in model, out:
        prefix = os.path.join(os.path.dirname(neighbour), name)
        with contextlib.suppress(OSError):
            files.check_writable(prefix)
            return prefix
    say(f"nothing is cached for later runs, as no file can be written beside {model} or {out}")
    return None


def show(rows):
    """Prints the table: name, value ± standard error, remark."""
    width = max(map(len, rows))
    for name, row in rows.items():
        error = f" ± {row['error']:.4f}" if row.get("error") is not None else ""
        say(f"{name:{width}}  {row['value']:8.4f}{error:11}  {row.get('remark', '')}")


if __name__ == "__main__":
    main()
