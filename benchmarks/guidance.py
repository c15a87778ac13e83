"""Do guided samples show the requested class, and how close are they to real images of it?

    pip install -r requirements-optional.txt
    python benchmarks/guidance.py --model model.keras                                      classifier-free
    python benchmarks/guidance.py --model model.keras --classifier classifier.keras        and by a classifier

An independent classifier, linear in the features that `evaluate.py` uses for distances, learns the classes from the
clean training images of the model; its accuracy on held-out images is printed first. The table gives, for each strength
g, the fraction of samples classified as the requested class, and the KID between the samples of a class and held-out
images of it, averaged over the classes. Samples are cached beside the model.
"""

import argparse
import os

import common
import numpy as np

from support import device

STRENGTHS = (0.0, 1.0, 2.0, 4.0)
MOST = 4000  # training images that the linear classifier learns from
RIDGE = 1e-2  # regularisation of the linear classifier, in units of the features' mean variance


def fit(features, labels, count):
    """A linear classifier, a function of features: least squares to 1 for the class of an image and 0 for others."""
    mean, scale = features.mean(0), features.std(0) + 1e-6
    x = np.append((features - mean) / scale, np.ones((len(features), 1)), axis=1)
    wanted = np.eye(count)[labels]
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ wanted)
    return lambda features: ((features - mean) / scale @ weights[:-1] + weights[-1]).argmax(1)


def load(metadata):
    """Training and held-out images of a model, each as images and labels."""
    import data
    from data.splits import split_held_out
    from evaluation.inputs import held_out_by_training

    settings = metadata["settings"]

    def read(source):
        images, report = data.load_images(source, settings["image_size"], settings["channels"], classes=True)
        return images, report.labels

    fraction, source, _ = held_out_by_training(metadata)
    images, labels = read(metadata["data"]["source"])
    if fraction is None:
        return (images, labels), read(source or "new-drawings")
    parts = (split_held_out(part, fraction, settings["seed"]) for part in (images, labels))
    return list(zip(*parts, strict=True))


def sample(trained, classifier, label, g, options):
    """Samples of a class, uint8, cached in a file."""
    import reverse_diffusion as rd
    from diffusion.model_file import fingerprint

    kind = f"classifier-{fingerprint(classifier)}" if classifier else "free"
    what = f"{fingerprint(trained)}-{kind}-{g:g}-{label}-{options.steps}-{options.n_sample}"
    path = f"{os.path.splitext(options.model)[0]}-{what}.npy"
    if os.path.exists(path):
        return np.load(path)
    how = {"sampler": "ddim", "eta": 1.0, "steps": options.steps, "seed": label, "verbose": 0}
    guide = classifier and classifier.network
    images = rd.my_sample(None, options.n_sample, trained.network, label=label, guidance=g, classifier=guide, **how)
    np.save(path, images.astype(np.uint8))
    return images.astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model.keras", help="model trained with --classes (model.keras)")
    parser.add_argument("--classifier", help="classifier for a second table (none)")
    parser.add_argument("--n-sample", type=int, default=256, help="number of samples per class (256)")
    parser.add_argument("--steps", type=int, default=50, help="number of DDIM steps, with eta 1 (50)")
    parser.add_argument(
        "--features", default="efficientnet", help="feature extractor, as for evaluate.py (efficientnet)"
    )
    options = parser.parse_args()
    print(common.machine("tensorflow", "keras"))
    device.start_tensorflow(parts=device.MOST_PARTS)
    from diffusion import model_file
    from evaluation.features import extractor
    from evaluation.metrics import kid

    trained = model_file.open_model(options.model)
    classifier = options.classifier and model_file.open_model(options.classifier, classifier=True)
    extract, names = extractor(options.features), trained.classes
    (images, labels), (held_out, held_out_labels) = load(trained.metadata)
    known = np.flatnonzero(labels >= 0)
    known = np.random.default_rng(0).permutation(known)[:MOST]
    tell, real = fit(extract(images[known]), labels[known], len(names)), extract(held_out)
    labelled = held_out_labels >= 0
    accuracy = np.mean(tell(real)[labelled] == held_out_labels[labelled])
    print(f"independent classifier: accuracy {accuracy:.3f} on {np.sum(labelled):,} held-out images")
    for guide in [None, classifier] if classifier else [None]:
        rows = [("g", "of the class asked for", *names, "KID to its real images")]
        for g in STRENGTHS:
            seen, distances = [], []
            for label in range(len(names)):
                features = extract(sample(trained, guide, label, g, options))
                seen.append(np.mean(tell(features) == label))
                distances.append(kid(real[held_out_labels == label], features))
            rows.append((f"{g:g}", f"{np.mean(seen):.3f}", *(f"{s:.2f}" for s in seen), f"{np.mean(distances):.3f}"))
        what = "by a classifier" if guide else "classifier-free"
        common.table(f"{what}, {options.n_sample} samples a class, {options.steps} steps of DDIM, eta 1", rows)


if __name__ == "__main__":
    main()
