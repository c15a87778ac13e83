"""The benchmarks start, and the network that they compare with is the same."""

import glob
import os
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(set(glob.glob("*.py", root_dir=os.path.join(ROOT, "benchmarks"))) - {"common.py", "peer.py"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_question_and_the_command(run, script):
    process = run(os.path.join(ROOT, "benchmarks", script), "--help")
    assert process.returncode == 0, process.stderr
    assert f"python benchmarks/{script}" in process.stdout


def test_the_peer_is_the_same_network():
    torch = pytest.importorskip("torch")
    import peer

    parameters, difference = peer.check((32, 32, 3), 16)
    assert parameters == 129_107 and difference < 1e-4
    with torch.device("meta"):
        assert sum(weight.numel() for weight in peer.Unet((64, 64, 3), 512).parameters()) == 129_329_667


def test_the_operations_are_those_of_the_layers(monkeypatch):
    """Against a count over the layers of the network itself."""
    sys.modules.pop("common", None)
    import common
    import keras

    from unet import NaiveUnet

    model, count, places = NaiveUnet((64, 64, 3), 16), 0, {}
    for layer in model.layers:
        height = layer.output.shape[1] if len(layer.output.shape) == 4 else 1
        for part in layer._flatten_layers():
            if isinstance(part, keras.layers.Conv2DTranspose):  # each weight once for each pixel of the smaller image
                stride = part.strides[0]
                places[part.path] = (height // stride) ** 2
            elif isinstance(part, keras.layers.Conv2D):
                down = 2 if "unet_down" in layer.name else 1
                places[part.path] = (height * down) ** 2
            else:
                continue
            count += 2 * places[part.path] * part.kernel.shape.num_elements()
    assert common.operations(16, 64, 5) == 3 * 5 * count
