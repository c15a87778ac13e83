"""Networks beyond the slides, after ADM (Dhariwal & Nichol 2021, arXiv 2105.05233): `Unet` and `Classifier`.

Like `unet.NaiveUnet` they take [x_t, t/T], and with classes [x_t, t/T, label], and know no noise schedule. Only Keras
operations are used, so that they run on Keras' other backends too.
"""

from collections.abc import Sequence

import keras
import keras.layers as kl

from diffusion.layers import (
    CHANNELS_LAST,
    ClassLayer,
    DepthToSpace,
    GroupNormalization,
    Logbook,
    ResidualBlock,
    SelfAttention,
    SpaceToDepth,
    convolution,
)
from unet import GROUPS, NaiveUnet, TimeLayer, check_size, check_width

Tensor = keras.KerasTensor


def check_shape(
    input_shape: tuple[int, int, int], n_feat: int, widths: Sequence[int], blocks: int, attention: int, patch: int
) -> None:
    """Raises ValueError if a network cannot have that shape or width."""
    check_width(n_feat)
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be integers of at least 1, one for each level, got {list(widths)}")
    for name, value, low, high in ("blocks", blocks, 1, 64), ("attention", attention, 0, len(widths)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {value}")
    if patch not in (1, 2, 4):
        raise ValueError(f"patch must be 1, 2 or 4, got {patch}")
    why = f" ({len(widths)} levels and patches of {patch} pixels)"
    check_size(*input_shape[:2], patch * 2 ** (len(widths) - 1), why)


def embed(t: Tensor, labels: Sequence[Tensor], classes: int, channels: int) -> Tensor:
    """The embedding of time, and of the class where there is one label, that all blocks share: (batch, channels)."""
    embedding = TimeLayer(channels, dtype="float32")(Logbook(name="logbook", dtype="float32")(t))
    for label in labels:
        embedding = kl.Add()([embedding, ClassLayer(classes, channels, dtype="float32")(label)])
    return kl.Activation("silu")(embedding)


def encode(
    image: Tensor,
    embedding: Tensor,
    n_feat: int,
    widths: Sequence[int],
    blocks: int,
    attention: int,
    patch: int,
    dropout: float = 0,
) -> list[Tensor]:
    """The features of an image at each level, which has half the height and width of the one before.

    Returns:
        The outputs of the first convolution and of every block, in order.
    """
    x = SpaceToDepth(patch)(image) if patch > 1 else image
    features = [convolution(n_feat * widths[0])(x)]
    for level, width in enumerate(widths):
        x = kl.AveragePooling2D(2, **CHANNELS_LAST)(features[-1]) if level else features[-1]
        for _ in range(blocks):
            x = ResidualBlock(n_feat * width, GROUPS, dropout)([x, embedding])
            x = SelfAttention(groups=GROUPS)(x) if level >= len(widths) - attention else x
            features.append(x)
    return features


def Unet(
    input_shape: tuple[int, int, int],
    n_feat: int,
    classes: int = 0,
    widths: Sequence[int] = (1, 2, 2),
    blocks: int = 1,
    attention: int = 1,
    patch: int = 1,
    learn_variance: bool = False,
    dropout: float = 0,
) -> keras.Model:
    """A U-Net of residual blocks; in each of them time and class scale and shift the features.

    Args:
        input_shape: (height, width, channels) of the images; height and width multiples of patch·2^(levels - 1).
        n_feat: the width, a multiple of 8.
        classes: how many classes of images there are, or 0.
        widths: of each level, in multiples of `n_feat`; each level has half the height and width of the one before.
        blocks: how many residual blocks a level has, on its way down and up.
        attention: how many of the lowest levels have self-attention.
        patch: height and width of the patches of pixels that the network sees as one: with 2 a quarter of the pixels
            with four times the channels, and so a fraction of the work.
        learn_variance: whether the output has twice the channels, of which the second half says how much noise a
            reverse step adds, see `diffusion.learned_variance.split_output`.
        dropout: fraction of the features in each block that are set to 0 in training, below 1.

    Returns:
        A Keras model: inputs [image (batch, height, width, channels), t/T (batch, 1)], and with classes an integer
        label (batch, 1), 0 for "no class" and k + 1 for class k; output like the image, float32.

    Raises:
        ValueError: if the layers cannot have that shape or width.
    """
    check_shape(input_shape, n_feat, widths, blocks, attention, patch)
    image, t = kl.Input(shape=input_shape), kl.Input(shape=(1,))
    labels = [kl.Input(shape=(1,), dtype="int32")] if classes else []
    embedding = embed(t, labels, classes, 4 * n_feat)

    skips = encode(image, embedding, n_feat, widths, blocks, attention, patch, dropout)
    x = ResidualBlock(n_feat * widths[-1], GROUPS, dropout)([skips[-1], embedding])
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            x = kl.Concatenate(axis=-1)([x, skips.pop()])
            x = ResidualBlock(n_feat * width, GROUPS, dropout)([x, embedding])
            x = SelfAttention(groups=GROUPS)(x) if level >= len(widths) - attention else x
        x = DepthToSpace(2)(kl.Concatenate(axis=-1)([x] * 4)) if level else x  # each pixel four times

    x = GroupNormalization(GROUPS)(x, silu=True)
    if patch > 1:
        # One block sees single pixels again, and the image beside the features. Without it each pixel of a patch is
        # predicted by weights of its own from coarse features, and the patches show as a grid.
        fine = GROUPS * max(1, n_feat // (2 * GROUPS))
        x = kl.Concatenate(axis=-1)([DepthToSpace(patch)(convolution(patch**2 * fine)(x)), convolution(fine)(image)])
        x = GroupNormalization(GROUPS)(ResidualBlock(fine, GROUPS, dropout)([x, embedding]), silu=True)
    channels = input_shape[-1] * (2 if learn_variance else 1)
    out = convolution(channels, kernel_initializer="zeros", dtype="float32")(x)
    return keras.Model(inputs=[image, t, *labels], outputs=out)


def Classifier(
    input_shape: tuple[int, int, int],
    n_feat: int,
    classes: int,
    widths: Sequence[int] = (1, 2, 2),
    blocks: int = 1,
    attention: int = 1,
    patch: int = 1,
) -> keras.Model:
    """The way down of a `Unet`, with one output for each class: log p(class | x_t) up to a constant.

    Arguments and errors as for `Unet`.

    Returns:
        A Keras model: inputs [image (batch, height, width, channels), t/T (batch, 1)], output (batch, classes) float32.
    """
    check_shape(input_shape, n_feat, widths, blocks, attention, patch)
    image, t = kl.Input(shape=input_shape), kl.Input(shape=(1,))
    embedding = embed(t, [], 0, 4 * n_feat)
    x = encode(image, embedding, n_feat, widths, blocks, attention, patch)[-1]
    x = GroupNormalization(GROUPS)(x, silu=True)
    x = kl.GlobalAveragePooling2D(**CHANNELS_LAST)(x)
    return keras.Model(inputs=[image, t], outputs=kl.Dense(classes, kernel_initializer="zeros", dtype="float32")(x))


NETWORKS = {"naive": NaiveUnet, "unet": Unet, "classifier": Classifier}  # by the names of `--network`
