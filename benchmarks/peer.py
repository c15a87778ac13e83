"""The networks of this project in PyTorch, written as its users would, to compare speed with.

    network = Unet((64, 64, 3), n_feat=32, patch=2)
    copy_weights(keras_model, network)      # then both give the same outputs

Names and arguments are the same as in `unet.py` and `diffusion/networks.py`, and epsilon of the normalization is Keras'
1e-3. Images are (batch, channels, height, width), as usual in PyTorch.
"""

import os
import shutil

import common
import numpy as np
import torch
from torch import nn
from torch.nn import functional

GROUPS, EPSILON, HEAD = 8, 1e-3, 32


def build(name, size, n_feat):
    """One of `common.NETWORKS`, for colour images of a size."""
    return {"naive": NaiveUnet, "unet": Unet}[name]((size, size, 3), n_feat, **common.NETWORKS[name])


def can_compile():
    """Whether `torch.compile` has what it needs: a GPU, or a C++ compiler."""
    return torch.cuda.is_available() or shutil.which(os.environ.get("CXX", "g++")) is not None


class Conv3(nn.Module):
    def __init__(self, channels_in, channels, is_res=False):
        super().__init__()
        self.is_res = is_res
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm_1 = nn.GroupNorm(GROUPS, channels, EPSILON)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(GROUPS, channels, EPSILON)

    def forward(self, x):
        x1 = functional.relu(self.norm_1(self.conv_1(x)))
        x = functional.relu(self.norm_2(self.conv_2(x1)))
        return x1 + x if self.is_res else x


class Down(nn.Module):
    def __init__(self, channels_in, channels):
        super().__init__()
        self.conv3 = Conv3(channels_in, channels)

    def forward(self, x):
        return functional.max_pool2d(self.conv3(x), 2)


class Up(nn.Module):
    def __init__(self, channels_in, channels):
        super().__init__()
        self.transposed = nn.ConvTranspose2d(channels_in, channels, 2, stride=2)
        self.conv3_1 = Conv3(channels, channels)
        self.conv3_2 = Conv3(channels, channels)

    def forward(self, x, skip):
        return self.conv3_2(self.conv3_1(self.transposed(torch.cat([x, skip], 1))))


class Time(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dense_1 = nn.Linear(1, channels)
        self.dense_2 = nn.Linear(channels, channels)

    def forward(self, t):
        return self.dense_2(torch.sin(self.dense_1(t)))


class NaiveUnet(nn.Module):
    """Inputs [x_t (batch, channels, height, width), t/T (batch, 1)], output ε_θ like x_t."""

    def __init__(self, image_shape, n_feat):
        super().__init__()
        channels, n = image_shape[-1], n_feat
        self.first = Conv3(channels, n, is_res=True)
        self.down_1, self.down_2, self.down_3 = Down(n, n), Down(n, 2 * n), Down(2 * n, 2 * n)
        self.time = Time(2 * n)
        self.transposed = nn.ConvTranspose2d(2 * n, 2 * n, 4, stride=4)
        self.norm = nn.GroupNorm(GROUPS, 2 * n, EPSILON)
        self.up_1, self.up_2, self.up_3 = Up(4 * n, 2 * n), Up(4 * n, n), Up(2 * n, n)
        self.last = nn.Conv2d(2 * n, channels, 3, padding=1)

    def forward(self, x, t):
        x = self.first(x)
        d1 = self.down_1(x)
        d2 = self.down_2(d1)
        d3 = self.down_3(d2)
        thro = functional.relu(functional.avg_pool2d(d3, 4)) + self.time(t)[:, :, None, None]
        thro = functional.relu(self.norm(functional.relu(self.transposed(thro))))
        up = self.up_3(self.up_2(self.up_1(thro, d3), d2), d1)
        return self.last(torch.cat([up, x], 1))


class ResidualBlock(nn.Module):
    """[x (batch, channels_in, …), embedding (batch, embedded)] → (batch, channels, …)."""

    def __init__(self, channels_in, channels, embedded):
        super().__init__()
        self.norm_1 = nn.GroupNorm(GROUPS, channels_in, EPSILON)
        self.conv_1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedded, 2 * channels)
        self.norm_2 = nn.GroupNorm(GROUPS, channels, EPSILON)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv_1(functional.silu(self.norm_1(x)))
        h = self.conv_2(functional.silu(self.norm_2(h) * (1 + scale) + shift))
        return h + self.skip(x)


class SelfAttention(nn.Module):
    """Every pixel attends to all others: (batch, channels, height, width), unchanged in shape."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // HEAD)
        self.norm = nn.GroupNorm(GROUPS, channels, EPSILON)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (batch, pixels, channels)
        query, key, value = self.qkv(pixels).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)  # (batch, heads, pixels, channels of a head)
        return x + self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


class Stage(nn.Module):
    """A residual block and, where the level has it, attention."""

    def __init__(self, channels_in, channels, embedded, attends):
        super().__init__()
        self.block = ResidualBlock(channels_in, channels, embedded)
        self.attention = SelfAttention(channels) if attends else nn.Identity()

    def forward(self, x, embedding):
        return self.attention(self.block(x, embedding))


class Unet(nn.Module):
    """Inputs [x_t (batch, channels, height, width), t/T (batch, 1)], with classes a label (batch, 1); output like x_t.

    PyTorch orders the values of a patch (channel, row, column), and the Keras network (row, column, channel).

    Attributes:
        patched: the weights that have the values of patches along an axis, and that axis.
    """

    def __init__(self, image_shape, n_feat, classes=0, widths=(1, 2, 2), blocks=1, attention=1, patch=1):
        super().__init__()
        channels, embedded = image_shape[-1], 4 * n_feat
        levels = [(n_feat * width, level >= len(widths) - attention) for level, width in enumerate(widths)]
        stages = [level for level in levels for _ in range(blocks)]  # (channels, whether it attends)
        first = n_feat * widths[0]
        self.blocks, self.patch = blocks, patch
        self.time = Time(embedded)
        self.label = nn.Embedding(classes + 1, embedded) if classes else None
        self.first = nn.Conv2d(channels * patch**2, first, 3, padding=1)
        self.down, skips = nn.ModuleList(), [first]
        for width, attends in stages:
            self.down.append(Stage(skips[-1], width, embedded, attends))
            skips.append(width)
        below = skips[-1]
        self.middle, self.up = ResidualBlock(below, below, embedded), nn.ModuleList()
        for width, attends in reversed(stages):
            self.up.append(Stage(below + skips.pop(), width, embedded, attends))
            below = width
        self.norm = nn.GroupNorm(GROUPS, first, EPSILON)
        self.patched = {}
        if patch > 1:
            fine = GROUPS * max(1, n_feat // (2 * GROUPS))
            self.unpatch = nn.Conv2d(first, patch**2 * fine, 3, padding=1)
            self.pixels = nn.Conv2d(channels, fine, 3, padding=1)
            self.fine, self.fine_norm = ResidualBlock(2 * fine, fine, embedded), nn.GroupNorm(GROUPS, fine, EPSILON)
            self.patched = {"first.weight": 1, "unpatch.weight": 0, "unpatch.bias": 0}
        self.last = nn.Conv2d(fine if patch > 1 else first, channels, 3, padding=1)

    def forward(self, x, t, label=None):
        embedding = self.time(t) if self.label is None else self.time(t) + self.label(label[:, 0])
        embedding = functional.silu(embedding)
        image = x
        x = self.first(functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = []
        for k, stage in enumerate(self.down):
            x = stage(functional.avg_pool2d(x, 2) if k and k % self.blocks == 0 else x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for k, stage in enumerate(self.up):
            x = functional.interpolate(x, scale_factor=2) if k and k % self.blocks == 0 else x
            x = stage(torch.cat([x, skips.pop()], 1), embedding)
        x = functional.silu(self.norm(x))
        if self.patch > 1:
            x = torch.cat([functional.pixel_shuffle(self.unpatch(x), self.patch), self.pixels(image)], 1)
            x = functional.silu(self.fine_norm(self.fine(x, embedding)))
        return self.last(x)


def copy_weights(keras_model, network):
    """Gives the network the weights of a Keras model of the same name and size.

    Both list their weights layer by layer in the order of computation, but for the embeddings of time and class, which
    are found by their names.

    Raises:
        ValueError: if the two do not have the same weights.
    """

    def in_order(names, embeddings):
        return sorted(names, key=lambda name: next((k for k, part in enumerate(embeddings) if part in name), 2))

    weights = {weight.path: np.array(weight) for weight in keras_model.weights}
    ours, theirs = in_order(weights, ("time_layer", "class_layer")), in_order(network.state_dict(), ("time.", "label."))
    state = {}
    for path, name in zip(ours, theirs, strict=True):
        value = weights[path] if name == "label.weight" else as_in_torch(weights[path])
        axis = getattr(network, "patched", {}).get(name)
        value = value if axis is None else channel_first(value, axis, network.patch)
        state[name] = torch.from_numpy(value.copy())
    network.load_state_dict(state)


def as_in_torch(value):
    """A vector as it is, matrices (in, out) → (out, in), kernels (height, width, in, out) → (out, in, height, width).

    Transposed kernels too: Keras has (height, width, out, in) there, PyTorch (in, out, height, width).
    """
    return value.transpose({1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim])


def channel_first(value, axis, patch):
    """Reorders the values of patches along an axis: (row, column, channel) → (channel, row, column)."""
    values = np.moveaxis(value, axis, 0)
    values = values.reshape(patch**2, -1, *values.shape[1:]).swapaxes(0, 1)
    return np.moveaxis(values.reshape(-1, *values.shape[2:]), 0, axis)


def check(model, network, classes=0):
    """Number of parameters, and the largest difference between the outputs of a Keras model and its repetition here.

    Raises:
        ValueError: if they are not the same network.
    """
    rng = np.random.default_rng(0)
    for weight in model.weights:  # what starts as zeros and ones would hide mistakes
        weight.assign(np.array(weight) + rng.normal(0, 0.1, weight.shape))
    copy_weights(model, network)
    parameters = sum(weight.numel() for weight in network.parameters())
    x_t, t = rng.standard_normal((4, *model.inputs[0].shape[1:]), np.float32), rng.random((4, 1), np.float32)
    labels = [rng.integers(0, classes + 1, (4, 1), np.int32)] if classes else []
    expected = np.array(model([x_t, t, *labels], training=False))
    with torch.no_grad():
        got = network(*map(torch.from_numpy, (x_t.transpose(0, 3, 1, 2).copy(), t, *labels))).numpy()
    difference = np.abs(got.transpose(0, 2, 3, 1) - expected).max() / np.abs(expected).max()
    if parameters != model.count_params() or not difference < 1e-4:
        raise ValueError(
            f"not the same network: {parameters:,} parameters instead of {model.count_params():,}, and outputs that "
            f"differ by {difference:.1e}"
        )
    return parameters, difference
