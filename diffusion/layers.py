"""The registered layers that are not on the slides.

Only Keras operations are used, so that they run on Keras' other backends too.
"""

import copy
import types

import keras.layers as kl
import keras.saving as ks
from keras import ops


@ks.register_keras_serializable(package="MyLayers")
class GroupNormalization(kl.GroupNormalization):
    """Keras' layer with the same weights and results, in fewer passes over the image.

    Per-channel sums and sums of squares give mean and variance of the groups; what remains is one multiplication and
    one addition per value, y = x·scale + shift. The gradient is written out, as it needs only x and as few passes. All
    of it in float32, whatever the precision.
    """

    def call(self, inputs):
        _, height, width, channels = inputs.shape
        members = channels // self.groups

        def total(x):  # (batch, height, width, channels) → (batch, 1, 1, channels)
            return ops.sum(x, axis=(1, 2), keepdims=True)

        def of_groups(sums):  # (batch, 1, 1, channels) → means over the pixels of a group, repeated for its channels
            grouped = ops.reshape(sums, (-1, 1, 1, self.groups, members))
            means = ops.sum(grouped, axis=-1, keepdims=True) / (height * width * members)
            return ops.reshape(means + ops.zeros_like(grouped), (-1, 1, 1, channels))

        @ops.custom_gradient
        def normalize(inputs, gamma, beta):
            x = ops.cast(inputs, "float32")
            mean = of_groups(total(x))
            variance = ops.maximum(of_groups(total(ops.square(x))) - ops.square(mean), 0)
            rstd = ops.rsqrt(variance + self.epsilon)
            scale = gamma * rstd
            y = ops.cast(x * scale + (beta - mean * scale), self.compute_dtype)

            def gradient(*args, upstream=None):
                dy = ops.cast(args[0] if upstream is None else upstream, "float32")
                x = ops.cast(inputs, "float32")
                dbeta = total(dy)
                dgamma = (total(dy * x) - mean * dbeta) * rstd
                slope = of_groups(gamma * dgamma) * rstd * rstd
                offset = of_groups(gamma * dbeta) * rstd - slope * mean
                dx = dy * scale - (x * slope + offset)
                return ops.cast(dx, inputs.dtype), ops.sum(dgamma, axis=(0, 1, 2)), ops.sum(dbeta, axis=(0, 1, 2))

            return y, gradient

        return normalize(inputs, self.gamma + 0, self.beta + 0)  # + 0: values, not variables


@ks.register_keras_serializable(package="MyLayers")
class Logbook(kl.Layer):
    """An identity layer that carries the metadata of a model, the dict `entries`, into its file and back.

    A Keras file keeps only layers when it is loaded and saved again, so what is no weight (the noise schedule, the
    progress of training) lives in a layer. `entries` holds strings, numbers, lists and dicts of such.
    """

    def __init__(self, entries=None, **kwargs):
        super().__init__(**kwargs)
        self._kept = types.SimpleNamespace(entries=entries or {})  # Keras would wrap a plain dict to track it

    @property
    def entries(self):
        return self._kept.entries

    def call(self, inputs):
        return inputs

    def get_config(self):
        return {**super().get_config(), "entries": copy.deepcopy(self.entries)}
