"""What TensorBoard shows of a run: scalars, grids of pictures, the noise schedule, the graph of the network.

tensorboard --logdir DIR
"""

import contextlib
import importlib.util
import os

import numpy as np
import tensorflow as tf
from PIL import Image


class Board:
    """Writes into a folder with TensorFlow's own writer; a run that goes on adds to it.

    Args:
        folder: what `tensorboard --logdir` is given.
        model: the network, whose graph is shown.
        sched: what `ddpm_schedule` returned.

    Raises:
        ValueError: if the package `tensorboard` is not installed, without which TensorFlow writes nothing.
    """

    def __init__(self, folder, model, sched):
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
        self.folder, self.writer = folder, tf.summary.create_file_writer(folder)
        new = not any(name.startswith("events") and os.path.getsize(os.path.join(folder, name)) > 1000
                      for name in os.listdir(folder))  # fmt: skip
        if not new:
            return
        with self.writer.as_default():
            inputs = [tf.TensorSpec((1, *tensor.shape[1:]), tf.float32) for tensor in model.inputs]
            network = tf.function(lambda x_t, t: model([x_t, t], training=False), autograph=False)
            tf.summary.graph(network.get_concrete_function(*inputs).graph.as_graph_def())
            for t in range(0, len(sched["beta_t"]), max(1, len(sched["beta_t"]) // 100)):
                tf.summary.scalar("schedule/share of the picture", sched["sqrtab"][t], step=t)
                tf.summary.scalar("schedule/share of the noise", sched["sqrtmab"][t], step=t)
        self.writer.flush()

    @contextlib.contextmanager
    def _writing(self):
        """What is shown inside goes to the disk.

        Raises:
            OSError: if it cannot be written.
        """
        try:
            with self.writer.as_default():
                yield
            self.writer.flush()
        except tf.errors.OpError as error:  # a full disk is the same kind of error as full memory
            raise OSError(error.message) from error

    def epoch(self, epoch, values):
        """Shows the numbers of an epoch, a dict of name → value."""
        with self._writing():
            for name, value in values.items():
                if np.isfinite(value):
                    tf.summary.scalar(name, value, step=epoch)

    def grid(self, epoch, path):
        """Shows a grid of pictures that was written to a file."""
        with self._writing(), Image.open(path) as image:
            tf.summary.image("pictures from noise", np.asarray(image.convert("RGB"))[None], step=epoch)
