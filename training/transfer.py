"""Gives a new model the weights of a trained one: `--init`."""

import collections

import keras
import numpy as np

from diffusion import model_file
from diffusion.layers import ClassLayer
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
    trained = model_file.open_model(path, classifier=None)
    ours, theirs = name_layers(model), name_layers(trained)
    differences = compare_meaning(model, trained)
    taken, new = 0, []
    for name, layer in ours.items():
        values = theirs[name].get_weights() if name in theirs else []
        if isinstance(layer, ClassLayer) and values:
            values = [
                embeddings_by_name(layer, values[0], model_file.classes_of(model), model_file.classes_of(trained))
            ]
        fits = [value.shape for value in values] == [tuple(weight.shape) for weight in layer.weights]
        if fits and not (differences and layer is model.layers[-1]):
            layer.set_weights(values)
            taken += layer.count_params()
        else:
            new.append(name)
    if not taken:
        raise ValueError(f"--init {path} has no layer of the same shape; choose the same --network and --n-feat")
    rest = f"; new are {', '.join(new[:5])}{' and more' * (len(new) > 5)}" if new else ""
    say(f"start     {taken:,} of {model.count_params():,} parameters from {path}{rest}")
    if differences:
        say(f"the output layer is new, as {path} was trained with {' and '.join(differences)}")
    unknown = set(model_file.classes_of(model) or []) - set(model_file.classes_of(trained) or [])
    if unknown and len(trained.inputs) == 3:
        say(f"the embeddings of classes that {path} does not know are new: {', '.join(sorted(unknown))}")


def name_layers(network: keras.Model) -> dict[str, keras.layers.Layer]:
    """Layers with weights, by their class and the number among those: automatic names differ between programs."""
    named, numbers = {}, collections.Counter()
    for layer in network.layers:
        if layer.weights:
            name = type(layer).__name__
            named[f"{name} {numbers[name]}"] = layer
            numbers[name] += 1
    return named


def compare_meaning(model: keras.Model, trained: keras.Model) -> list[str]:
    """In words, why the output of a trained model means something else than the output of a new one."""
    if model_file.is_classifier(model):
        classes = model_file.classes_of(trained)
        return [] if classes == model_file.classes_of(model) else [f"the classes {', '.join(classes or [])}"]
    (sched, target), (their_sched, their_target) = (model_file.diffusion_of(each) for each in (model, trained))
    differences = [f"--target {their_target}, not {target}"] if target != their_target else []
    if not np.array_equal(sched.alphabar, their_sched.alphabar):
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
