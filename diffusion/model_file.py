"""Opens, checks and describes a model: `open_model` and `describe` return a `TrainedModel`.

Its metadata are the `entries` of the network's `Logbook` layer:

`diffusion`   beta1, beta2, T, schedule, zero_snr, target; in files of earlier versions only the first three
`data`        of the training images: source, count, digest; with classes labels, a digest of those; scale, see
              `support.scale.Scale`, none in files of earlier versions
`classes`     the names of the classes that the network knows; none in files of earlier versions
`no_class`    with classes, whether images without one were trained too; none in files of earlier versions
`validation`  of the held-out images: source or None, fraction or None, count, digest; None without any
`sampling`    sampler, steps and variance for `my_sample` where none are asked for; none in files of earlier versions
`settings`    the options of `training/settings.py` that are stored
`progress`    epoch and step; of the running epoch images, epoch_steps, loss, seconds; in float16 loss_scale
"""

import contextlib
import dataclasses
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable

import keras
import numpy as np

import unet  # noqa: F401 (registers the layers that files hold)
from ddpm import Schedule, n_steps, schedule_tables
from diffusion.layers import LearnedSchedule, Logbook
from diffusion.options import Sampling
from diffusion.schedules import make_schedule
from support import files, grids
from support.scale import Scale


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A network and what it was trained for. Two are equal if their network is the same object.

    Attributes:
        network: a Keras model, [x_t, t/T] or [x_t, t/T, label] → its prediction, like x_t or with twice the channels;
            or, of a classifier, log p(class | x_t) up to a constant, (batch, classes).
        sched: the noise schedule.
        target: what it predicts, a name in `targets.TARGETS`.
        classes: the names of its classes, in the order of their numbers; None if they are not known.
        recommended: how `my_sample` samples where nothing is asked for.
        metadata: see above; empty for a model without any.
    """

    network: keras.Model
    sched: Schedule = dataclasses.field(compare=False)
    target: str = dataclasses.field(default="eps", compare=False)
    classes: list[str] | None = dataclasses.field(default=None, compare=False)
    recommended: Sampling = dataclasses.field(default=Sampling("ddpm"), compare=False)
    metadata: dict = dataclasses.field(default_factory=dict, compare=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of its images."""
        return tuple(self.network.inputs[0].shape[1:])

    @property
    def scale(self) -> Scale:
        """Which values the integers of its training images stand for."""
        return Scale(**self.metadata.get("data", {}).get("scale", {}))

    @property
    def levels(self) -> int:
        """How many steps lie between black and white: 255 for images of 8 bits."""
        return self.scale.levels

    def shown(self, asked: str | None = None) -> tuple[int, ...] | None:
        """The channels that grids show: those asked for, else those of training; see `grids.parse_shown`."""
        asked = asked or self.metadata.get("settings", {}).get("show")
        return grids.parse_shown(asked, self.image_shape[-1])

    @property
    def takes_labels(self) -> bool:
        """Whether the network takes the class of each image."""
        return len(self.network.inputs) > 2

    @property
    def is_classifier(self) -> bool:
        """Whether it predicts the class of noisy images."""
        inputs, outputs = self.network.inputs, self.network.outputs
        return len(inputs) == 2 and len(inputs[0].shape) == 4 and len(outputs[0].shape) == 2

    @property
    def schedule_layer(self) -> LearnedSchedule | None:
        """The layer of a network whose schedule is learned."""
        return find_layer(self.network, LearnedSchedule)

    @property
    def learns_variance(self) -> bool:
        """Whether it also predicts the variance of a reverse step, see `diffusion/learned_variance.py`."""
        image, output = self.network.inputs[0].shape, self.network.outputs[0].shape
        return len(output) == len(image) and output[-1] == 2 * image[-1]

    def choose(self, asked: Sampling) -> Sampling:
        """How to sample: as asked for, and as recommended where nothing is asked for.

        Raises:
            ValueError: if that contradicts itself, or asks for a variance that the network has not learned.
        """
        sampling = asked.resolve(self.recommended)
        if sampling.variance == "learned" and not self.learns_variance:
            raise ValueError(
                "variance learned needs a network that learns it; train one with --network unet --learn-variance, or "
                "choose another variance"
            )
        return sampling


def describe(network: keras.Model) -> TrainedModel:
    """A network with what its metadata say of it; without any, with the slides' schedule and ε."""
    entries = metadata(network)
    settings = {"target": "eps", **entries.get("diffusion", SLIDES)}
    target, layer = settings.pop("target"), find_layer(network, LearnedSchedule)
    sched = make_schedule(**settings) if layer is None else schedule_tables(layer.alphabar(settings["T"]))
    sampling = {"sampler": "ddpm", "steps": None, "variance": "beta", **entries.get("sampling", {})}
    if sampling["steps"]:
        sampling["steps"] = min(sampling["steps"], n_steps(sched))
    if sampling["sampler"] != "ddpm":  # the file keeps a variance for the day when it is
        sampling["variance"] = None
    classes = list(map(files.normalise_name, entries.get("classes", []))) if entries else None
    return TrainedModel(network, sched, target, classes, Sampling(**sampling), entries)


def output_layer(network: keras.Model) -> keras.layers.Layer:
    """The layer whose output is the prediction."""
    layer = find_layer(network, LearnedSchedule)
    output = network.outputs[0] if layer is None else layer.input
    return next(layer for layer in network.layers if layer.output is output)


SLIDES = {"beta1": 1e-4, "beta2": 0.02, "T": 1000}


def metadata(network: keras.Model) -> dict:
    """The metadata that a network carries; empty for one without any."""
    layer = find_layer(network, Logbook)
    return {} if layer is None else layer.entries


def find_layer(network: keras.Model, kind: type) -> keras.layers.Layer | None:
    """The first layer of a kind, or None; a function in place of a network has none."""
    return next((layer for layer in getattr(network, "layers", []) if isinstance(layer, kind)), None)


def warn_of_no_class(trained: TrainedModel) -> str | None:
    """The sentence to say when a network never learns to sample without a class, else None."""
    metadata = trained.metadata
    if not metadata.get("classes") or "settings" not in metadata or learns_no_class(metadata):
        return None
    return (
        "with --drop-label 0 a network never learns to sample without a class: every image needs a label, and guidance "
        "other than 1 and evaluate.py need a model trained with --drop-label above 0"
    )


def learns_no_class(metadata: dict) -> bool:
    """Whether a model with classes was ever trained on images without one; older files note only the option.

    A classifier needs none.
    """
    settings = metadata["settings"]
    return settings["network"] == "classifier" or metadata.get("no_class", settings["drop_label"] > 0)


PRETRAINED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")


def locate(model: str) -> str:
    """The path of a model, given by its path or by the name of a pretrained one in `models/`, such as `drawings`."""
    pretrained = os.path.join(PRETRAINED, f"{os.fspath(model)}.keras")
    return pretrained if os.path.exists(pretrained) else os.fspath(model)


def open_model(path: str, compile: bool = False, classifier: bool | None = False) -> TrainedModel:
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
        raise FileNotFoundError(
            f"there is no model {path}; `python diffusion_model.py` trains one, and drawings is one"
        )
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name a .keras file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a complete Keras model file; use another file or a backup")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # Keras reads the weights without checking the checksums
                raise ValueError("its checksums are wrong")
        with _no_warning_is_an_error(silent=compile):  # Keras also only warns of an optimizer state that does not fit
            network = keras.models.load_model(path, compile=compile)
    except MemoryError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be loaded as a model, use another file or a backup: {why}") from error
    optimizer = getattr(network, "optimizer", None)
    if broken := first_not_finite([*network.variables, *(optimizer.variables if optimizer else [])]):
        raise ValueError(f"{path} has NaN or infinite values in the weight {broken}; use another file or a backup")
    trained = describe(network)
    check_network(trained, path, trained.is_classifier if classifier is None else classifier)
    return trained


def check_network(trained: TrainedModel, path: str, classifier: bool = False) -> None:
    """Raises ValueError if a model is not the classifier it must be, or its output is not shaped like its input."""
    if classifier and not trained.is_classifier:
        raise ValueError(f"{path} is not a classifier; train one with --network classifier")
    if classifier:
        return
    if trained.is_classifier:
        raise ValueError(
            f"{path} is a classifier, which cannot generate images; give it as classifier, to guide a model"
        )
    image, output = trained.network.inputs[0].shape, trained.network.outputs[0].shape
    same = tuple(image[:-1]) == tuple(output[:-1]) and (trained.learns_variance or image[-1] == output[-1])
    if len(trained.network.inputs) not in (2, 3) or not same:
        raise ValueError(
            f"{path} is not a diffusion model, which takes [image, t/T] and predicts the noise; name another file"
        )


def check_guide(guide: TrainedModel, path: str, trained: TrainedModel, classifier: bool) -> None:
    """Raises ValueError if a classifier or a weaker network cannot guide a model.

    It must be of the right kind, for images of the same shape and with the same noise schedule.
    """
    check_network(guide, path, classifier)
    shape, wanted = guide.image_shape, trained.image_shape
    if shape != wanted:
        raise ValueError(
            f"{path} takes images of shape {shape}, and this model generates {wanted}; train one for that shape"
        )
    if not np.array_equal(guide.sched.alphabar, trained.sched.alphabar):
        raise ValueError(
            f"{path} was trained with another noise schedule than this model; train one with the same --T, --schedule, "
            "--beta1, --beta2 and --zero-snr"
        )
    names, wanted = guide.classes, trained.classes
    if not classifier and names and wanted and names != wanted:
        raise ValueError(
            f"{path} was trained with the classes {', '.join(names)}, this model with {', '.join(wanted)}; they must "
            "be the same in the same order"
        )
    if not classifier and is_copy(guide, trained):
        raise ValueError(f"{path} is the same as the model that it would guide, so it has no effect; give a weaker one")


def is_copy(one: TrainedModel, other: TrainedModel) -> bool:
    """Whether two models are one, or have the same weights and predict the same."""
    if one == other:
        return True
    weights = [trained.network.weights for trained in (one, other)]
    if not weights[0] or len(weights[0]) != len(weights[1]) or one.target != other.target:
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


def open_with_schedule(path: str) -> TrainedModel:
    """Loads a model, whose metadata must hold a noise schedule.

    Raises:
        FileNotFoundError, ValueError: as `open_model`, and if it has none.
    """
    trained = open_model(path)
    if "diffusion" not in trained.metadata:
        raise ValueError(
            f"{path} has no noise schedule in its metadata; name a model that diffusion_model.py has trained"
        )
    return trained


def fingerprint(trained: TrainedModel) -> str:
    """Identifies trained weights in file names, by the step and a digest: `step4736-1f60a9c2`."""
    weights = hashlib.blake2b(digest_size=4)
    for weight in trained.network.get_weights():
        weights.update(np.ascontiguousarray(weight))
    return f"step{trained.metadata.get('progress', {}).get('step', 0)}-{weights.hexdigest()}"


def first_not_finite(variables: Iterable[keras.Variable]) -> str | None:
    """The path of the first variable with a value that is NaN or infinite, or None."""
    return next((one.path for one in variables if not keras.ops.all(keras.ops.isfinite(one))), None)
