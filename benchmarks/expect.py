"""How far does each preset get in an hour, on this machine and on GPUs?

    python benchmarks/expect.py          about a minute on 2 cores

For a CPU preset a training step is measured here. For a GPU preset the number of images is computed: a fifth of the
card's highest rate in 16 bits, divided by the operations of an image.
"""

import argparse
import os
import tempfile

import common

CARDS = {"T4": 65e12, "H100": 989e12}  # operations a second in 16 bits, by NVIDIA's data sheets
FOR_CPU = ("first", "cpu-hour")  # presets
FRACTION = 0.2  # of the highest rate of a card


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="float32", help="precision of the measured steps (float32)")
    options = parser.parse_args()
    from support import device

    device.start_tensorflow(parts=device.MOST_PARTS)
    from training.preparation import build_network
    from training.run_settings import choose_settings
    from training.settings import PRESETS

    computed = (f"on {card} (computed)" for card in CARDS)
    rows = [
        ("preset", "image size", "parameters", "GFLOP an image", "ms a step here", "images an hour here", *computed)
    ]
    for preset in PRESETS:
        settings = choose_settings({"preset": preset}, {}, "", str)
        model = build_network(settings, 0)
        work, size = common.operations_per_image(model), settings["image_size"]
        if preset not in FOR_CPU:
            images = ("", "", *(f"{3600 * FRACTION * rate / work:,.0f}" for rate in CARDS.values()))
        else:
            words = ["--data", "drawings", "--preset", preset, "--precision", options.precision]
            with tempfile.TemporaryDirectory() as folder:
                seconds, _ = common.time_training(words, os.path.join(folder, "model.keras"))
            images = (f"{1e3 * seconds:.1f}", f"{3600 * settings['batch_size'] / seconds:,.0f}", "", "")
        rows.append((preset, f"{size}×{size}", f"{model.count_params():,}", f"{work / 1e9:.2f}", *images))
    print(common.machine("tensorflow", "keras"))
    common.table(f"{options.precision} here; cards at {FRACTION:.0%} of their highest rate", rows)


if __name__ == "__main__":
    main()
