"""The network of the slides ("U-Net"): predicts the noise in an image, given the image and t/T.

    model = NaiveUnet((64, 64, 3), n_feat=512)
    eps = model([x_t, t / T])        # (batch, 64, 64, 3), (batch, 1) → (batch, 64, 64, 3)

`import unet` is all that `keras.models.load_model` needs to open a saved `model.keras`. Only Keras operations are
used, so that the network runs on Keras' other backends too (`KERAS_BACKEND=jax`). The noise schedule is elsewhere.
"""

import keras.layers as kl
import keras.models as km
import keras.saving as ks
from keras import initializers, ops

from diffusion.layers import CHANNELS_LAST, ClassLayer, GroupNormalization, Logbook

GROUPS = 8  # in every GroupNormalization


@ks.register_keras_serializable(package="MyLayers")
class Conv3Layer(kl.Layer):
    """3×3 convolution, group normalization and ReLU, twice: (…, channels) → (…, num_chan).

    With `is_res` the output of the first half is added to the result: a residual connection.
    """

    def __init__(self, num_chan, is_res=False, **kwargs):
        super().__init__(**kwargs)
        self.num_chan = num_chan
        self.is_res = is_res
        self.Conv2D_1 = kl.Conv2D(
            num_chan, kernel_size=(3, 3), padding="same", dtype=self.dtype_policy, **CHANNELS_LAST
        )
        self.Norm_1 = GroupNormalization(groups=GROUPS, dtype=self.dtype_policy)
        self.Conv2D_2 = kl.Conv2D(
            num_chan, kernel_size=(3, 3), padding="same", dtype=self.dtype_policy, **CHANNELS_LAST
        )
        self.Norm_2 = GroupNormalization(groups=GROUPS, dtype=self.dtype_policy)

    def build(self, input_shape):
        features = self.compute_output_shape(input_shape)
        self.Conv2D_1.build(input_shape)
        for layer in self.Norm_1, self.Conv2D_2, self.Norm_2:
            layer.build(features)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.num_chan)

    def call(self, inputs):
        x1 = ops.relu(self.Norm_1(self.Conv2D_1(inputs)))
        x = ops.relu(self.Norm_2(self.Conv2D_2(x1)))
        return x1 + x if self.is_res else x

    def get_config(self):
        return {**super().get_config(), "num_chan": self.num_chan, "is_res": self.is_res}


@ks.register_keras_serializable(package="MyLayers")
class UnetDownLayer(kl.Layer):
    """Conv3Layer, then max pooling to half the size: (h, w, channels) → (h/2, w/2, num_chan)."""

    def __init__(self, num_chan, **kwargs):
        super().__init__(**kwargs)
        self.num_chan = num_chan
        self.Conv3 = Conv3Layer(num_chan, dtype=self.dtype_policy)
        self.MaxPool2D = kl.MaxPool2D(pool_size=(2, 2), strides=2, dtype=self.dtype_policy, **CHANNELS_LAST)

    def build(self, input_shape):
        self.Conv3.build(input_shape)

    def compute_output_shape(self, input_shape):
        return self.MaxPool2D.compute_output_shape(self.Conv3.compute_output_shape(input_shape))

    def call(self, inputs):
        return self.MaxPool2D(self.Conv3(inputs))

    def get_config(self):
        return {**super().get_config(), "num_chan": self.num_chan}


@ks.register_keras_serializable(package="MyLayers")
class UnetUpLayer(kl.Layer):
    """Concatenates [image, skip], doubles the size, then Conv3Layer twice: (h, w, a), (h, w, b) → (2h, 2w, num_chan).

    The slides print 3×3 kernels without strides, which do not upsample. With kernel = stride every pixel of the larger
    image comes from exactly one of the smaller.
    """

    def __init__(self, num_chan, **kwargs):
        super().__init__(**kwargs)
        self.num_chan = num_chan
        self.Conv2DTranspose = kl.Conv2DTranspose(
            num_chan, kernel_size=(2, 2), strides=2, dtype=self.dtype_policy, **CHANNELS_LAST
        )
        self.Conv3_1 = Conv3Layer(num_chan, dtype=self.dtype_policy)
        self.Conv3_2 = Conv3Layer(num_chan, dtype=self.dtype_policy)

    def build(self, input_shape):
        image, skip = input_shape
        self.Conv2DTranspose.build((*image[:-1], image[-1] + skip[-1]))
        features = self.compute_output_shape(input_shape)
        self.Conv3_1.build(features)
        self.Conv3_2.build(features)

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape[0]
        return (batch, 2 * height, 2 * width, self.num_chan)

    def call(self, inputs):
        img_input, skip = inputs
        x = ops.concatenate([img_input, skip], axis=-1)
        x = self.Conv2DTranspose(x)
        return self.Conv3_2(self.Conv3_1(x))

    def get_config(self):
        return {**super().get_config(), "num_chan": self.num_chan}


@ks.register_keras_serializable(package="MyLayers")
class TimeLayer(kl.Layer):
    """Embedding of t/T by Dense, sine, Dense: (batch, 1) in 0 … 1 → (batch, num_chan).

    The sines start at random frequencies up to `MAX_FREQUENCY` with random phases, so that neighbouring time steps have
    distinct embeddings from the start of training; with Glorot's small values each sine would be nearly linear in t.
    (The loss after 1,500 steps on the drawings was the same with Glorot's.)
    """

    MAX_FREQUENCY = 100.0  # radians over the whole of t/T

    def __init__(self, num_chan, **kwargs):
        super().__init__(**kwargs)
        self.num_chan = num_chan
        self.Dense_1 = kl.Dense(
            num_chan,
            kernel_initializer=initializers.RandomUniform(-self.MAX_FREQUENCY, self.MAX_FREQUENCY),
            bias_initializer=initializers.RandomUniform(0, 6.2832),  # 2π
            dtype=self.dtype_policy,
        )
        self.Dense_2 = kl.Dense(num_chan, dtype=self.dtype_policy)

    def build(self, input_shape):
        self.Dense_1.build(input_shape)
        self.Dense_2.build(self.compute_output_shape(input_shape))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.num_chan)

    def call(self, inputs):
        return self.Dense_2(ops.sin(self.Dense_1(inputs)))

    def get_config(self):
        return {**super().get_config(), "num_chan": self.num_chan}


def check_width(n_feat):
    """Raises ValueError if a network cannot have this width."""
    if not isinstance(n_feat, int) or n_feat < GROUPS or n_feat % GROUPS:
        raise ValueError(f"n_feat must be a multiple of {GROUPS} ({GROUPS}, {2 * GROUPS}, …), got {n_feat}")


def check_size(height, width, unit, why=""):
    """Raises ValueError, which names the nearest size that fits, if height and width are not multiples of a unit."""
    if height < unit or height % unit or width < unit or width % unit:
        nearest = "×".join(str(unit * max(1, round(size / unit))) for size in (height, width))
        raise ValueError(
            f"height and width of the images must be multiples of {unit}{why}, got {height}×{width}; the nearest is "
            f"{nearest}"
        )


def NaiveUnet(input_shape, n_feat, classes=0):
    """The U-Net of the slides.

    Args:
        input_shape: (height, width, channels) of the images; height and width multiples of 32.
        n_feat: the width, a multiple of 8. 512 at (64, 64, 3) gives the slides' 129 million parameters.
        classes: number of classes of images; 0 for a network without classes, as on the slides.

    Returns:
        A Keras model: inputs [image (batch, height, width, channels), t/T (batch, 1)], and with classes an integer
        label (batch, 1), 0 for "no class" and k + 1 for class k; output ε_θ like the image, float32. Its layers follow
        the global dtype policy, except for the embeddings (bfloat16 cannot represent 999/1000) and the last
        convolution, which are float32.

    Raises:
        ValueError: if the layers do not support the shape or the width.
    """
    if len(input_shape) != 3 or any(not isinstance(size, int) or size < 1 for size in input_shape):
        raise ValueError(f"input_shape must be (height, width, channels), three integers, got {input_shape}")
    check_size(*input_shape[:2], 32)
    check_width(n_feat)

    img_in = kl.Input(shape=input_shape)
    t_in = kl.Input(shape=(1,))
    label_in = [kl.Input(shape=(1,), dtype="int32")] if classes else []
    t = Logbook(name="logbook", dtype="float32")(t_in)  # t unchanged; the layer carries the metadata

    x = Conv3Layer(n_feat, is_res=True)(img_in)

    d1 = UnetDownLayer(n_feat)(x)
    d2 = UnetDownLayer(2 * n_feat)(d1)
    d3 = UnetDownLayer(2 * n_feat)(d2)

    thro = kl.AveragePooling2D(pool_size=(4, 4), **CHANNELS_LAST)(d3)
    thro = kl.ReLU()(thro)

    t_emb = TimeLayer(2 * n_feat, dtype="float32")(t)
    for label in label_in:
        t_emb = kl.Add()([t_emb, ClassLayer(classes, 2 * n_feat, dtype="float32")(label)])
    t_emb = kl.Reshape((1, 1, 2 * n_feat))(t_emb)

    thro = kl.Add()([thro, t_emb])
    thro = kl.Conv2DTranspose(2 * n_feat, kernel_size=(4, 4), strides=4, activation="relu", **CHANNELS_LAST)(thro)
    thro = GroupNormalization(groups=GROUPS)(thro)
    thro = kl.ReLU()(thro)

    up1 = UnetUpLayer(2 * n_feat)([thro, d3])
    up2 = UnetUpLayer(n_feat)([up1, d2])
    up3 = UnetUpLayer(n_feat)([up2, d1])

    out = kl.Concatenate(axis=-1)([up3, x])
    # With zeros the untrained network predicts no noise (loss 1) instead of random noise (loss 2).
    out = kl.Conv2D(
        input_shape[-1],
        kernel_size=(3, 3),
        padding="same",
        kernel_initializer="zeros",
        dtype="float32",
        **CHANNELS_LAST,
    )(out)

    return km.Model(inputs=[img_in, t_in, *label_in], outputs=out)
