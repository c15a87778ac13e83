"""Gives a new model the weights of a trained one: `--init`."""

import collections

import keras
import numpy as np

from diffusion import model_file
from diffusion.layers import ClassLayer
from diffusion.model_file import TrainedModel
from support.console import say


def start_from(model: keras.Model, path: str) -> None:
    """Copies weights layer by layer where their shapes are the same, and says which.

    An embedding of classes is copied class by class, by their names. The output layer stays new where it would mean
    something else: with another target or noise schedule, or for a classifier of other classes.

    Args:
        model: new, with its metadata.
        path: of the trained one.

    Raises:
        FileNotFoundError, ValueError: if the file cannot be loaded, or nothing in it fits.
    """
    new, trained = model_file.describe(model), model_file.open_model(path, classifier=None)
    ours, theirs = name_layers(model), name_layers(trained.network)
    differences = compare_meaning(new, trained)
    taken, untrained = 0, []
    for name, layer in ours.items():
        values = theirs[name].get_weights() if name in theirs else []
        if isinstance(layer, ClassLayer) and values:
            values = [embeddings_by_name(layer, values[0], new.classes, trained.classes)]
        fits = [value.shape for value in values] == [tuple(weight.shape) for weight in layer.weights]
        if fits and not (differences and layer is model_file.output_layer(model)):
            layer.set_weights(values)
            taken += layer.count_params()
        else:
            untrained.append(name)
    if not taken:
        raise ValueError(f"--init {path} has no layer of the same shape; choose the same --network and --n-feat")
    rest = f"; newly initialised: {', '.join(untrained[:5])}{' and more' * (len(untrained) > 5)}" if untrained else ""
    say(f"start     {taken:,} of {model.count_params():,} parameters from {path}{rest}")
    if differences:
        say(f"the output layer is newly initialised, as {path} was trained with {' and '.join(differences)}")
    unknown = set(new.classes or []) - set(trained.classes or [])
    if unknown and trained.takes_labels:
        say(f"newly initialised embeddings, of classes that {path} lacks: {', '.join(sorted(unknown))}")


def name_layers(network: keras.Model) -> dict[str, keras.layers.Layer]:
    """Layers with weights, by their class and the number among those: automatic names differ between programs."""
    named, numbers = {}, collections.Counter()
    for layer in network.layers:
        if layer.weights:
            name = type(layer).__name__
            named[f"{name} {numbers[name]}"] = layer
            numbers[name] += 1
    return named


def compare_meaning(new: TrainedModel, trained: TrainedModel) -> list[str]:
    """In words, why the output of a trained model means something else than the output of a new one."""
    if new.is_classifier:
        classes = trained.classes
        return [] if classes == new.classes else [f"the classes {', '.join(classes or [])}"]
    differences = [f"--target {trained.target}, not {new.target}"] if trained.target != new.target else []
    if not np.array_equal(new.sched.alphabar, trained.sched.alphabar):
        differences.append("another noise schedule")
    return differences


def embeddings_by_name(
    layer: ClassLayer, embeddings: np.ndarray, classes: list[str], their_classes: list[str] | None
) -> np.ndarray:
    """The embeddings of a new layer, (classes + 1, channels), where a trained layer knows a class taken from it.

    Row 0 stands for "no class".
    """
    own = np.array(layer.get_weights()[0])
    if own.shape[1:] != embeddings.shape[1:]:
        return embeddings  # of another width: nothing fits
    rows = {name: k + 1 for k, name in enumerate(their_classes or [])}
    own[0] = embeddings[0]
    for k, name in enumerate(classes):
        if name in rows:
            own[k + 1] = embeddings[rows[name]]
    return own
