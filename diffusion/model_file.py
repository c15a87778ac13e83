"""Opens, checks and describes a model. Its metadata are the `entries` of the network's `Logbook` layer:

`diffusion`   beta1, beta2, T, schedule, zero_snr, target; in files of earlier versions only the first three
`data`        of the training images: source, count, digest; with classes labels, a digest of those
`classes`     the names of the classes that the network knows; none in files of earlier versions
`no_class`    with classes, whether images without one were trained too; none in files of earlier versions
`validation`  of the held-out images: source or None, fraction or None, count, digest; None without any
`sampling`    sampler, steps and variance for `my_sample` where none are asked for; none in files of earlier versions
`settings`    the options of `training/settings.py` that are stored
`progress`    epoch and step; of the running epoch images, epoch_steps, loss, seconds; in float16 loss_scale
"""

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable

import keras
import numpy as np

import unet  # noqa: F401 (registers the layers that files hold)
from ddpm import Schedule, n_steps
from diffusion.layers import Logbook
from diffusion.learned_variance import learns_variance
from diffusion.schedules import make_schedule
from support import files


def metadata(model: keras.Model) -> dict:
    """The metadata that a model carries; empty for a model without any."""
    for layer in model.layers:
        if isinstance(layer, Logbook):
            return layer.entries
    return {}


SLIDES = {"beta1": 1e-4, "beta2": 0.02, "T": 1000}


def diffusion_of(model: keras.Model) -> tuple[Schedule, str]:
    """The noise schedule of a model, and what it predicts; the slides' for a model without metadata."""
    settings = {"target": "eps", **metadata(model).get("diffusion", SLIDES)}
    target = settings.pop("target")
    return make_schedule(**settings), target


def sampler_of(
    model: keras.Model, sampler: str | None = None, steps: int | None = None, variance: str | None = None
) -> dict:
    """The sampler that is asked for, or else the one that the file recommends: arguments of `make_plan`.

    Args:
        sampler, steps, variance: as of `make_plan`; None for what the file recommends. It recommends nothing, which is
            ddpm with all steps and variance β, to those who choose a sampler or a variance.

    Raises:
        ValueError: for a variance that the model has not learned, or of another sampler than ddpm.
    """
    if variance is not None and sampler not in (None, "ddpm"):
        raise ValueError(f"variance applies only to sampler ddpm, and the sampler is {sampler}; omit one of them")
    default = {"sampler": "ddpm", "steps": None, "variance": "beta"}
    if sampler is None and variance is None:
        default |= metadata(model).get("sampling", {})
    if default["steps"]:
        default["steps"] = min(default["steps"], n_steps(diffusion_of(model)[0]))
    asked = {"sampler": sampler, "steps": steps, "variance": variance}
    chosen = {name: default[name] if value is None else value for name, value in asked.items()}
    if chosen["variance"] == "learned":
        check_variance(model)
    return chosen


def check_variance(model: keras.Model) -> None:
    """Raises ValueError if a model has not learned the variance of a step."""
    if not learns_variance(model):
        raise ValueError(
            "variance learned needs a network that learns it, which is a new one of --network unet --variance learned"
        )


def classes_of(model: keras.Model) -> list[str] | None:
    """The names of the classes that a model knows, in the order of their numbers; None if it has no metadata."""
    book = metadata(model)
    return list(map(files.normalise_name, book.get("classes", []))) if book else None


def warn_of_no_class(book: dict) -> str | None:
    """The sentence to say when a network learns the classes alone, and not images of all kinds, else None.

    Args:
        book: the metadata of a model.
    """
    if not book.get("classes") or "settings" not in book or learns_no_class(book):
        return None
    return (
        "with --drop-label 0 a network learns only images of a class: sampling needs a label, and guidance other than "
        "1 and evaluate.py need a model that was trained with --drop-label above 0"
    )


def learns_no_class(book: dict) -> bool:
    """Whether a model with classes was ever trained on images without one; earlier versions noted only the option.

    A classifier needs none.
    """
    settings = book["settings"]
    return settings["network"] == "classifier" or book.get("no_class", settings["drop_label"] > 0)


def is_classifier(model: keras.Model) -> bool:
    """Whether a model tells classes of noisy images."""
    return len(model.inputs) == 2 and len(model.inputs[0].shape) == 4 and len(model.outputs[0].shape) == 2


PRETRAINED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")


def locate(model: str) -> str:
    """The path of a model that is named by its path or, like `drawings`, is one of the pretrained ones in `models/`."""
    pretrained = os.path.join(PRETRAINED, f"{os.fspath(model)}.keras")
    return pretrained if os.path.exists(pretrained) else os.fspath(model)


def open_model(path: str, compile: bool = False, classifier: bool | None = False) -> keras.Model:
    """Loads a model, or says in one sentence why it cannot be loaded.

    Args:
        path: a `.keras` file.
        compile: whether to load the optimizer too.
        classifier: whether it must be a classifier, instead of a network that predicts the noise; None for either.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a Keras model, damaged, has weights that are not finite, or takes other inputs.
    """
    path = locate(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no model {path}; `python diffusion_model.py` trains one")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name a .keras file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a complete Keras model file; use another file or a backup")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # Keras reads the weights without checking the checksums
                raise ValueError("its checksums are wrong")
        with _no_warning_is_an_error(silent=compile):  # Keras also only warns of an optimizer state that does not fit
            model = keras.models.load_model(path, compile=compile)
    except MemoryError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be loaded as a model, use another file or a backup: {why}") from error
    optimizer = getattr(model, "optimizer", None)
    if broken := first_not_finite([*model.variables, *(optimizer.variables if optimizer else [])]):
        raise ValueError(f"{path} has the weight {broken}, which is not finite; use another file or a backup")
    check_network(model, path, is_classifier(model) if classifier is None else classifier)
    return model


def check_network(model: keras.Model, path: str, classifier: bool = False) -> None:
    """Raises ValueError if a model is no classifier, or does not return something like the images that it takes."""
    if classifier and not is_classifier(model):
        raise ValueError(f"{path} is a model, but no classifier; train one with --network classifier")
    if classifier:
        return
    if is_classifier(model):
        raise ValueError(f"{path} is a classifier, which samples no images but guides a model; give it as classifier")
    same = tuple(model.inputs[0].shape[:-1]) == tuple(model.outputs[0].shape[:-1])
    same = same and (learns_variance(model) or model.inputs[0].shape[-1] == model.outputs[0].shape[-1])
    if len(model.inputs) not in (2, 3) or not same:
        raise ValueError(f"{path} is a model, but not one that takes [image, t/T] and predicts the noise")


def check_guide(guide: keras.Model, path: str, model: keras.Model, classifier: bool) -> None:
    """Raises ValueError if a classifier or a weaker network cannot guide a model.

    It must be what it is given as, and for images of the same size with the same noise on them.
    """
    check_network(guide, path, classifier)
    shape, wanted = (tuple(network.inputs[0].shape[1:]) for network in (guide, model))
    if shape != wanted:
        raise ValueError(f"{path} takes images of shape {shape}, and this model generates {wanted}; train another one")
    if not np.array_equal(diffusion_of(guide)[0].alphabar, diffusion_of(model)[0].alphabar):
        raise ValueError(
            f"{path} was trained with another noise schedule than this model; train one with the same --T, --schedule, "
            "--beta1, --beta2 and --zero-snr"
        )
    names, wanted = classes_of(guide), classes_of(model)
    if not classifier and names and wanted and names != wanted:
        raise ValueError(
            f"{path} was trained with the classes {', '.join(names)}, this model with {', '.join(wanted)}; they must "
            "be the same in the same order"
        )
    if not classifier and is_copy(guide, model):
        raise ValueError(f"{path} is the model that it would guide, so that it has no effect; give a weaker one")


def is_copy(one: keras.Model, other: keras.Model) -> bool:
    """Whether two models are one, or have the same weights and predict the same."""
    if one is other:
        return True
    weights = [model.weights for model in (one, other)]
    if not weights[0] or len(weights[0]) != len(weights[1]) or diffusion_of(one)[1] != diffusion_of(other)[1]:
        return False
    return all(np.array_equal(*pair) for pair in zip(*weights, strict=True))


@contextlib.contextmanager
def _no_warning_is_an_error(silent):
    """Warnings end nothing. Filters belong to the whole process, so they are changed only where that is necessary.

    Args:
        silent: whether warnings are not wanted at all.
    """
    if not silent and all(action != "error" for action, *_ in warnings.filters):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_with_schedule(path: str) -> tuple[keras.Model, dict]:
    """Loads a model and returns it with its metadata, which must hold a noise schedule.

    Raises:
        FileNotFoundError, ValueError: as `open_model`, and if it has none.
    """
    model = open_model(path)
    if "diffusion" not in metadata(model):
        raise ValueError(f"{path} has no noise schedule in its metadata; train it with diffusion_model.py")
    return model, metadata(model)


def fingerprint(model: keras.Model) -> str:
    """Identifies trained weights in file names, by the step and a digest: `step4736-1f60a9c2`."""
    weights = hashlib.blake2b(digest_size=4)
    for weight in model.get_weights():
        weights.update(np.ascontiguousarray(weight))
    return f"step{metadata(model).get('progress', {}).get('step', 0)}-{weights.hexdigest()}"


def first_not_finite(variables: Iterable[keras.Variable]) -> str | None:
    """The path of the first variable with a value that is NaN or infinite, or None."""
    return next((one.path for one in variables if not keras.ops.all(keras.ops.isfinite(one))), None)
