"""The U-Net of the slides, drawn (slides "U-Net")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.plots import BLUE, GREEN, GREY, VERMILION, arrow, boxes

if TYPE_CHECKING:
    import keras
    from matplotlib.figure import Figure


def network(model: keras.Model) -> Figure:
    """The U-Net of a model with the sizes of its feature maps."""
    import keras.layers as kl

    import unet

    def find(kind):
        name = "average" if kind is kl.AveragePooling2D else kind.__name__
        return [(name, layer.output) for layer in model.layers if isinstance(layer, kind)]

    path = [("$x_t$", model.inputs[0]), *find(unet.Conv3Layer), *find(unet.UnetDownLayer), *find(kl.AveragePooling2D)]
    path += [*find(kl.Conv2DTranspose), *find(unet.UnetUpLayer), (r"Conv2D, $\epsilon_\theta$", model.outputs[0])]
    texts = [f"{name}\n{'×'.join(map(str, output.shape[1:]))}" for name, output in path]
    colours = [GREY, *[BLUE] * 4, GREEN, *[VERMILION] * 4, GREY]
    figure, axis = boxes(texts, [0, 0, 1, 2, 3, 4, 3, 2, 1, 0, 0], colours, joins=[(1, 10), (2, 9), (3, 8), (4, 7)])
    style = {"ha": "center", "fontsize": 8, "arrowprops": arrow()}
    axis.annotate("t / T → TimeLayer\nadded here", (5, -4.3), (5, -5.2), **style)
    axis.set_title(f"{model.count_params():,} parameters; dashed: skip connections", fontsize=10)
    return figure
