"""The machine: how TensorFlow is started on it, and what makes it fast there.

What is decided here was measured (README, "How fast it is"). A GPU gets whole batches, and XLA compiles what runs
on it. On a CPU TensorFlow's own kernels are faster than XLA's, and each core does best with a part of the batch to
itself (`parts.py`): threads that share one operation have to wait for each other after every one of them.
"""

import contextlib
import os
import platform
import sys
import tempfile

MOST_PARTS = 8  # the graph of a step grows with their number, and so does the time before the first


def cores():
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_tensorflow(parts=1):
    """Imports TensorFlow, with the chatter of its start held back, and shown if the import fails.

    What TensorFlow reads from the environment when it is imported is set here and nowhere else, and what the user has
    set stays. GPU memory is taken as it is needed, not all at once.

    Args:
        parts: into how many parts batches will be divided. Each then gets its share of the cores, unless TensorFlow
            has computed something in this process before.

    Returns:
        The module `tensorflow`.
    """
    if "tensorflow" not in sys.modules:  # later they would reach nothing but child processes
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no INFO lines of devices and compilers
        if platform.machine().lower() in ("x86_64", "amd64"):
            os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # by itself TensorFlow does so with AVX-512 only
    with _stderr_held_back():
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # already at work, in a notebook say
            gpus = tf.config.list_physical_devices("GPU")
            for gpu in gpus:
                tf.config.experimental.set_memory_growth(gpu, True)
            if parts > 1 and not gpus and "TF_NUM_INTRAOP_THREADS" not in os.environ:
                tf.config.threading.set_intra_op_parallelism_threads(max(1, cores() // parts))
    return tf


@contextlib.contextmanager
def _stderr_held_back():
    """TensorFlow's C++ parts write to file descriptor 2 before any setting reaches them."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(terminal, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


def has_gpu():
    """Whether TensorFlow sees a GPU; XLA is for it."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def parts_for(batch_size):
    """Into how many parts to divide a batch: one for each core. A GPU takes it whole."""
    return 1 if has_gpu() else min(batch_size, cores(), MOST_PARTS)


def large_gpu():
    """Whether there is a GPU that the slides' setting fits: about 20 GB of activations, 3 of weights (computed)."""
    from tensorflow.python.client import device_lib

    if not has_gpu():
        return False
    return max(device.memory_limit for device in device_lib.list_local_devices() if device.device_type == "GPU") > 28e9


def name():
    """What computes: the GPUs, or the processor and its cores."""
    import tensorflow as tf

    gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    return ", ".join(gpu.get("device_name", "GPU") for gpu in gpus) or f"CPU, {cores()} cores"
