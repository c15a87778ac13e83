"""The registered layers that are not on the slides.

Only Keras operations are used, so that they run on Keras' other backends too. Every reshape names the batch size: -1
in its place would let sizes that do not divide mix the images of a batch.
"""

import copy
import types

import keras.layers as kl
import keras.saving as ks
import numpy as np
from keras import ops

from diffusion.dropout import drop_features

CHANNELS_LAST = {"data_format": "channels_last"}  # whatever the user has set Keras to


def convolution(num_chan, size=3, **kwargs):
    """A convolution that keeps height and width."""
    return kl.Conv2D(num_chan, size, padding="same", **CHANNELS_LAST, **kwargs)


@ks.register_keras_serializable(package="MyLayers")
class GroupNormalization(kl.GroupNormalization):
    """Keras' layer with the same weights and results, in fewer passes over the image.

    Per-channel sums and sums of squares give mean and variance of the groups; what remains is one multiplication and
    one addition per value, y = x·scale + shift. The gradient is written out, as it needs only x and as few passes. All
    of it in float32, whatever the precision.

    A `modulation`, (batch, 2·channels), is a scale and a shift of each image's own on top: y (1 + scale) + shift, at no
    further pass (ADM, arXiv 2105.05233, section 3, "AdaGN"). With `silu` that function of it comes in the same pass.
    """

    def call(self, inputs, modulation=None, silu=False):
        batch, (_, height, width, channels) = ops.shape(inputs)[0], inputs.shape
        members = channels // self.groups

        def total(x):  # (batch, height, width, channels) → (batch, 1, 1, channels)
            return ops.sum(x, axis=(1, 2), keepdims=True)

        def group_means(sums):  # (batch, 1, 1, channels) → means over the pixels of a group, repeated for its channels
            grouped = ops.reshape(sums, (batch, 1, 1, self.groups, members))
            means = ops.sum(grouped, axis=-1, keepdims=True) / (height * width * members)
            return ops.reshape(means + ops.zeros_like(grouped), (batch, 1, 1, channels))

        @ops.custom_gradient
        def normalize(inputs, gamma, beta):
            x = ops.cast(inputs, "float32")
            mean = group_means(total(x))
            variance = ops.maximum(group_means(total(ops.square(x))) - ops.square(mean), 0)
            rstd = ops.rsqrt(variance + self.epsilon)
            scale = gamma * rstd
            shift = beta - mean * scale
            y = x * scale + shift
            y = ops.cast(ops.silu(y) if silu else y, self.compute_dtype)

            def gradient(*args, upstream=None):
                dy = ops.cast(args[0] if upstream is None else upstream, "float32")
                x = ops.cast(inputs, "float32")
                if silu:
                    y = x * scale + shift
                    sigmoid = ops.sigmoid(y)
                    dy = dy * sigmoid * (1 + y - y * sigmoid)
                dbeta = total(dy)
                dgamma = (total(dy * x) - mean * dbeta) * rstd
                slope = group_means(gamma * dgamma) * rstd * rstd
                offset = group_means(gamma * dbeta) * rstd - slope * mean
                dx = ops.cast(dy * scale - (x * slope + offset), inputs.dtype)
                if modulation is None:  # of all images together
                    dgamma, dbeta = ops.sum(dgamma, axis=(0, 1, 2)), ops.sum(dbeta, axis=(0, 1, 2))
                return dx, dgamma, dbeta

            return y, gradient

        gamma, beta = self.gamma + 0, self.beta + 0  # + 0: values, not variables
        if modulation is not None:
            modulation = ops.reshape(ops.cast(modulation, "float32"), (batch, 1, 1, 2 * channels))
            scale, shift = ops.split(modulation, 2, axis=-1)
            gamma, beta = gamma * (1 + scale), beta * (1 + scale) + shift
        return normalize(inputs, gamma, beta)


@ks.register_keras_serializable(package="MyLayers")
class ClassLayer(kl.Layer):
    """The embedding of a class: (batch, 1) integers, 0 for "no class" and k + 1 for class k → (batch, num_chan)."""

    def __init__(self, classes, num_chan, **kwargs):
        super().__init__(**kwargs)
        self.classes = classes
        self.num_chan = num_chan
        self.Dense_1 = kl.Dense(num_chan, use_bias=False, dtype=self.dtype_policy)

    def build(self, input_shape):
        self.Dense_1.build((input_shape[0], self.classes + 1))

    def call(self, inputs):
        return self.Dense_1(ops.one_hot(inputs[:, 0], self.classes + 1, dtype=self.compute_dtype))

    def get_config(self):
        return {**super().get_config(), "classes": self.classes, "num_chan": self.num_chan}


@ks.register_keras_serializable(package="MyLayers")
class ResidualBlock(kl.Layer):
    """The block of ADM (arXiv 2105.05233): [x (…, channels), embedding (batch, e)] → (…, num_chan).

    Twice normalization, SiLU and a 3×3 convolution. The embedding of time and class scales and shifts the second
    normalization. Last convolution and modulation begin with zeros, so that a new block returns its skip connection,
    which is x where the number of channels stays. In training dropout comes before the last convolution.
    """

    def __init__(self, num_chan, groups=8, dropout=0, **kwargs):
        super().__init__(**kwargs)
        self.num_chan = num_chan
        self.groups = groups
        self.dropout = dropout
        self.Norm_1 = GroupNormalization(groups, dtype=self.dtype_policy)
        self.Conv2D_1 = convolution(num_chan, dtype=self.dtype_policy)
        self.Modulation = kl.Dense(2 * num_chan, kernel_initializer="zeros", dtype=self.dtype_policy)
        self.Norm_2 = GroupNormalization(groups, dtype=self.dtype_policy)
        self.Conv2D_2 = convolution(num_chan, kernel_initializer="zeros", dtype=self.dtype_policy)
        self.Skip = convolution(num_chan, 1, dtype=self.dtype_policy)

    def build(self, input_shape):
        image, embedding = input_shape
        features = self.compute_output_shape(input_shape)
        self.Norm_1.build(image)
        self.Conv2D_1.build(image)
        self.Modulation.build(embedding)
        self.Norm_2.build(features)
        self.Conv2D_2.build(features)
        if image[-1] != self.num_chan:
            self.Skip.build(image)

    def compute_output_shape(self, input_shape):
        return (*input_shape[0][:-1], self.num_chan)

    def call(self, inputs, training=False):
        x, embedding = inputs
        h = self.Conv2D_1(self.Norm_1(x, silu=True))
        h = self.Norm_2(h, self.Modulation(embedding), silu=True)
        h = self.Conv2D_2(drop_features(h, self.dropout) if training and self.dropout else h)
        return h + (self.Skip(x) if self.Skip.built else x)

    def get_config(self):
        return {**super().get_config(), "num_chan": self.num_chan, "groups": self.groups, "dropout": self.dropout}


@ks.register_keras_serializable(package="MyLayers")
class SelfAttention(kl.Layer):
    """Every pixel attends to all others, in heads of 32 channels (ADM, arXiv 2105.05233); a residual: shape unchanged.

    Heads are larger, and fewer, where 32 does not divide the channels. The last projection begins with zeros.
    """

    def __init__(self, head=32, groups=8, **kwargs):
        super().__init__(**kwargs)
        self.head = head
        self.groups = groups
        self.Norm = GroupNormalization(groups, dtype=self.dtype_policy)

    def build(self, input_shape):
        channels = input_shape[-1]
        self.Projection_in = kl.Dense(3 * channels, dtype=self.dtype_policy)
        self.Projection_out = kl.Dense(channels, kernel_initializer="zeros", dtype=self.dtype_policy)
        for layer in self.Norm, self.Projection_in, self.Projection_out:
            layer.build(input_shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, inputs):
        batch, (_, height, width, channels) = ops.shape(inputs)[0], inputs.shape
        most = max(1, channels // self.head)
        heads = max(count for count in range(1, most + 1) if channels % count == 0)

        def by_head(x):  # (batch, height, width, channels) → (batch, heads, pixels, channels of a head)
            return ops.transpose(ops.reshape(x, (batch, height * width, heads, channels // heads)), (0, 2, 1, 3))

        query, key, value = map(by_head, ops.split(self.Projection_in(self.Norm(inputs)), 3, axis=-1))
        logits = ops.matmul(query, ops.swapaxes(key, 2, 3)) / (channels // heads) ** 0.5
        weights = ops.cast(ops.softmax(ops.cast(logits, "float32")), self.compute_dtype)
        mixed = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return inputs + self.Projection_out(ops.reshape(mixed, (batch, height, width, channels)))

    def get_config(self):
        return {**super().get_config(), "head": self.head, "groups": self.groups}


@ks.register_keras_serializable(package="MyLayers")
class SpaceToDepth(kl.Layer):
    """Patches of pixels become channels: (patch·h, patch·w, channels) → (h, w, patch²·channels)."""

    def __init__(self, patch, **kwargs):
        super().__init__(**kwargs)
        self.patch = patch

    def call(self, inputs):
        batch, (_, height, width, channels) = ops.shape(inputs)[0], inputs.shape
        h, w, p = height // self.patch, width // self.patch, self.patch
        x = ops.transpose(ops.reshape(inputs, (batch, h, p, w, p, channels)), (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (batch, h, w, p * p * channels))

    def get_config(self):
        return {**super().get_config(), "patch": self.patch}


@ks.register_keras_serializable(package="MyLayers")
class DepthToSpace(SpaceToDepth):
    """The inverse of `SpaceToDepth`: (h, w, patch²·channels) → (patch·h, patch·w, channels)."""

    def call(self, inputs):
        batch, (_, h, w, channels), p = ops.shape(inputs)[0], inputs.shape, self.patch
        x = ops.transpose(ops.reshape(inputs, (batch, h, w, p, p, channels // p**2)), (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (batch, h * p, w * p, channels // p**2))


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


@ks.register_keras_serializable(package="MyLayers")
class LearnedSchedule(kl.Layer):
    """An identity layer that carries a noise schedule to learn: γ(τ) = -log(ᾱ / (1 - ᾱ)), τ from 0 to 1.

    γ(τ) = γ_0 + (γ_1 - γ_0) (g(τ) - g(0)) / (g(1) - g(0)) with a monotone network g of one hidden layer, as in VDM
    (Kingma et al. 2021, arXiv 2107.00630, appendix H); so a change of g moves no end. It is computed in float32 and
    begins as a straight line.

    Args:
        first, last: γ_0 and γ_1 at first, first < last.
        units: of the hidden layer.
    """

    def __init__(self, first, last, units=32, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.first, self.last, self.units = first, last, units

    def build(self, input_shape):
        def weight(name, values):
            values = np.asarray(values, "float32")
            return self.add_weight(name=name, shape=values.shape, initializer=lambda *_, **__: values)

        def before_softplus(value):
            return np.log(np.expm1(value))

        steepness, centres = np.linspace(4, 16, self.units), np.linspace(0, 1, self.units)
        self.start = weight("start", self.first)
        self.width = weight("width", before_softplus(self.last - self.first))
        self.line = weight("line", before_softplus(1.0))
        self.heights = weight("heights", np.full(self.units, before_softplus(1e-3)))
        self.steepness = weight("steepness", before_softplus(steepness))
        self.centres = weight("centres", centres)

    def call(self, inputs):
        return inputs

    def ends(self):
        """γ_0 and γ_1 - γ_0."""
        return 1.0 * self.start, ops.softplus(self.width)

    def shape_and_slope(self, tau):
        """(g(τ) - g(0)) / (g(1) - g(0)) and its derivative, like τ, (n,) float32."""
        line, heights, steepness = (ops.softplus(weight) for weight in (self.line, self.heights, self.steepness))

        def g(tau):
            return line * tau + ops.sum(heights * ops.sigmoid(steepness * (tau[:, None] - self.centres)), axis=1)

        bend = ops.sigmoid(steepness * (tau[:, None] - self.centres))
        slope = line + ops.sum(heights * steepness * bend * (1 - bend), axis=1)
        low, high = ops.split(g(ops.convert_to_tensor([0.0, 1.0])), 2)
        return (g(tau) - low) / (high - low), slope / (high - low)

    def alphabar(self, T):
        """ᾱ_0 … ᾱ_T, NumPy float64 (T + 1,): 1, and σ(-γ(τ)) at τ = (t - 1) / (T - 1) for t ≥ 1."""
        start, width = (ops.convert_to_numpy(value).astype("float64") for value in self.ends())
        shape = self.shape_and_slope(ops.convert_to_tensor(np.linspace(0, 1, T, dtype="float32")))[0]
        gamma = start + width * ops.convert_to_numpy(shape).astype("float64")
        return np.append(1.0, 1 / (1 + np.exp(gamma)))

    def get_config(self):
        return {**super().get_config(), "first": self.first, "last": self.last, "units": self.units}
