"""How good is a model: likelihood, loss by t, distance to real pictures, memorisation.

    python evaluate.py --data new-drawings                         all of it, for a model of the drawings
    python evaluate.py --data held-out --only bits,loss            what needs no samples, in a minute
    python evaluate.py --data FOLDER --figure copies.png           samples beside the pictures nearest to them

Writes a table as JSON beside the model, and prints it. `--data` are images that the model was not trained on;
`held-out` are those that training held out (`diffusion_model.py --validation`).
"""

import contextlib
import hashlib
import json
import os

import console
import data
import files
from console import say, whole

PARTS = ("bits", "loss", "overfitting", "kid", "frechet", "precision", "recall", "copies")
OF_SAMPLES = PARTS[3:]
FEWEST = 20  # images of each kind that distances between sets of them need
BY_HEART = 0.8  # such a share of the held-out loss, or less, have pictures that are learnt by heart
WAYS = [(variance, clip) for variance in ("beta", "posterior") for clip in (True, False)]  # to take a reverse step


def parse_options(arguments=None):
    parser = console.Parser(description=__doc__.split("\n")[0])
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
        help="the training pictures, for overfitting and copies (what the model says it was trained on)",
    )
    add("--samples", metavar="FILE.npy", help="pictures that the model has made (else they are made, and kept)")
    add("--n-sample", type=whole(20), default=500, metavar="N", help="how many to make (500)")
    add("--only", type=console.some_of(PARTS), default=PARTS, metavar="PARTS", help=f"some of {','.join(PARTS)} (all)")
    add(
        "--features",
        default="inception",
        metavar="NAME",
        help="what distances are measured on: inception (downloads "
        "its weights), efficientnet (see requirements-optional.txt), pixels, FILE.keras or module:function (inception)",
    )
    add(
        "--draws",
        type=whole(0),
        default=20,
        metavar="N",
        help="steps t for each picture in bits and loss; 0 for every t (20)",
    )
    add(
        "--count",
        type=whole(20),
        default=1000,
        metavar="N",
        help="of held-out images, at most this many at random (1000)",
    )
    add("--figure", metavar="FILE.png", help="samples, and under each its nearest training and held-out picture")
    add("--out", metavar="FILE.json", help="the numbers (beside the model: model-evaluation.json)")
    options = parser.parse_args(arguments)
    options.out = options.out or os.path.splitext(options.model)[0] + "-evaluation.json"
    if options.figure:
        files.check_image_name("--figure", options.figure)
    return options


def check_outputs(options, book):
    """Checks, before any work, that the results can be written, and replace neither an input nor each other.

    Raises:
        ValueError, OSError: if not.
    """
    inputs = options.model, options.data, options.train, options.samples, options.features, book["data"]["source"]
    taken = {os.path.realpath(path) for path in inputs if path}
    for option, path in ("--out", options.out), ("--figure", options.figure):
        if not path:
            continue
        if os.path.realpath(path) in taken:
            raise ValueError(f"{option} {path} would overwrite another file of this command; choose another name")
        taken.add(os.path.realpath(path))
        try:
            files.check_writable(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no folder for {option} {path}") from error
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error.strerror.lower()}); choose another {option}") from error


def main():
    with console.errors_in_a_sentence("evaluate.py"):
        options = parse_options()
        say("evaluate.py: starting TensorFlow …")
        import device

        device.start_tensorflow(parts=device.MOST_PARTS)
        import model_file

        model, book = model_file.open_with_schedule(options.model)
        if {"data", "settings", "progress"} - book.keys():
            raise ValueError(
                f"{options.model} carries no training metadata; evaluate one that diffusion_model.py wrote"
            )
        check_outputs(options, book)
        held_out, training, samples, extract = load_inputs(model, book, options)

        kept = cache_prefix(options, model_file.fingerprint(model))
        rows = {}
        if set(options.only) - set(OF_SAMPLES):
            rows |= likelihood(model, book, held_out, training, options, kept)
        if extract:
            samples = made(model, book, options, kept) if samples is None else samples
            rows |= of_samples(samples, training, held_out, extract, options)
        with files.replacing(options.out) as draft, open(draft, "w", encoding="utf-8") as file:
            json.dump({"model": options.model, "data": options.data, "step": book["progress"]["step"],
                       "features": options.features, **rows}, file, indent=1)  # fmt: skip
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


# --- images -----------------------------------------------------------------------------------------------------------


def load_inputs(model, book, options):
    """Reads what the parts asked for need, so that what is missing is said before the long work.

    Returns:
        Held-out images, training images, given samples, and the function for features; the last three may be None.
    """
    from features import extractor
    from metrics import random_subset

    shape, only = model.inputs[0].shape[1:], set(options.only)

    def load(source):
        return data.load_images(source, shape[0], shape[2])[0]

    held_out, training = load_images(load, book, options)
    held_out = random_subset(held_out, options.count)
    say(f"{options.model}: {book['progress']['step']:,} steps on {book['data']['source']}; {options.data}: "
        f"{len(held_out):,} images")  # fmt: skip
    if training is not None and (known := count_known(held_out, training)):
        say(f"{known:,} of the {len(held_out):,} held-out images are among the training images; "
            "results are better than for new ones")  # fmt: skip

    with_samples = set(OF_SAMPLES) & only or options.figure
    samples = random_subset(load(options.samples), options.n_sample) if with_samples and options.samples else None
    of_sets = ", ".join(name for name in ("kid", "frechet", "precision", "recall") if name in only)
    for option, images in ("--data", held_out), ("--samples", samples):
        if of_sets and images is not None and len(images) < FEWEST:
            raise ValueError(f"{option} has {len(images)} images, and {of_sets} need {FEWEST}; see --only for the rest")
    return held_out, training, samples, extractor(options.features) if with_samples else None


def load_images(load, book, options):
    """Held-out images, and the training images or None where they are neither needed nor to be had."""
    needed = {"overfitting", "copies"} & set(options.only) or options.figure or options.train
    held_out, training = load_held_out(load, book, options)
    if training is None:
        try:
            training, _ = load_training(load, book, options)
        except (ValueError, OSError):
            if needed:
                raise
            # Whether `--data` is the whole source of the training images can be told without them.
            part, _, same = divide(held_out, book)
            training = part if same else None
    return held_out, training


def held_out_by_training(book):
    """What training held out: a fraction of its images, or another source, and its digest; None for what is not known.

    Files of earlier versions hold only the text of the option `--validation`.
    """
    noted = book.get("validation")
    if noted:
        return noted.get("fraction"), noted.get("source"), noted.get("digest")
    text = book["settings"].get("validation")
    try:
        return float(text), None, None
    except (TypeError, ValueError):
        return None, text, None


def divide(images, book):
    """Divides all images of a source as training did.

    Returns:
        Images to train on, held-out ones or None, and whether the first are those that the model was trained on.
    """
    from validation import held_back

    (fraction, _, _), trained_on = held_out_by_training(book), book["data"]["digest"]
    if fraction is None or data.digest(images) == trained_on:  # the latter: they are without the held-out ones
        training, held_out = images, None
    else:
        training, held_out = held_back(images, fraction, book["settings"]["seed"])
    return training, held_out, data.digest(training) == trained_on


def load_training(load, book, options):
    """The images that the model was trained on, and those of the same source that were held out or None.

    Raises:
        ValueError, FileNotFoundError: if they are not where they were, or have changed, and `--train` names no others.
    """
    source, advice = book["data"]["source"], "name the training images with --train SOURCE"
    try:
        training, held_out, same = divide(load(options.train or source), book)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {advice}") from error
    if not same and not options.train:
        raise ValueError(f"the training images in {source} have changed or moved since training; {advice}")
    if not same and options.data == "held-out" and held_out is not None:
        raise ValueError(
            f"the images in {options.train} are not those that the model was trained on, so which of them were held "
            "out is not known; name held-out images with --data SOURCE"
        )
    if not same:
        say(f"{options.train}: not the images that the model was trained on")
    return training, held_out


def load_held_out(load, book, options):
    """Held-out images, and, if they come from the same source, those trained on, else None.

    Raises:
        ValueError, FileNotFoundError: if training held out none, or they are not where they were, or have changed.
    """
    if options.data != "held-out":
        return load(options.data), None
    fraction, source, expected = held_out_by_training(book)
    if fraction is None and source is None:
        raise ValueError(
            f"{options.model} was trained without --validation, so no images were held out; name others with --data "
            "SOURCE (./held-out for a folder of that name)"
        )
    advice = "name the held-out images with --data SOURCE"
    if source is None:
        training, held_out = load_training(load, book, options)
    else:
        try:
            training, held_out = None, load(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {advice}") from error
    if held_out is None or expected not in (None, data.digest(held_out)):
        where = source or options.train or book["data"]["source"]
        raise ValueError(f"the images that training held out are not those in {where} now; {advice}")
    return held_out, training


def count_known(images, training):
    """How many images are, pixel for pixel, among the training images."""
    known = {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in training}
    return sum(hashlib.blake2b(image.tobytes(), digest_size=16).digest() in known for image in images)


def show(rows):
    """The table: name, value ± standard error, remark."""
    width = max(map(len, rows))
    for name, row in rows.items():
        error = f" ± {row['error']:.4f}" if row.get("error") is not None else ""
        say(f"{name:{width}}  {row['value']:8.4f}{error:11}  {row.get('remark', '')}")


# --- what the network itself knows ------------------------------------------------------------------------------------


def likelihood(model, book, held_out, training, options, kept):
    """Bits a dimension of the bound, for all four ways to take a reverse step, the loss in tenths of t, overfitting."""
    import device
    import parts
    from ddpm import ddpm_schedule
    from metrics import random_subset

    sched, batch_size = ddpm_schedule(**book["diffusion"]), parts.even_batches(model, len(held_out))[1]
    predict_eps = parts.predictor(model, device.parts_for(batch_size))

    def seen(images, name):
        return observed(predict_eps, sched, images, options.draws, batch_size, kept and f"{kept}-{name}")

    of_held_out = seen(held_out, "bits.npz")
    rows = of_bound(of_held_out) if "bits" in options.only else {}
    rows |= of_loss(of_held_out, sched, held_out) if "loss" in options.only else {}
    if "overfitting" in options.only:
        of_training = seen(random_subset(training, len(held_out)), "training-bits.npz")
        rows |= of_overfitting(of_training, of_held_out, sched)
    return rows


def of_bound(seen):
    """Rows: bits a dimension for each of `WAYS`, and L_T."""
    rows = {}
    for (variance, clip), of_pictures in zip(WAYS, seen["bits"].T + seen["prior"], strict=True):
        name = f"bits/dim, {'β' if variance == 'beta' else 'β̃'}, {'clipped' if clip else 'not clipped'}"
        remark = "as pictures are made by default" if (variance, clip) == ("beta", True) else ""
        rows[name] = measured(of_pictures, remark)
    rows["… of it L_T"] = measured(seen["prior"], "x_T beside pure noise")
    return rows


def of_loss(seen, sched, images):
    """Rows: squared error of ε̂ in tenths of t, beside that of the best predictor that knows the pixels' variance.

    Both are means over the t that were measured, as the error falls steeply within the first tenth.
    """
    import numpy as np

    rows, v = {}, np.var(data.scaled(images), axis=0).ravel()
    for (low, high), here in tenths(seen, sched).items():
        t, counts = np.unique(seen["t"][here], return_counts=True)
        a = sched["alphabar_t"][t, None]
        best = np.average(np.mean(a * v / (a * v + 1 - a), axis=1), weights=counts)
        remark = f"{best:.4f} if only pixels were known"
        rows[f"loss, t = {low} … {high}"] = measured(seen["error"], remark, here)
    return rows


def of_overfitting(of_training, of_held_out, sched):
    """Row: the loss on training images divided by that on held-out ones, both as means over the tenths of t.

    Args:
        of_training, of_held_out: what `observed` returned.
    """
    import numpy as np

    here = [tenths(seen, sched) for seen in (of_training, of_held_out)]
    both = here[0].keys() & here[1].keys()
    means, errors = [], []
    for seen, of_tenths in zip((of_training, of_held_out), here, strict=True):
        parts = [mean_and_influences(seen["error"], of_tenths[tenth]) for tenth in both]
        mean, influences = (np.mean(part, axis=0) for part in zip(*parts, strict=True))
        means.append(mean)
        errors.append((standard_error(influences) or 0) / mean)
    share = float(means[0] / means[1])
    remark = "the training pictures are learnt by heart" if share < BY_HEART else "1 if nothing is learnt by heart"
    return {"loss, training / held-out": {"value": share, "error": share * float(np.hypot(*errors)), "remark": remark}}


def tenths(seen, sched):
    """Which entries of `seen["t"]` lie in each tenth of 1 … T, by its first and last t, if there are any."""
    T, found = len(sched["beta_t"]) - 1, {}
    for tenth in range(10):
        low, high = 1 + tenth * T // 10, (tenth + 1) * T // 10
        here = (seen["t"] >= low) & (seen["t"] <= high)
        if here.any():
            found[low, high] = here
    return found


def observed(predict_eps, sched, images, draws, batch_size, kept=None):
    """What the network makes of held-out pictures, at some steps t each.

    Every picture is seen at `draws` steps, one from each of as many equal stretches of 2 … T, and at t = 1: an
    unbiased estimate of the sum over all t, whose standard error follows from the spread between pictures.

    Args:
        predict_eps: see `ddpm.reverse_step`.
        images: uint8 (N, height, width, channels).
        draws: how many steps t, 0 for all.
        kept: a file into which everything is written after every batch, and with which a later call goes on.

    Returns:
        A dict of arrays: `bits` (N, 4), L_{T-1} + … + L_0 for each of `WAYS`; `prior` (N,), L_T; `t` and `error`
        (N, draws), the squared error of ε̂ for each image and step.
    """
    import numpy as np
    import tensorflow as tf

    from ddpm import bound_decoder, bound_prior, bound_term, q_sample

    @tf.function(autograph=False)
    def terms(x_0, t, seed, last):
        """Squared error of ε̂, and the terms of the bound at t, each way, of every picture; `last`: all t are 1."""
        eps = tf.random.stateless_normal(tf.shape(x_0), seed)
        x_t = q_sample(x_0, t, eps, sched)
        guess = predict_eps([x_t, tf.cast(t, tf.float32)[:, None] / T])
        if last:
            bits = [bound_decoder(x_0, x_t, guess, sched, *way) for way in WAYS]
        else:
            bits = [bound_term(x_0, x_t, t, guess, sched, *way) for way in WAYS]
        return tf.reduce_mean(tf.square(guess - eps), axis=(1, 2, 3)), tf.stack(bits, axis=1)

    T = len(sched["beta_t"]) - 1
    draws = T - 1 if draws == 0 else min(draws, T - 1)
    edges = 2 + np.arange(draws + 1) * (T - 1) / draws  # of the stretches of 2 … T
    columns = draws + (draws == T - 1)  # all images at t = 1 would be too many in the mean over only some t
    seen = {"bits": np.empty((0, len(WAYS))), "prior": np.empty(0)}
    seen |= {"t": np.empty((0, columns), int), "error": np.empty((0, columns))}
    asked = f"{data.digest(images)} {draws}, a row for each image"  # in files of earlier versions there was none
    if kept and os.path.exists(kept):
        with np.load(kept) as file:
            if file["asked"] == asked:
                seen = {name: file[name] for name in seen}
    start = len(seen["prior"])
    bar = console.Bar((len(images) - start) * (draws + 1), "picture")
    for first in range(start, len(images), batch_size):
        real = min(batch_size, len(images) - first)
        index = np.arange(first, first + batch_size) % len(images)  # the last batch is filled up
        x_0 = tf.constant(data.scaled(images[index]))
        rng, bits = np.random.default_rng(first), 0
        new = {"prior": bound_prior(x_0, sched)[:real], "t": [], "error": []}
        for k in range(draws + 1):
            last = k == draws
            t = np.ones(batch_size) if last else np.floor(rng.uniform(edges[k], edges[k + 1], batch_size))
            error, of_t = terms(x_0, tf.constant(t, tf.int32), tf.constant([first, k]), last)
            bits = bits + of_t.numpy()[:real] * (1 if last else (T - 1) / draws)
            if k < columns:
                new["t"].append(t[:real].astype(int))
                new["error"].append(error[:real])
            bar.update((first - start) * (draws + 1) + (k + 1) * real)
        new |= {"bits": bits, "t": np.stack(new["t"], axis=1), "error": np.stack(new["error"], axis=1)}
        seen = {name: np.concatenate([seen[name], new[name]]) for name in seen}
        if kept:
            with files.replacing(kept) as draft:
                np.savez(draft, asked=asked, **seen)
    return seen


def measured(values, remark="", here=None):
    """A row of the table: a mean and its standard error, from values (images,) or, where `here`, (images, draws)."""
    import numpy as np

    if here is None:
        values, here = values[:, None], np.ones((len(values), 1), bool)
    mean, influences = mean_and_influences(values, here)
    return {"value": float(mean), "error": standard_error(influences[here.any(axis=1)]), "remark": remark}


def mean_and_influences(values, here):
    """The mean of `values[here]`, and what each image, a row of both, adds to it beyond its share."""
    mean = values[here].mean()
    return mean, ((values - mean) * here).sum(axis=1) / here.sum()


def standard_error(influences):
    """The standard error of a mean from the influences of its images; None for a single one.

    Images are independent, but the values of one image at several t are not: they count together.
    """
    n = len(influences)
    return float((n / (n - 1) * (influences**2).sum()) ** 0.5) if n > 1 else None


# --- what it makes ----------------------------------------------------------------------------------------------------


def made(model, book, options, kept):
    """Images of the model, uint8, made in batches that are cached in a file as they come, unless `kept` is None."""
    import numpy as np
    import tensorflow as tf

    from ddpm import ddpm_schedule, reverse_process, to_pixels
    from parts import even_batches, sampling_step

    shape = model.inputs[0].shape[1:]
    path = kept and f"{kept}-samples.npy"
    samples = np.load(path) if path and os.path.exists(path) else np.empty((0, *shape), np.uint8)
    start, sched = len(samples), ddpm_schedule(**book["diffusion"])
    T = len(sched["beta_t"]) - 1
    batches, batch_size = even_batches(model, max(1, options.n_sample - start))
    step = sampling_step(model, sched, batch_size)
    bar = console.Bar(batches * batch_size * T, "step")
    for first in range(start, options.n_sample, batch_size):
        for t, x_t in reverse_process(step, T, shape, 0, tf.range(first, first + batch_size)):
            bar.update((first - start) * T + batch_size * (T - t))
        samples = np.concatenate([samples, to_pixels(x_t).astype(np.uint8)])
        if path:
            files.save_array(samples, path)  # a later run goes on from here
    return samples[: options.n_sample]


def of_samples(samples, training, held_out, extract, options):
    """Distances between samples and held-out pictures, and from both to the training pictures."""
    import numpy as np

    import metrics

    def features_of(images, what):
        say(f"{options.features}: features of {len(images):,} {what}")
        return extract(images, console.Bar(len(images), "picture").update)

    of_made, of_held_out = features_of(samples, "samples"), features_of(held_out, "held-out pictures")
    few = min(len(samples), len(held_out))
    remarks = {
        "kid": "around 0 for the same kind" + ("; below 500 pictures mostly noise" if few < 500 else ""),
        "frechet": f"of {few} pictures" + ("; fewer than dimensions" if few < of_made.shape[1] else ""),
        "precision": "share of samples among the real",
        "recall": "share of the real among samples",
    }
    rows = {}
    for name, remark in remarks.items():
        if name in options.only:
            value, error = metrics.with_error(getattr(metrics, name), of_held_out, of_made)
            rows[f"{name}, {options.features}"] = {"value": float(value), "error": float(error), "remark": remark}
    if "copies" in options.only or options.figure:
        mirrored = samples[:, :, ::-1]
        of_mirrored, of_training = features_of(mirrored, "mirrored samples"), features_of(training, "training pictures")
        flat = [images.reshape(len(images), -1) / 255.0 for images in (samples, training, held_out, mirrored)]
        spaces = {"pixels": flat, options.features: (of_made, of_training, of_held_out, of_mirrored)}
        for space, of_all in spaces.items():
            if "copies" in options.only:
                ratios, share = metrics.copying(*of_all)
                quantiles = {f"{q} %": float(np.percentile(ratios, q)) for q in (5, 25, 75, 95)}
                rows[f"nearness to training, {space}"] = {
                    "value": float(np.median(ratios)),
                    "quantiles": quantiles,
                    "remark": "median ratio, 1 without copying; "
                    + ", ".join(f"{name}: {ratio:.2f}" for name, ratio in quantiles.items()),
                }
                error = float((share * (1 - share) / len(samples)) ** 0.5)
                rows[f"near-copies, {space}"] = {"value": float(share), "error": error, "remark": "share of samples"}
        if options.figure:
            beside(samples[:8], training, held_out, spaces[options.features], options.figure)
    return rows


def beside(samples, training, held_out, spaces, path):
    """An image of samples, under each its nearest training image, and under that its nearest held-out one.

    Mirrored ones are shown as they are nearest.
    """
    import numpy as np

    import metrics

    of_made, of_training, of_held_out, of_mirrored = spaces
    rows = [samples]
    for images, features in (training, of_training), (held_out, of_held_out):
        some = slice(len(samples))
        index, _, flipped = metrics.nearest_either_way(of_made[some], of_mirrored[some], features)
        rows.append(np.where(flipped[:, None, None, None], images[index, :, ::-1], images[index]))
    files.save_grid(np.concatenate(rows), path, columns=len(samples))
    say(f"{path}: samples, below them the nearest training pictures, then the nearest held-out ones")


if __name__ == "__main__":
    main()
