"""What takes the time of a training step on a CPU: convolutions, normalization, attention, the optimizer, launching?

    python benchmarks/shares.py                                  the unet, half a minute on 2 cores
    python benchmarks/shares.py --network naive --n-feat 16

The cores compute parts of the batch side by side, and TensorFlow's profiler says when each operation ran. The rest of
the cores' time in a step goes into launching thousands of operations, Python, and waiting for each other. The profiler
slows steps down, mostly between operations, so the duration of a step is measured without it.
"""

import argparse
import collections
import re

import common

from support import device

STEPS = 20
# An operation, `name:type`, belongs to the first group whose pattern it contains. Gradients of the normalization and of
# SiLU have no layer name.
GROUPS = {
    "convolutions": r"^(?!.*gradient_tape).*:\w*Conv2D",
    "… gradients of their inputs": r":\w*Conv2D(?!BackpropFilter)",
    "… gradients of their kernels": r":\w*Conv2D",
    "normalization, activations, loss": r"group_normalization|:\w*(Swish|Relu)|^StatefulPartitionedCall\w*/\w+:",
    "attention": r"self_attention",
    "other layers": r"^StatefulPartitionedCall",
    "optimizer, EMA weights, sums of gradients": r"^adam/|^AddN",
    "noise on the images": r"",
}


def shares(events):
    """Seconds and number of the operations of each group, from the events of `common.profile`."""
    seconds, counts = dict.fromkeys(GROUPS, 0.0), collections.Counter()
    for name, begin, end in events:
        if re.search(r"[^:]:\w+$", name):
            group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
            seconds[group] += end - begin
            counts[group] += 1
    return seconds, counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=common.NETWORKS, default="unet", help="the network (unet)")
    parser.add_argument("--n-feat", type=int, default=32, help="width of the network (32)")
    parser.add_argument("--image-size", type=int, default=32, help="height and width of the images in pixels (32)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (16)")
    options = parser.parse_args()
    import training_step

    print(common.machine("tensorflow", "keras"))
    setting = options.network, options.n_feat, options.image_size, options.batch_size
    step = training_step.ours(*setting, "float32", {})
    whole = common.median_seconds(step, STEPS, warm_up=STEPS)
    _, events = common.profile(step, STEPS)
    seconds, counts = shares(events)
    core_seconds = whole * min(device.cores(), device.parts_for(options.batch_size))
    seconds = {group: total / STEPS for group, total in seconds.items()}
    seconds["launching, Python, waiting"] = core_seconds - sum(seconds.values())
    rows = [("", "ms of a core", "% of the step", "operations")]
    for group, s in seconds.items():
        number = round(counts[group] / STEPS) or ""
        rows.append((group, f"{1e3 * s:.1f}", f"{100 * s / core_seconds:.0f}", number))
    network, n_feat, size, batch = setting
    common.table(f"a step of {1e3 * whole:.1f} ms; {network}, n_feat {n_feat}, {size}×{size}, batches of {batch}", rows)


if __name__ == "__main__":
    main()
