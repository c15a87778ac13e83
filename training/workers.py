"""Training in several processes, one for each device: which rows of a batch are this one's, and sums over all of them.

Every worker holds the whole model, draws every batch as a whole and takes its rows. The workers start from the same
weights and apply the same sum of gradients, so their weights stay the same to the bit. TensorFlow's
`MultiWorkerMirroredStrategy` adds vectors over all workers (with NCCL between GPUs), and nothing else.
"""

import contextlib
import functools
import hashlib
import os
import socket
import textwrap
import time
from collections.abc import Sequence

import tensorflow as tf
from tensorflow.python.eager import context

from diffusion.model_file import TrainedModel
from support import device
from support.worker import Worker

HEARTBEAT = 600_000  # milliseconds without a sign of life after which TensorFlow acts
LONGEST_SUM = 600  # seconds for one all-reduce; the first one waits for workers that still compile
SUM_HANGS = (
    f"the all-reduce of gradients has not finished within {LONGEST_SUM // 60} minutes: a GPU hangs, or the workers "
    "cannot reach each other; set NCCL_DEBUG=INFO for details"
)
LIMB = 2**16  # of a digest: sums of such integers over 128 workers are exact in float32
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Workers:
    """The workers that train a model together, and which of them this process is.

    Must be made before TensorFlow computes anything. Waits for all of them to start.

    Args:
        worker: this one, open.
    """

    def __init__(self, worker: Worker):
        self.worker, self.index, self.count = worker, worker.index, worker.count
        with socket.socket() as port:  # no other worker of this machine gets the same one while they are exchanged
            port.bind(("", 0))
            cluster = {
                "worker": worker.addresses(port.getsockname()[1])
            }  # TensorFlow would wait for an hour for others
        leave_failures_to_lines()
        try:
            resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec(cluster), task_type="worker", task_id=worker.index, rpc_layer="grpc"
            )
            strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
        except tf.errors.OpError as error:
            raise OSError(f"the workers cannot connect ({in_words(error)}); start the same command again") from error
        worker.hurry()

        @tf.function(autograph=False)
        def add(vector):
            return strategy.run(
                lambda own: tf.distribute.get_replica_context().all_reduce("SUM", tf.identity(own)), args=(vector,)
            )

        self._add = add

    @property
    def first(self) -> bool:
        return self.index == 0

    def rows(self, size: int) -> slice:
        """This worker's rows of a batch; none if the batch is smaller than the workers and others have them."""
        mine = self.worker.share(size)
        return slice(mine.start, mine.stop)

    def add(self, vector: tf.Tensor) -> tf.Tensor:
        """The sum of the workers' vectors, (n,) float32, the same bits for all. All workers must call it alike.

        Raises:
            OSError: if TensorFlow reports an error.
        """
        # The others may have to wait for the first worker, while it saves.
        limit = self.worker.time_limit(LONGEST_SUM, SUM_HANGS) if self.first else contextlib.nullcontext()
        try:
            with limit:
                return self._add(vector)
        except tf.errors.OpError as error:
            time.sleep(60)  # if another worker has ended it is said which, and this one ended, meanwhile
            raise OSError(f"the all-reduce of gradients failed ({in_words(error)})") from error

    def difference(self, digest: tf.Tensor) -> tf.Tensor:
        """A vector like a digest, integers (n,) below `LIMB`, whose sum over all workers is 0 if all have the same."""
        digest = tf.cast(digest, tf.float32)
        return digest * (self.count - 1) if self.first else -digest

    def check_start(self, options: dict, trained: TrainedModel) -> None:
        """Checks that all workers start with the same options, code, settings, images and weights.

        Raises:
            ValueError: as `check_same`.
        """
        metadata = trained.metadata
        facts = {
            "options": sorted(options.items()),
            "code": digest_code(),
            "settings": [metadata["settings"], metadata["progress"]],
            "kind of device": device.has_gpu(),
            "images": [without_place(metadata["data"]), without_place(metadata.get("validation"))],
            "weights": digest_weights(trained.network.trainable_weights).numpy().tolist(),
        }
        self.check_same(facts)

    def check_same(self, facts: dict[str, object]) -> None:
        """Checks that all workers have the same facts, a dict of what → value.

        Raises:
            ValueError: says what differs.
        """
        digests = {what: hashlib.blake2b(repr(fact).encode()).hexdigest() for what, fact in facts.items()}
        found = self.worker.gather(digests)
        if sentence := self.worker.from_first(found and self._describe_differences(found)):
            raise ValueError(sentence)

    def _describe_differences(self, found):
        different = {k: [what for what in found[0] if one[what] != found[0][what]] for k, one in enumerate(found)}
        different = {k: whats for k, whats in different.items() if whats}
        if not different:
            return None
        who, whats = " and ".join(map(self.worker.name, different)), list(dict.fromkeys(sum(different.values(), [])))
        return (
            f"{who} and the first one differ in their {' and '.join(whats)}; start the same command with the same "
            "files everywhere, when nothing changes these any more"
        )


def in_words(error: tf.errors.OpError) -> str:
    """The message of TensorFlow in one line, shortened."""
    return textwrap.shorten(error.message, 300)


def leave_failures_to_lines() -> None:
    """Keeps TensorFlow from ending a process when another one is silent: `support/worker.py` does, and says which."""
    ours = context.context()
    ours.configure_coordination_service = functools.partial(
        ours.configure_coordination_service, heartbeat_timeout_in_ms=HEARTBEAT
    )


def without_place(images: dict | None) -> list | None:
    """What is known of images, but for where they are, which may be a copy on each node."""
    return images and sorted((name, value) for name, value in images.items() if name != "source")


def join(worker: Worker) -> Workers | None:
    """The workers that train together, once all have started; None for a process alone."""
    return Workers(worker) if worker.count > 1 else None


@tf.function(autograph=False)
def digest_weights(weights: Sequence[tf.Variable]) -> tf.Tensor:
    """A digest of all bits of float32 weights, integers (2,) below `LIMB`."""
    sums = [tf.reduce_sum(tf.bitcast(weight, tf.int32) * _odd_numbers(weight.shape)) for weight in weights]
    total = tf.cast(tf.add_n([(2 * k + 1) * one for k, one in enumerate(sums)]), tf.int64)
    return tf.cast(tf.stack([total % LIMB, total // LIMB % LIMB]), tf.float32)


def _odd_numbers(shape):
    return tf.reshape(2 * tf.range(shape.num_elements()) + 1, shape)


def digest_code() -> str:
    """A digest of the project's Python files."""
    digest = hashlib.blake2b(digest_size=16)
    for folder, folders, names in os.walk(PROJECT):
        folders[:] = sorted(
            name for name in folders if os.path.exists(os.path.join(folder, name, "__init__.py")) and name != "tests"
        )
        for name in sorted(name for name in names if name.endswith(".py")):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()
