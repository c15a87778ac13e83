"""What TensorBoard shows of a run: scalars, sample grids, the noise schedule, the graph of the network.

tensorboard --logdir DIR
"""

import contextlib
import importlib.util
import os

import numpy as np
import tensorflow as tf
from PIL import Image

from ddpm import n_steps
from diffusion.model_file import TrainedModel
from support import files


class Board:
    """Writes event files into a folder; a resumed run adds to them.

    Args:
        folder: what `tensorboard --logdir` is given.
        trained: the model, whose graph and schedule are shown.

    Raises:
        ValueError: if the package `tensorboard` is not installed, without which TensorFlow writes nothing, or a file is
            in the place of the folder.
    """

    def __init__(self, folder: str, trained: TrainedModel):
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
        files.make_folder("--tensorboard", folder)
        self.folder, self.writer = folder, tf.summary.create_file_writer(folder)
        events = [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith("events")]
        if any(os.path.getsize(name) > 1000 for name in events):
            return
        model, sched = trained.network, trained.sched
        with self.writer.as_default():
            inputs = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
            network = tf.function(lambda *inputs: model(list(inputs), training=False), autograph=False)
            tf.summary.graph(network.get_concrete_function(*inputs).graph.as_graph_def())
            for t in range(0, n_steps(sched) + 1, max(1, n_steps(sched) // 100)):
                tf.summary.scalar("schedule/factor of the image", sched["sqrtab"][t], step=t)
                tf.summary.scalar("schedule/factor of the noise", sched["sqrtmab"][t], step=t)
        self.writer.flush()

    @contextlib.contextmanager
    def _writing(self):
        """Writes what is logged inside to the disk.

        Raises:
            OSError: if it cannot be written.
        """
        try:
            with self.writer.as_default():
                yield
            self.writer.flush()
        except tf.errors.OpError as error:  # a full disk is the same kind of error as full memory
            raise OSError(error.message) from error

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Logs the numbers of an epoch, a dict of name → value."""
        with self._writing():
            for name, value in values.items():
                if np.isfinite(value):
                    tf.summary.scalar(name, value, step=epoch)

    def grid(self, epoch: int, path: str) -> None:
        """Logs a grid of samples from an image file."""
        with self._writing(), Image.open(path) as image:
            tf.summary.image("samples", np.asarray(image.convert("RGB"))[None], step=epoch)
