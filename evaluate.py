"""How good is a model: likelihood, loss by t, distance to real pictures, memorisation.

    python evaluate.py --data new-drawings                         all of it, for a model of the drawings
    python evaluate.py --data HELD-OUT --only bits,loss            what needs no samples, in a minute
    python evaluate.py --data HELD-OUT --figure copies.png         samples beside the pictures nearest to them

Prints a table and writes it as JSON beside the model. `--data` are pictures that the model was not trained on.
"""

import json
import os

import console
import data
import files
from console import say, whole

PARTS = ("bits", "loss", "overfitting", "kid", "frechet", "precision", "recall", "copies")
OF_SAMPLES = PARTS[3:]
BY_HEART = 0.8  # such a share of the held-out loss, or less, have pictures that are learnt by heart
WAYS = [(variance, clip) for variance in ("beta", "posterior") for clip in (True, False)]  # to take a reverse step


def parse_options(arguments=None):
    parser = console.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="model.keras", metavar="FILE.keras", help="the trained network (model.keras)")
    add("--data", required=True, metavar="SOURCE", help="held-out pictures: new-drawings, a folder, .npy or .npz")
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
    add("--count", type=whole(20), default=1000, metavar="N", help="of held-out pictures, at most so many (1000)")
    add("--figure", metavar="FILE.png", help="samples, and under each its nearest training and held-out picture")
    add("--out", metavar="FILE.json", help="the numbers (beside the model: model-evaluation.json)")
    options = parser.parse_args(arguments)
    options.out = options.out or os.path.splitext(options.model)[0] + "-evaluation.json"
    return options


def main():
    with console.errors_in_a_sentence("evaluate.py"):
        options = parse_options()
        say("evaluate.py: starting TensorFlow …")
        import device

        device.start_tensorflow(parts=device.MOST_PARTS)
        import model_file

        for path in filter(None, (options.out, options.figure)):
            files.check_writable(path)
        model, book = model_file.open_with_schedule(options.model)
        shape = model.inputs[0].shape[1:]
        held_out, report = data.load_images(options.data, shape[0], shape[2])
        if data.digest(held_out) == book["data"]["digest"]:
            say("these are the pictures that it was trained on; numbers will be better than for new ones")
        held_out = held_out[: options.count]
        say(f"{options.model}: {book['progress']['step']:,} steps on {book['data']['source']}; {report.source}: "
            f"{len(held_out):,} pictures")  # fmt: skip

        # What takes long is kept for a later run, in `model-step4736-1f60a9c2-samples.npy` and the like.
        kept = f"{os.path.splitext(options.model)[0]}-{model_file.fingerprint(model)}"
        extract, samples, training = from_outside(shape, book, options)  # what is missing is said before long work
        rows = {}
        if set(options.only) - set(OF_SAMPLES):
            rows |= likelihood(model, book, held_out, training, options, kept)
        if extract:
            samples = made(model, book, options, f"{kept}-samples.npy") if samples is None else samples
            rows |= of_samples(samples, training, held_out, extract, options)
        show(rows)
        with files.replacing(options.out) as draft, open(draft, "w") as file:
            json.dump({"model": options.model, "data": options.data, "step": book["progress"]["step"],
                       "features": options.features, **rows}, file, indent=1)  # fmt: skip
        say(f"written to {options.out}")


def from_outside(shape, book, options):
    """What the parts asked for need, else None: the function for features, given samples, the training pictures."""
    from features import extractor

    only, extract, samples, training = set(options.only), None, None, None
    if set(OF_SAMPLES) & only or options.figure:
        extract = extractor(options.features)
        if options.samples:
            samples = data.load_images(options.samples, shape[0], shape[2])[0][: options.n_sample]
    if {"overfitting", "copies"} & only or options.figure:
        training, _ = data.load_images(options.train or book["data"]["source"], shape[0], shape[2])
    return extract, samples, training


def show(rows):
    """The table: name, value ± standard error, remark."""
    width = max(map(len, rows))
    for name, row in rows.items():
        error = f" ± {row['error']:.4f}" if row.get("error") is not None else ""
        say(f"{name:{width}}  {row['value']:8.4f}{error:11}  {row.get('remark', '')}")


# --- what the network itself knows ------------------------------------------------------------------------------------


def likelihood(model, book, held_out, training, options, kept):
    """Bits a dimension of the bound, for all four ways to take a reverse step, the loss in tenths of t, overfitting."""
    import numpy as np

    import device
    import parts
    from ddpm import ddpm_schedule

    sched, batch_size = ddpm_schedule(**book["diffusion"]), parts.even_batches(model, len(held_out))[1]
    predict_eps = parts.predictor(model, device.parts_for(batch_size))

    def seen(images, name):
        return observed(predict_eps, sched, images, options.draws, batch_size, f"{kept}-{name}")

    of_held_out = seen(held_out, "bits.npz")
    loss = of_loss(of_held_out, sched, held_out)
    rows = of_bound(of_held_out) if "bits" in options.only else {}
    rows |= loss if "loss" in options.only else {}
    if "overfitting" in options.only:
        some = training[np.random.default_rng(0).permutation(len(training))[: len(held_out)]]
        rows |= of_overfitting(of_loss(seen(some, "training-bits.npz"), sched, some), loss)
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
    """Rows: squared error of ε̂ in tenths of t, beside that of the best predictor that knows the pixels' variance."""
    import numpy as np

    rows, T, v = {}, len(sched["beta_t"]) - 1, np.var(data.scaled(images), axis=0).ravel()
    for tenth in range(10):
        low, high = 1 + tenth * T // 10, (tenth + 1) * T // 10
        here = (seen["t"] >= low) & (seen["t"] <= high)
        if np.any(here):
            a = sched["alphabar_t"][low : high + 1, None]
            best = np.mean(a * v / (a * v + 1 - a))
            rows[f"loss, t = {low} … {high}"] = measured(seen["error"][here], f"{best:.4f} if only pixels were known")
    return rows


def of_overfitting(of_training, of_held_out):
    """Row: the loss on training pictures as a share of that on held-out ones; both are rows of `of_loss`."""
    import numpy as np

    means, errors, names = [], [], [name for name in of_held_out if name in of_training]
    for rows in of_training, of_held_out:
        means.append(np.mean([rows[name]["value"] for name in names]))
        errors.append(np.linalg.norm([rows[name]["error"] or 0 for name in names]) / len(names) / means[-1])
    share = float(means[0] / means[1])
    remark = "the training pictures are learnt by heart" if share < BY_HEART else "1 if nothing is learnt by heart"
    return {"loss, training / held-out": {"value": share, "error": share * float(np.hypot(*errors)), "remark": remark}}


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
        A dict of arrays: `bits` (N, 4), L_{T-1} + … + L_0 for each of `WAYS`; `prior` (N,), L_T; `t` and `error`, one
        number for every time a picture was seen, the squared error of ε̂.
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
    asked = f"{data.digest(images)} {draws}"
    seen = {"bits": np.empty((0, len(WAYS))), "prior": np.empty(0), "t": np.empty(0, int), "error": np.empty(0)}
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
        new = {"prior": [bound_prior(x_0, sched)[:real]], "t": [], "error": []}
        for k in range(draws + 1):
            last = k == draws
            t = np.ones(batch_size) if last else np.floor(rng.uniform(edges[k], edges[k + 1], batch_size))
            error, of_t = terms(x_0, tf.constant(t, tf.int32), tf.constant([first, k]), last)
            bits = bits + of_t.numpy()[:real] * (1 if last else (T - 1) / draws)
            if not last or draws == T - 1:  # every picture at t = 1 would be too many of it in the mean over some t
                new["t"].append(t[:real].astype(int))
                new["error"].append(error[:real])
            bar.update((first - start) * (draws + 1) + (k + 1) * real)
        new["bits"] = [bits]
        seen = {name: np.concatenate([seen[name], *new[name]]) for name in seen}
        if kept:
            with files.replacing(kept) as draft:
                np.savez(draft, asked=asked, **seen)
    return seen


def measured(values, remark=""):
    """A row of the table from one value for each picture."""
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"value": float(values.mean()), "error": error, "remark": remark}


# --- what it makes ----------------------------------------------------------------------------------------------------


def made(model, book, options, kept):
    """Pictures of the model, uint8, made in batches that are kept in a file as they come."""
    import numpy as np
    import tensorflow as tf

    from ddpm import ddpm_schedule, reverse_process, to_pixels
    from parts import even_batches, sampling_step

    shape = model.inputs[0].shape[1:]
    samples = np.load(kept) if os.path.exists(kept) else np.empty((0, *shape), np.uint8)
    start, sched = len(samples), ddpm_schedule(**book["diffusion"])
    T = len(sched["beta_t"]) - 1
    batches, batch_size = even_batches(model, max(1, options.n_sample - start))
    step = sampling_step(model, sched, batch_size)
    bar = console.Bar(batches * batch_size * T, "step")
    for first in range(start, options.n_sample, batch_size):
        for t, x_t in reverse_process(step, T, shape, 0, tf.range(first, first + batch_size)):
            bar.update((first - start) * T + batch_size * (T - t))
        samples = np.concatenate([samples, to_pixels(x_t).astype(np.uint8)])
        files.save_array(samples, kept)  # a later run goes on from here
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
        of_training = features_of(training, "training pictures")
        flat = [images.reshape(len(images), -1) / 255.0 for images in (samples, training, held_out)]
        spaces = {"pixels": flat, options.features: (of_made, of_training, of_held_out)}
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
    """A picture of samples, under each its nearest training picture, and under that its nearest held-out one."""
    import numpy as np

    import metrics

    of_made, of_training, of_held_out = spaces
    of_made = of_made[: len(samples)]
    rows = [samples, training[metrics.nearest(of_made, of_training)[0]],
            held_out[metrics.nearest(of_made, of_held_out)[0]]]  # fmt: skip
    files.save_grid(np.concatenate(rows), path, columns=len(samples))
    say(f"{path}: samples, below them the nearest training pictures, then the nearest held-out ones")


if __name__ == "__main__":
    main()
