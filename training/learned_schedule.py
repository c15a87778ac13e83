"""How a noise schedule is learned beside its network (VDM, Kingma et al. 2021, arXiv 2107.00630).

With γ(τ) = -log SNR and τ from 0 to 1 the bound of an image, for infinitely many steps, is in nats

    L = E_τ[l_τ] + L_T(γ(1)) + L_0(γ(0)),      l_τ = γ'(τ) ‖ε - ε̂‖² / 2

Its first term depends on the ends of γ alone, as all schedules between two ends are one integral; so the bound teaches
the ends, and the shape between them learns to make the variance of l_τ small: E[l_τ²], as E[l_τ] does not move (section
5.1 and appendix I). The network learns by its own target and weighting, as with any schedule, and is not changed by the
bound: without that, the weighting of most targets is least for a schedule of pure noise.

The times t = 1 … T of tables are τ = (t - 1) / (T - 1): x_1 is VDM's z_0, and t = 0 the image itself. In training t is
continuous between 1 and T.
"""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from ddpm import Schedule, log_probability_of_pixel, n_steps
from diffusion.model_file import TrainedModel, describe
from diffusion.targets import find_target, loss_weight


def with_live_schedule(trained: TrainedModel) -> TrainedModel:
    """A model whose tables are variables if it learns its schedule, so that compiled functions see it move."""
    if trained.schedule_layer is None:
        return trained
    sched = Schedule({name: tf.Variable(table) for name, table in trained.sched.items()})
    sched.alphabar = trained.sched.alphabar
    return dataclasses.replace(trained, sched=sched)


def follow_schedule(trained: TrainedModel) -> None:
    """Brings the tables of `with_live_schedule` to where the schedule of the network is now."""
    if trained.schedule_layer is None:
        return
    now = describe(trained.network).sched
    for name, table in now.items():
        trained.sched[name].assign(table)
    trained.sched.alphabar = now.alphabar


def signal_and_noise(gamma: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """√ᾱ, √(1 - ᾱ), (batch, 1, 1, 1) float32, and ᾱ, (batch,) float64: 1 - ᾱ of 1e-6 needs the digits."""
    gamma = tf.cast(gamma, tf.float64)
    alphabar, noise = tf.sigmoid(-gamma), tf.sigmoid(gamma)
    a, b = (tf.cast(tf.sqrt(part), tf.float32)[:, None, None, None] for part in (alphabar, noise))
    return a, b, alphabar


def sum_of_squares(x: tf.Tensor) -> tf.Tensor:
    """Of each image, (batch,)."""
    return tf.reduce_sum(tf.square(x), axis=(1, 2, 3))


def schedule_gradients(trained: TrainedModel) -> Callable[..., tuple[tf.Tensor, list[tf.Tensor]]]:
    """A training step of a network and its schedule.

    Returns:
        A function of the inputs [x_0, t/T] or [x_0, t/T, label], the noise ε, like x_0, a factor of the loss and a
        function that scales the loss, as of an optimizer in float16. It returns the weighted squared error of the
        target, summed and multiplied by the factor, and the gradient of each trainable weight of the network.
    """
    weighting = trained.metadata["settings"]["weighting"]
    network, layer, target = trained.network, trained.schedule_layer, find_target(trained.target)
    T, theirs = n_steps(trained.sched), {id(weight) for weight in layer.trainable_weights}
    others = [weight for weight in network.trainable_weights if id(weight) not in theirs]

    def gradients(
        inputs: Sequence[tf.Tensor], eps: tf.Tensor, factor: tf.Tensor, scale: Callable[[tf.Tensor], tf.Tensor]
    ):
        x_0, time, *label = inputs
        tau = (time[:, 0] * T - 1) / (T - 1)
        shape, slope = layer.shape_and_slope(tau)
        start, width = layer.ends()
        gamma, gamma_slope = start + width * shape, width * slope

        # The network, for which the schedule is as it is.
        a, b, alphabar = signal_and_noise(gamma)
        x_t, wanted = a * x_0 + b * eps, target.wanted(x_0, eps, a, b)
        weight = tf.cast(loss_weight(alphabar, trained.target, weighting, minimum=tf.minimum), tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x_t)
            output = network([x_t, time, *label], training=True)
            loss = factor * tf.reduce_sum(weight * sum_of_squares(output - wanted))
            scaled = scale(loss)
        *of_others, through_network = tape.gradient(scaled, [*others, x_t])

        # l of each image and its slopes by γ and γ'. How it depends on γ through the network follows from the gradient
        # above, as both are the same squared error, each times a factor of its image.
        with tf.GradientTape() as tape:
            tape.watch([gamma, gamma_slope])
            a, b, alphabar = signal_and_noise(gamma)
            snr = alphabar / (1 - alphabar)
            half = 0.5 * gamma_slope * tf.cast(snr / target.error(alphabar), tf.float32)
            direct = half * sum_of_squares(output - target.wanted(x_0, eps, a, b))
            ratio = tf.stop_gradient(half) / (weight * scale(factor))
            moved = tf.reduce_sum(through_network * (a * x_0 + b * eps), axis=(1, 2, 3)) * ratio
            bound = direct + moved - tf.stop_gradient(moved)
        by_gamma, by_slope = (factor * part for part in tape.gradient(bound, [gamma, gamma_slope]))

        with tf.GradientTape() as tape:
            shape, slope = layer.shape_and_slope(tau)
            start, width = layer.ends()
            fixed, fixed_slope, fixed_width = (tf.stop_gradient(part) for part in (shape, slope, width))
            ends = by_gamma * (start + width * fixed) + by_slope * width * fixed_slope
            variance = 2 * factor * bound * fixed_width * (by_gamma * shape + by_slope * slope)
            at_ends = ends_of_bound(x_0, eps, start, start + width, trained.levels)
            total = tf.reduce_sum(ends + variance) + factor * at_ends
            scaled = scale(total)
        of_layer = tape.gradient(scaled, layer.trainable_weights)
        both = zip([*others, *layer.trainable_weights], [*of_others, *of_layer], strict=True)
        found = {id(weight): gradient for weight, gradient in both}
        return loss, [found[id(weight)] for weight in network.trainable_weights]

    return gradients


def ends_of_bound(x_0: tf.Tensor, eps: tf.Tensor, first: tf.Tensor, last: tf.Tensor, levels: int = 255) -> tf.Tensor:
    """L_0 + L_T of all images, in nats: how well x_1 tells the pixels, and how far x_T is from noise.

    L_0 here decodes x_1 / √ᾱ_1 itself, as VDM does; the bound that is measured decodes what the network makes of it,
    and is less.
    """
    ends = tf.cast(tf.stack([first, last]), tf.float64)
    (signal, signal_T), (noise, noise_T) = tf.unstack(tf.sigmoid(-ends)), tf.unstack(tf.sigmoid(ends))
    sigma = tf.sqrt(noise / signal)
    x_1 = tf.cast(x_0, tf.float64) + sigma * tf.cast(eps, tf.float64)
    pixels = log_probability_of_pixel(x_0, x_1, sigma, levels)
    prior = 0.5 * (tf.cast(noise_T - 1 - tf.math.log(noise_T), tf.float32) + tf.cast(signal_T, tf.float32) * x_0**2)
    return tf.reduce_sum(prior - pixels)
