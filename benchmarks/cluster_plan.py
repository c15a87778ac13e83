"""What would a training step cost on 8 and on 64 GPUs, and what limits it: arithmetic, all-reduce, saves, input?

    python benchmarks/cluster_plan.py --out docs/cluster-plan.png       computes; seconds
    python benchmarks/cluster_plan.py --measure                         and compares with 1, 2 and 4 processes here

The model is small: nothing overlaps in `training/train_step.py`, so the parts of a step add up. Every figure about a
GPU is computed. With `--measure` the parts of a step are measured here, and whole steps of `diffusion_model.py`.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time

import common
import devices

CARD = 989e12 * 0.2  # operations a second of an H100 in 16 bits, at the fraction that benchmarks/expect.py assumes
MEMORY = 3.35e12  # bytes a second of its memory
NVLINK = 450e9  # bytes a second in each direction
NETWORK = 12.5e9  # bytes a second of a node's 100 Gb/s
HOP = 20e-6  # seconds of latency for each of the 2 (N - 1) turns of a ring
LAUNCH = 5e-3  # seconds of a step that no batch is small enough to save: Python, launching kernels
A_NODE = 8  # GPUs
INPUT = 15e-6  # seconds a row of 64×64×3 bytes, of which each worker prepares the whole batch; measured on 2 cores
DISK = 1e9  # bytes a second that the first worker writes, while all wait
SAVE_EVERY = 600  # seconds
OPTIMIZER_PASSES = 9  # reads and writes of a vector of weights: weight, gradient, Adam's two moments, EMA weight
VECTOR_PASSES = 4  # the same to join and to divide the gradients
SETTINGS = (1, 64), (8, 64), (64, 64), (8, 512), (64, 4096)  # GPUs, images of a batch
EPOCHS, CATS = 300, 12_500  # of the slides' run
FILE_COPIES = 4  # of the weights in a file: weights, Adam's two moments, EMA weights


@dataclasses.dataclass(frozen=True)
class Network:
    """Parameters, and operations of training on one image."""

    name: str
    parameters: int
    work: float

    @property
    def vector(self):
        """Bytes that are reduced in a step: float32 gradients, the loss and two halves of a digest."""
        return 4 * (self.parameters + 3)


def networks():
    """The two of the presets for GPUs."""
    from support import device

    device.start_tensorflow(parts=1)
    from training.preparation import build_network
    from training.run_settings import choose_settings

    found = []
    for preset in "slides", "gpu-16gb":
        model = build_network(choose_settings({"preset": preset}, {}, "", str), 0)
        found.append(Network(preset, model.count_params(), common.operations_per_image(model)))
    return found


def ring_seconds(size, count, bandwidth):
    """An all-reduce of `size` bytes in a ring of `count`: each sends 2 (N - 1) / N of them, in 2 (N - 1) turns."""
    return 2 * (count - 1) * (size / count / bandwidth + HOP)


def step_parts(network, count, batch):
    """Seconds of the parts of a step on `count` GPUs, with `batch` images in all."""
    a_device = -(-batch // count)
    bandwidth = NVLINK if count <= A_NODE else NETWORK  # a ring is as fast as its slowest link
    return {
        "gradients": a_device * network.work / CARD + LAUNCH,
        "all-reduce": ring_seconds(network.vector, count, bandwidth) if count > 1 else 0.0,
        "optimizer": (OPTIMIZER_PASSES + (VECTOR_PASSES if count > 1 else 0)) * 4 * network.parameters / MEMORY,
        "input": batch * INPUT,
    }


def save_fraction(network):
    """Fraction of the time in which all wait for a save."""
    seconds = FILE_COPIES * 4 * network.parameters / DISK
    return seconds / (SAVE_EVERY + seconds)


def images_per_second(network, count, batch):
    return batch / sum(step_parts(network, count, batch).values()) * (1 - save_fraction(network))


def smallest_batch(network, count):
    """Images a GPU with which an all-reduce takes as long as the gradients: with fewer most time goes into it."""
    reduce = step_parts(network, count, count)["all-reduce"]
    return max(1, -(-max(0.0, reduce - LAUNCH) * CARD // network.work))


def reduce_rows(found):
    rows = [("network", "parameters", "MB reduced a step", "8 GPUs, NVLink", "8 GPUs, 100 Gb/s", "64 GPUs, 100 Gb/s")]
    for network in found:
        times = (ring_seconds(network.vector, *how) for how in ((8, NVLINK), (8, NETWORK), (64, NETWORK)))
        cells = (f"{1e3 * seconds:.1f} ms" for seconds in times)
        rows.append((network.name, f"{network.parameters:,}", f"{network.vector / 1e6:.1f}", *cells))
    return rows


def plan_rows(found):
    """Rows: the parts of a step, for the batch of the preset divided among the GPUs, and for that batch on each."""
    parts = ("gradients", "all-reduce", "optimizer", "input")
    rows = [("network", "GPUs", "batch", "each", *(f"{part}, ms" for part in parts), "images a second", "× one GPU")]
    for network in found:
        one = images_per_second(network, 1, 64)
        for count, batch in SETTINGS:
            seconds = step_parts(network, count, batch)
            rate = images_per_second(network, count, batch)
            cells = (f"{1e3 * seconds[part]:.1f}" for part in parts)
            rows.append((network.name, count, batch, batch // count, *cells, f"{rate:,.0f}", f"{rate / one:.1f}"))
    return rows


def limit_rows(found):
    rows = [("network", "file", "saves, % of the time", "images a GPU, 8 GPUs", "64 GPUs")]
    for network in found:
        file = f"{FILE_COPIES * 4 * network.parameters / 1e9:.2f} GB"
        smallest = (f"{smallest_batch(network, count):.0f}" for count in (8, 64))
        rows.append((network.name, file, f"{100 * save_fraction(network):.2f}", *smallest))
    return rows


def lecture_rows(network):
    """Rows: the slides' run on 1, 8 and 64 GPUs, with its batch of 64 and with 64 images on each."""
    rows = [("GPUs", "batch", "steps", "ms a step", "hours")]
    for count, batch in SETTINGS:
        steps, seconds = EPOCHS * -(-CATS // batch), sum(step_parts(network, count, batch).values())
        hours = steps * seconds / (1 - save_fraction(network)) / 3600
        rows.append((count, batch, f"{steps:,}", f"{1e3 * seconds:.0f}", f"{hours:.2f}"))
    return rows


def draw(found, path):
    """Bars of the parts of a step, for each network on 1, 8 and 64 GPUs with the slides' batch on each."""
    from support import plots

    plots.draw_for_files()
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, network in zip(axes, found, strict=True):
        steps, bottom = [step_parts(network, *setting) for setting in SETTINGS], [0.0] * len(SETTINGS)
        for part, colour in zip(steps[0], plots.COLOURS, strict=False):
            heights = [1e3 * step[part] for step in steps]
            axis.bar(range(len(SETTINGS)), heights, bottom=bottom, color=colour, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set_xticks(range(len(SETTINGS)), [f"{count} GPU{'s' * (count > 1)}\nbatch {b}" for count, b in SETTINGS])
        axis.tick_params(labelsize=8)
        axis.set_title(f"{network.name}, {network.parameters / 1e6:.0f} million parameters", fontsize=10)
    axes[0].set_ylabel("ms a step (computed)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# Here, on the cores of this machine


def time_input():
    """Seconds to prepare a row of a batch of 64×64 colour images."""
    import numpy as np

    import data

    images = np.random.default_rng(0).integers(0, 256, (4096, 64, 64, 3), np.uint8)
    seconds = []
    for epoch in range(5):
        begun = time.perf_counter()
        for _ in data.batches(images, 512, seed=0, epoch=epoch, flip=True):
            pass
        seconds.append((time.perf_counter() - begun) / len(images))
    return statistics.median(seconds)


def time_reduce(size, index=None, port=None):
    """Seconds of an all-reduce of `size` bytes between two processes here; called without place it starts them."""
    from support.launcher import free_port

    if index is None:
        port = free_port()
        words = [sys.executable, __file__, "--reduce", str(size), str(port)]
        other = subprocess.Popen([*words, "1"], stderr=subprocess.DEVNULL)
        done = subprocess.run([*words, "0"], capture_output=True, text=True)
        other.wait()
        if done.returncode:
            sys.exit(done.stderr)
        return float(done.stdout.split()[-1])
    from support import device
    from support.places import Place
    from support.worker import Worker

    tf = device.start_tensorflow(parts=2)
    from training.workers import Workers

    worker = Worker(Place(index, 2, port=port))
    worker.open("cluster_plan.py")
    workers, vector = Workers(worker), tf.zeros(size // 4)
    seconds = common.median_seconds(lambda: workers.add(vector), 30)
    if worker.first:
        print(seconds)
    worker.gather(None)
    worker.leave(0)


def time_pieces(preset, size, batch):
    """Seconds of a step here in one process, of its optimizer alone, and the number of parameters."""
    from support import device

    tf = device.start_tensorflow(parts=device.MOST_PARTS)
    from training.preparation import prepare
    from training.settings import parse_options

    words = ["--data", "drawings", "--preset", preset, "--image-size", str(size), "--batch-size", str(batch)]
    with tempfile.TemporaryDirectory() as folder:
        model = prepare(parse_options("", words), f"{folder}/model.keras")[0].network
    weights = model.trainable_weights
    gradients = [tf.zeros(weight.shape) for weight in weights]

    from training.train_step import _fused

    @tf.function(autograph=False)
    def apply():
        with _fused(model.optimizer, True):
            model.optimizer.apply(gradients, weights)

    return common.median_seconds(apply, 30), model.count_params()


def compare(preset, size, batch, counts, rounds):
    """Rows: predicted and measured steps of 1, 2, 4 processes on the cores here.

    Work is conserved: the gradients of a batch take as long however it is divided, as long as all cores are busy. Each
    process takes the step of the optimizer, and sends through the same cores 2 (N - 1) / N of the vector.
    """
    from support import device

    optimizer, parameters = time_pieces(preset, size, batch)
    reduce = time_reduce(4 * (parameters + 3))
    measured = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            measured[count].append(devices.time_training(preset, size, batch, count))
    whole = statistics.median(measured[1])
    rows = [
        ("processes", "gradients", "optimizer", "all-reduce", "predicted ms", "measured ms", "measured / predicted")
    ]
    for count in counts:
        parts = whole - optimizer, optimizer * max(1, count / device.cores()), (count - 1) * reduce
        predicted, seconds = sum(parts), statistics.median(measured[count])
        cells = (f"{1e3 * part:.1f}" for part in (*parts, predicted, seconds))
        rows.append((count, *cells, f"{seconds / predicted:.2f}"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE.png", help="image file for the figure (none)")
    parser.add_argument("--measure", action="store_true", help="also measure 1, 2 and 4 processes here")
    parser.add_argument("--preset", default="first", help="with --measure: preset that is trained (first)")
    parser.add_argument("--batch-size", type=int, default=16, help="with --measure: images of a step (16)")
    parser.add_argument("--rounds", type=int, default=3, help="with --measure: runs of each (3)")
    parser.add_argument("--reduce", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reduce:
        size, port, index = options.reduce
        time_reduce(size, index, port)
    print(common.machine("tensorflow", "keras"))
    found = networks()
    common.table("what is reduced (computed)", reduce_rows(found))
    common.table("a step on H100s, 8 to a node, nodes joined by 100 Gb/s (computed)", plan_rows(found))
    common.table("saves, and the images a GPU with which all-reduce and gradients take as long", limit_rows(found))
    common.table(f"the slides' run, {EPOCHS} epochs of {CATS:,} images (computed)", lecture_rows(found[0]))
    if options.out:
        draw(found, options.out)
        print(f"\n{options.out}")
    if options.measure:
        print(f"\nto prepare a row of 64×64 pixels takes {1e6 * time_input():.2f} µs here")
        rows = compare(options.preset, 32, options.batch_size, (1, 2, 4), options.rounds)
        common.table(f"steps of {options.batch_size} images here, preset {options.preset}", rows)


if __name__ == "__main__":
    main()
