"""How a training step is executed: loss, gradients of a batch in parts side by side, optimizer and EMA weights.

There is one part for each core, and before that for each device, in a process of its own (`training/workers.py`). The
result does not depend on the number of parts, except for rounding; the same number, with as many threads each, gives
the same bits.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from ddpm import n_steps
from diffusion.dropout import keyed_dropout
from diffusion.learned_variance import hybrid_loss, split_output
from diffusion.model_file import TrainedModel, describe
from diffusion.reverse import split
from training.learned_schedule import schedule_gradients
from training.workers import Workers, digest_weights

NARROWEST = 16  # rows and columns of a kernel that Muon trains
STEPS_BETWEEN_CHECKS = 100  # that all workers have the same weights


def ema_momentum(done: int | tf.Tensor, most: float) -> tf.Tensor:
    """The momentum of the EMA weights after `done` updates: min(most, (1 + done) / (10 + done)).

    While updates are few, EMA weights are a mean over the latest ninth of them or so, and forget how training began
    (the formula of `tf.train.ExponentialMovingAverage`).
    """
    done = tf.cast(done, tf.float32)
    return tf.minimum(most, (1 + done) / (10 + done))


def is_wide_kernel(shape: Sequence[int]) -> bool:
    """Whether a weight is the kernel of a convolution that Muon trains as a matrix; Keras leaves all of them to Adam.

    Its rows are the values that it sees, its columns the channels that it makes; in a transposed one vice versa.
    """
    return len(shape) == 4 and min(math.prod(shape[:-1]), shape[-1]) >= NARROWEST


@contextlib.contextmanager
def _fused(optimizer, ema_warmup):
    """While a step is traced: Keras' Adam or Muon and its EMA weights in few operations a weight instead of forty.

    The formulas are Keras' own, but for the momentum of the EMA weights, which rises if `ema_warmup`, and for kernels
    that Muon trains, see `is_wide_kernel`.
    """
    done, most = optimizer.iterations, optimizer.ema_momentum
    momentum = ema_momentum(done, most) if ema_warmup else most
    momentum = tf.where(tf.equal(done, 0), 0.0, momentum)  # EMA weights begin with the first weights

    steps = tf.cast(done + 1, tf.float32)

    def take_adam_step(gradient, variable, m, v, beta1, beta2, learning_rate):
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=m.handle,
            v=v.handle,
            beta1_power=tf.pow(beta1, steps),
            beta2_power=tf.pow(beta2, steps),
            lr=learning_rate,
            beta1=beta1,
            beta2=beta2,
            epsilon=optimizer.epsilon,
            grad=gradient,
        )

    def update_with_adam(gradient, variable, learning_rate):
        k, betas = optimizer._get_variable_index(variable), (optimizer.beta_1, optimizer.beta_2)
        m, v = optimizer._momentums[k].value, optimizer._velocities[k].value
        take_adam_step(gradient, variable, m, v, *betas, learning_rate)

    def update_with_muon(gradient, variable, learning_rate):
        k, betas = optimizer._get_variable_index(variable), (optimizer.adam_beta_1, optimizer.adam_beta_2)
        m, v = optimizer.momentums[k].value, optimizer.adam_velocities[k]
        if v is not None and not is_wide_kernel(variable.shape):
            take_adam_step(gradient, variable, m, v.value, *betas, learning_rate)
            return
        ahead = gradient + optimizer.momentum * m.assign(optimizer.momentum * m + gradient)
        matrix = tf.reshape(ahead, (-1, variable.shape[-1]))
        change = optimizer.lr_adjust(optimizer.zeropower_via_newtonschulz5(matrix, optimizer.ns_steps))
        variable.assign_sub(learning_rate * tf.reshape(change, variable.shape))

    def update_averages(variables):
        for variable, average in zip(variables, optimizer._model_variables_moving_average, strict=True):
            average.value.assign_sub((average.value - variable.value) * (1 - momentum))

    replaced = {"_update_model_variables_moving_average": update_averages}
    if isinstance(optimizer, keras.optimizers.Adam):
        replaced["update_step"] = update_with_adam
    if isinstance(optimizer, keras.optimizers.Muon):
        replaced["update_step"] = update_with_muon
    for name, function in replaced.items():
        setattr(optimizer, name, function)
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)


def choose_loss(trained: TrainedModel) -> Callable[..., tf.Tensor]:
    """The loss of a network: a function of its inputs, its output, the target and the weights (batch, 1, 1, 1).

    For images the weighted squared error of every value, plus the variational bound if the network learns the variance
    of a step; for a classifier the weighted cross entropy of every image.
    """
    if trained.is_classifier:
        return lambda inputs, output, target, weight: weight * cross_entropies(output, target)
    if not trained.learns_variance:
        return lambda inputs, output, target, weight: weight * tf.square(output - target)
    hybrid, T = hybrid_loss(trained.sched, trained.target, trained.levels), n_steps(trained.sched)

    def loss(inputs, output, target, weight):
        predicted, u = split_output(output, target.shape[-1])
        t = tf.cast(tf.round(inputs[1][:, 0] * T), tf.int32)
        return hybrid(tf.square(predicted - target), u, weight, t)

    return loss


def cross_entropies(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """-log p(class) of every image, (batch, 1, 1, 1), from logits (batch, classes) and classes (batch,) int."""
    errors = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(target, 0), logits)
    return errors[:, None, None, None]


def divide_training(
    model: keras.Model,
    parts: int,
    ema_warmup: bool = False,
    sequential: bool = False,
    workers: Workers | None = None,
) -> None:
    """Replaces the training step of a compiled model by one that computes a batch in parts, for its `train_on_batch`.

    Each part has its own gradient, and their sum, to rounding that of the whole batch, changes the weights. The parts
    are computed side by side, or one after another in the memory of one (gradient accumulation), or first divided
    among workers on several devices, each of which gets the whole batch. One trace serves batches of all sizes:
    otherwise the order in which sizes come would decide which graph computes them, and a resumed run would differ in
    the last bits. The loss is the mean of `choose_loss`, weighted by the `sample_weight` of each image,
    (batch, 1, 1, 1), if given.

    Args:
        model: compiled, with an optimizer that keeps EMA weights.
        parts: how many; of the rows of a worker, if there are several.
        ema_warmup: whether their momentum rises as `ema_momentum` computes it, instead of being constant.
        sequential: whether the parts are computed one after another.
        workers: those that train together, None for this process alone.

    Raises:
        OSError: by `train_on_batch`, if the workers no longer have the same weights.
    """
    model.parts, model.parts_in_turn = (1, parts) if sequential else (parts, 1)
    model.devices = workers.count if workers else 1
    trained = describe(model)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # in float16 it is wrapped
    inputs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in model.inputs]
    target = tf.TensorSpec([None], tf.int32) if trained.is_classifier else inputs[0]
    batch_signature = [*inputs, target, tf.TensorSpec([None, 1, 1, 1])]
    rows_signature = [*batch_signature, tf.TensorSpec([None], tf.int32), tf.TensorSpec([])]
    gradient_specs = [tf.TensorSpec(weight.shape, weight.dtype) for weight in model.trainable_weights]
    sums_signature, errors = [tf.TensorSpec([]), *gradient_specs], choose_loss(trained)
    with_schedule = trained.schedule_layer and schedule_gradients(trained)
    seed = trained.metadata.get("settings", {}).get("seed", 0)
    compiled = functools.partial(tf.function, jit_compile=model.jit_compile, autograph=False)

    @tf.function(reduce_retracing=True, autograph=False)  # traced once for all parts
    def differentiate(*part):
        *inputs, target, sample_weight, rows, factor = part
        with keyed_dropout(seed, optimizer.iterations, rows):
            if with_schedule:
                return with_schedule(inputs, target, factor, model.optimizer.scale_loss)
            with tf.GradientTape() as tape:
                output = model(inputs, training=True)
                loss = tf.reduce_sum(errors(inputs, output, target, sample_weight)) * factor
                scaled = model.optimizer.scale_loss(loss)  # in float16
            return loss, tape.gradient(scaled, model.trainable_weights)

    def whole(batch):
        """A batch with the places of its images in it, and the factor of their losses."""
        factor = 1 / tf.cast(tf.size(batch[-2]), tf.float32)
        return *batch, tf.range(tf.shape(batch[-1])[0]), factor

    def divide(rows, parts):
        """Rows of a batch in parts."""
        *tensors, factor = rows
        return [(*piece, factor) for piece in zip(*(split(tensor, parts) for tensor in tensors), strict=True)]

    def differentiate_all(pieces):
        """The sums of the losses and of the gradients of some parts, side by side."""
        losses, gradients = zip(*(differentiate(*piece) for piece in pieces), strict=True)
        return tf.add_n(losses), [tf.add_n(terms) for terms in zip(*gradients, strict=True)]

    def apply(gradients):
        with _fused(optimizer, ema_warmup):
            model.optimizer.apply(gradients, model.trainable_weights)

    @functools.cache  # a smaller batch than that many parts stays whole
    def step_in(parts):
        @compiled(input_signature=batch_signature)
        def step(*batch):
            loss, gradients = differentiate_all(divide(whole(batch), parts))
            apply(gradients)
            return loss

        return step

    @compiled(input_signature=[sums_signature, *rows_signature])
    def accumulate(sums, *piece):
        loss, gradients = differentiate(*piece)
        return [one + other for one, other in zip(sums, [loss, *gradients], strict=True)]

    @compiled(input_signature=[gradient_specs])
    def apply_sums(gradients):
        apply(gradients)

    def step_sequentially(*batch):
        sums = [tf.zeros(spec.shape, spec.dtype) for spec in sums_signature]
        for piece in divide(whole([tf.convert_to_tensor(tensor) for tensor in batch]), min(parts, len(batch[-2]))):
            sums = accumulate(sums, *piece)
        apply_sums(sums[1:])
        return sums[0]

    @functools.cache
    def sums_in(parts):
        @compiled(input_signature=rows_signature)
        def sums(*rows):
            loss, gradients = differentiate_all(divide(rows, parts))
            return tf.concat([loss[None], *(tf.reshape(gradient, [-1]) for gradient in gradients)], axis=0)

        return sums

    @tf.function(autograph=False)  # without XLA, which chooses its kernels anew in each process: bits would differ
    def apply_vector(vector):
        flat = tf.split(vector, [spec.shape.num_elements() for spec in gradient_specs])
        apply([tf.reshape(one, spec.shape) for one, spec in zip(flat, gradient_specs, strict=True)])

    steps = itertools.count()

    def step_together(*batch):
        *tensors, factor = whole([tf.convert_to_tensor(tensor) for tensor in batch])
        mine = workers.rows(len(batch[-2]))
        count, digest = mine.stop - mine.start, tf.zeros(2)
        vector = tf.zeros(1 + sum(spec.shape.num_elements() for spec in gradient_specs))
        if count:
            vector = sums_in(parts if count >= parts else 1)(*(tensor[mine] for tensor in tensors), factor)
        if next(steps) % STEPS_BETWEEN_CHECKS == 0:
            digest = digest_weights(model.trainable_weights)
        total = workers.add(tf.concat([workers.difference(digest), vector], axis=0))
        if np.any(total[:2]):
            raise OSError("the workers no longer have the same weights, perhaps as one of the devices is faulty")
        apply_vector(total[3:])
        return total[2]

    def train_function(data):
        inputs, target, sample_weight = next(data)
        if sample_weight is None:
            sample_weight = tf.ones((len(target), 1, 1, 1))
        step = step_together if workers else step_sequentially if sequential else None
        step = step or step_in(parts if len(target) >= parts else 1)
        return {"loss": step(*inputs, target, sample_weight)}

    def make_train_function(force=False):
        model.train_function = train_function

    model.make_train_function = make_train_function
