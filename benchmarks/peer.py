"""The network of `unet.py` once more, in PyTorch, as someone who prefers it would write it: to measure against.

    network = Unet((64, 64, 3), n_feat=32)
    copy_weights(keras_model, network)      # then both give the same outputs

Epsilon of the normalization is Keras' 1e-3. Images are (batch, channels, height, width), as usual there.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

GROUPS, EPSILON = 8, 1e-3


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


class Unet(nn.Module):
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


def copy_weights(keras_model, network):
    """Gives the network the weights of a `NaiveUnet` of the same size.

    Both list their weights layer by layer in the order of computation, but for the embedding of time, which is
    found by its name; kernels turn from (height, width, in, out) to PyTorch's order.

    Raises:
        ValueError: if the two do not have the same weights.
    """
    time = [weight for weight in keras_model.weights if "time_layer" in weight.path]
    others = [weight for weight in keras_model.weights if "time_layer" not in weight.path]
    names = list(network.state_dict())
    in_order = sorted(names, key=lambda name: not name.startswith("time."))
    state = {}
    for name, weight in zip(in_order, [*time, *others], strict=True):
        value = np.array(weight)
        if value.ndim == 4:  # also of transposed ones: Keras has (h, w, out, in) there, PyTorch (in, out, h, w)
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            value = value.T
        state[name] = torch.from_numpy(value.copy())
    network.load_state_dict(state)


def check(image_shape=(64, 64, 3), n_feat=32):
    """Number of parameters, and the largest difference between the outputs of both networks.

    Raises:
        AssertionError: if they are not the same network.
    """
    import common  # noqa: F401  finds the project

    from support import device

    device.start_tensorflow()
    from unet import NaiveUnet

    rng = np.random.default_rng(0)
    model, network = NaiveUnet(image_shape, n_feat), Unet(image_shape, n_feat)
    for weight in model.weights:  # what starts as zeros and ones would hide mistakes
        weight.assign(np.array(weight) + rng.normal(0, 0.1, weight.shape))
    copy_weights(model, network)
    parameters = sum(weight.numel() for weight in network.parameters())
    x_t, t = rng.standard_normal((4, *image_shape), np.float32), rng.random((4, 1), np.float32)
    expected = np.array(model([x_t, t], training=False))
    with torch.no_grad():
        got = network(torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t)).numpy()
    difference = np.abs(got.transpose(0, 2, 3, 1) - expected).max() / np.abs(expected).max()
    assert parameters == model.count_params() and difference < 1e-4, (parameters, model.count_params(), difference)
    return parameters, difference
