"""What the benchmarks share: networks, timing, races between contenders, operations, the profiler, tables.

Every benchmark prints tables, with the machine and the versions above them. Contenders run in processes of their own,
in turn, round after round: ratios of their times are more reproducible than the times.
"""

import functools
import glob
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["MPLBACKEND"] = "agg"  # Keras imports matplotlib, and a notebook's backend may not be installed here
NETWORKS = {"naive": {}, "unet": {"patch": 2}}  # names as in --network, and further arguments of their functions
TIMED_STEPS = 60  # of a training, after as many that warm up


def machine(*packages):
    """One line: processor, cores, and the versions of Python and the packages."""
    from support import device  # found through the line above

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        names = {name.strip(): value.strip() for name, value in lines.items()}
        flags = names.get("flags", "").split()
        vectors = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
        processor = f"{names.get('model name', processor)} ({vectors})"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"{processor}, {device.cores()} cores; Python {platform.python_version()}, {versions}"


def build(name, size, n_feat):
    """One of `NETWORKS`, a Keras model for colour images of a size."""
    from diffusion.networks import Unet
    from unet import NaiveUnet

    return {"naive": NaiveUnet, "unet": Unet}[name]((size, size, 3), n_feat, **NETWORKS[name])


class Contender:
    """A function measured in a process of its own, once started, so that none has another's threads or settings.

    Args:
        prepare: a module-level function that returns a function doing the work once.
        arguments: of `prepare`.
        environment: variables to set in that process.
    """

    def __init__(self, prepare, *arguments, **environment):
        self.prepare, self.arguments, self.environment = prepare, arguments, environment

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        os.environ |= self.environment
        self.process = context.Process(target=_work, args=(end, self.prepare, self.arguments), daemon=True)
        self.process.start()
        for variable in self.environment:
            del os.environ[variable]
        end.close()
        self.pipe.recv()  # prepared and warmed up

    def measure(self, count):
        """Seconds of each of `count` times."""
        self.pipe.send(count)
        return self.pipe.recv()

    def stop(self):
        self.pipe.send(None)
        self.process.join()


def _work(pipe, prepare, arguments):
    function = prepare(*arguments)
    time_calls(function, 3)
    pipe.send(True)
    while (count := pipe.recv()) is not None:
        pipe.send(time_calls(function, count))


def time_calls(function, count):
    """Seconds of each of `count` calls of a function that waits for its result."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def median_seconds(function, count, warm_up=3):
    """Median seconds of `count` calls, after some that warm the function up."""
    time_calls(function, warm_up)
    return statistics.median(time_calls(function, count))


def start_tensorflow(precision):
    """TensorFlow with undivided batches, with or without TF32; and the precision of the layers."""
    from support import device

    tf = device.start_tensorflow(parts=1)
    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
    return tf, "float32" if precision == "tf32" else precision


def multiply_matrices(width, dtype):
    """A function that multiplies two square matrices of that width, in 2 · width³ operations."""
    from support import device

    tf = device.start_tensorflow()
    a = tf.cast(tf.random.normal((width, width)), dtype)
    return lambda: tf.linalg.matmul(a, a)[0, 0].numpy()


def race(contenders, rounds, seconds_a_turn=1.0):
    """Median seconds of each contender, measured in turn: whatever the machine does, it does to all.

    On a GPU they are measured one after another, as its memory may not hold two of them.

    Args:
        contenders: a dict of name → `Contender`; they are started here, and stopped at the end.
    """
    from support import device

    device.start_tensorflow()
    groups = [{name: contender} for name, contender in contenders.items()] if device.has_gpu() else [contenders]
    return {name: seconds for group in groups for name, seconds in _race(group, rounds, seconds_a_turn).items()}


def _race(contenders, rounds, seconds_a_turn):
    for contender in contenders.values():
        contender.start()
    counts = {name: max(3, round(seconds_a_turn / min(c.measure(3)))) for name, c in contenders.items()}
    medians = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            medians[name].append(statistics.median(contender.measure(counts[name])))
    for contender in contenders.values():
        contender.stop()
    return {name: statistics.median(values) for name, values in medians.items()}


class StepTimer:
    """Stands in for `TrainingRun`, to end a training after some steps and keep the seconds of each."""

    def __init__(self, progress):
        self.progress, self.seconds, self.last = progress, [], time.perf_counter()

    def before_epoch(self):
        pass

    def after_epoch(self):
        from training.training_run import begin_next_epoch

        begin_next_epoch(self.progress)

    def after_step(self, loss):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if len(self.seconds) == 2 * TIMED_STEPS:
            raise StopIteration


def time_training(options, path):
    """Median seconds of a training step with these options of `diffusion_model.py`, and the number of its images."""
    from support import device

    device.start_tensorflow(parts=device.MOST_PARTS)
    import diffusion_model
    from training.preparation import prepare
    from training.settings import parse_options

    trained, images, _ = prepare(parse_options("", [*options, "--n-epochs", "1000"]), path)
    timer = StepTimer(trained.metadata["progress"])
    try:
        diffusion_model.train(trained, images, timer)
    except StopIteration:
        return statistics.median(timer.seconds[TIMED_STEPS:]), len(images.images)


@functools.cache
def operations(network, n_feat, size, batch):
    """Floating-point operations of a training step of one of `NETWORKS`."""
    return batch * operations_per_image(build(network, size, n_feat))


def operations_per_image(model):
    """Floating-point operations of training on one image: the forward pass, 3 times.

    Counts the convolutions and matrix products in the graph of the network for one image. A convolution has 2 for each
    weight and output pixel (input pixel, if it is transposed); a matrix product has 2 for each output and summed term.
    """
    from support import device

    tf, count = device.start_tensorflow(), 0
    one = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
    graph = tf.function(lambda *inputs: model(list(inputs)), autograph=False).get_concrete_function(*one).graph
    for node in graph.get_operations():
        shapes = [tensor.shape for tensor in (*node.inputs, *node.outputs)]
        if node.type in ("Conv2D", "Conv2DBackpropInput"):  # the latter is a transposed one
            _, height, width, _ = shapes[-1] if node.type == "Conv2D" else shapes[-2]
            count += 2 * shapes[1].num_elements() * height * width
        elif node.type in ("MatMul", "BatchMatMulV2"):
            count += 2 * shapes[-1].num_elements() * shapes[0][-1]
    return 3 * count


def profile(function, count):
    """Seconds of `count` calls under TensorFlow's profiler, and what ran: names, beginnings and ends in seconds.

    With a GPU only its kernels are listed; otherwise everything on the CPU, where TensorFlow's operations are called
    `name:type`, and other events have no type.
    """
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        began = time.perf_counter()
        for _ in range(count):
            function()
        wall = time.perf_counter() - began
        tf.profiler.experimental.stop()
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        with open(path, "rb") as file:
            return wall, _events_in(file.read())


def _events_in(content):
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace.FromString(content)
    planes = [plane for plane in space.planes if plane.name.startswith("/device:GPU")]
    planes = planes or [plane for plane in space.planes if plane.name == "/host:CPU"]
    events = []
    for plane in planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and not line.name.startswith("Stream"):
                continue  # lines that sum up others
            for event in line.events:
                begin = line.timestamp_ns / 1e9 + event.offset_ps / 1e12
                name = plane.event_metadata[event.metadata_id].name
                events.append((name, begin, begin + event.duration_ps / 1e12))
    return events


def table(title, rows):
    """Prints rows in columns as Markdown, for docs/performance.md; the first row is the heading."""
    print(f"\n{title}\n")
    widths = [max(len(str(row[k])) for row in rows) for k in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()
