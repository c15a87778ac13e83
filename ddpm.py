"""The mathematics of denoising diffusion (DDPM): tables, forward noising, reverse steps.

Read it beside the slides: "Forward diffusion" is `ddpm_schedule` and `q_sample`, "Reverse
diffusion" is `p_sample` and `reverse_process`. Nothing in here knows a network or a file.

    x_0 = the clean image, values in [-1, 1]      t = 1 … T, one whole number per image
    x_t = the image after t steps of noise        eps = the noise in it, N(0, 1)

Papers: Ho, Jain, Abbeel 2020 ("DDPM"), arXiv 2006.11239. Its equation numbers are quoted.

Every tf.function of the project goes without AutoGraph: it reads the source again when it traces, hours into a
run perhaps, and takes what somebody has written there meanwhile.
"""

import time

import numpy as np
import tensorflow as tf

QUICK = 0.025  # seconds for a step


def ddpm_schedule(beta1, beta2, T):
    """The tables of the linear noise schedule (slides "Forward diffusion", DDPM section 4).

    Args:
        beta1, beta2: the variances β_1 and β_T of the first and the last step, in (0, 1).
        T: number of steps, a whole number.

    Returns:
        A dict of float32 arrays of length T + 1, computed in float64. Index t = 1 … T is the
        t-th step and index 0 the clean image, so that a step at t = 0 changes nothing:
        `beta_t`                β_t, linear from β_1 to β_T
        `alpha_t`               α_t = 1 - β_t
        `alphabar_t`            ᾱ_t = α_1 α_2 … α_t
        `sqrtab`                √ᾱ_t, the share of the image in x_t
        `sqrtmab`               √(1 - ᾱ_t), the share of the noise in x_t
        `oneover_sqrta`         1 / √α_t
        `mab_over_sqrtmab`      (1 - α_t) / √(1 - ᾱ_t)
        `sqrt_beta_t`           √β_t
        `posterior_variance`    β̃_t, the variance of q(x_{t-1} | x_t, x_0), equation 7
        `posterior_mean_coef1`  the factor of x_0 in the mean of that, equation 7
        `posterior_mean_coef2`  the factor of x_t in the mean of that, equation 7

    Raises:
        ValueError: for a β outside (0, 1) or not a number, β_1 > β_T, a T that is not a whole
            number of at least 1, and T = 1 with two different β.
    """
    for name, beta in ("beta1", beta1), ("beta2", beta2):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {beta}")
    if beta1 > beta2:
        raise ValueError(f"beta1 must not exceed beta2, got beta1 = {beta1} and beta2 = {beta2}")
    if not (T >= 1 and float(T).is_integer()):
        raise ValueError(f"T must be a whole number of at least 1, got {T}")
    if T == 1 and beta1 != beta2:
        raise ValueError(f"T = 1 has a single step, so beta1 = {beta1} and beta2 = {beta2} must be equal")

    beta_t = np.concatenate([[0.0], np.linspace(beta1, beta2, int(T), dtype=np.float64)])
    alpha_t = 1 - beta_t
    alphabar_t = np.cumprod(alpha_t)
    mab = 1 - alphabar_t
    alphabar_before = np.concatenate([[1.0], alphabar_t[:-1]])  # ᾱ_{t-1}
    mab_safe = np.where(mab > 0, mab, 1)  # no division by zero at t = 0, where all numerators are 0

    coef1 = np.sqrt(alphabar_before) * beta_t / mab_safe
    coef2 = np.sqrt(alpha_t) * (1 - alphabar_before) / mab_safe
    coef2[0] = 1  # at t = 0 the image stays as it is

    tables = {
        "beta_t": beta_t,
        "alpha_t": alpha_t,
        "alphabar_t": alphabar_t,
        "sqrtab": np.sqrt(alphabar_t),
        "sqrtmab": np.sqrt(mab),
        "oneover_sqrta": 1 / np.sqrt(alpha_t),
        "mab_over_sqrtmab": beta_t / np.sqrt(mab_safe),
        "sqrt_beta_t": np.sqrt(beta_t),
        "posterior_variance": beta_t * (1 - alphabar_before) / mab_safe,
        "posterior_mean_coef1": coef1,
        "posterior_mean_coef2": coef2,
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _at(table, t, x):
    """`table[t]`, shaped and typed to multiply the images `x`: one number per image."""
    values = tf.gather(tf.cast(table, x.dtype), t)
    return tf.reshape(values, tf.concat([tf.shape(t), [1] * (len(x.shape) - 1)], axis=0))


def q_sample(x_0, t, eps, sched):
    """Forward noising in one go, x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (DDPM equation 4).

    Args:
        x_0: (batch, height, width, channels) float, clean images in [-1, 1].
        t: (batch,) int, 0 … T. At 0 the image comes back as it is.
        eps: like `x_0`, noise from N(0, 1).
        sched: what `ddpm_schedule` returned.

    Returns:
        x_t, of the shape and type of `x_0`.
    """
    return _at(sched["sqrtab"], t, x_0) * x_0 + _at(sched["sqrtmab"], t, x_0) * eps


def predict_x0(x_t, t, eps, sched):
    """The clean image that `x_t` must come from if `eps` is its noise: `q_sample` solved for x_0.

    Shapes and types as in `q_sample` (DDPM, text below equation 11). Not clipped: near t = T an error
    of `eps` is multiplied by √(1 - ᾱ_T) / √ᾱ_T, which is 157 for the slides' schedule.
    """
    return (x_t - _at(sched["sqrtmab"], t, x_t) * eps) / _at(sched["sqrtab"], t, x_t)


def p_sample(x_t, t, eps, z, sched, variance="beta", clip=True):
    """One reverse step: x_{t-1} = μ_θ(x_t, t) + σ_t z (DDPM algorithm 2, slides "Reverse diffusion").

    Args:
        x_t: (batch, height, width, channels) float, images at step t.
        t: (batch,) int, 0 … T. At 0 the image comes back as it is.
        eps: like `x_t`, the noise that the network sees in it.
        z: like `x_t`, fresh noise from N(0, 1). It is left out at t = 1, the step that ends in x_0.
        sched: what `ddpm_schedule` returned.
        variance: σ_t², `'beta'` for β_t as on the slides, `'posterior'` for β̃_t. DDPM section 3.2:
            the first is best for data that are N(0, 1), the second for data that are one point.
        clip: clips the estimate of x_0 that is hidden in `eps` to [-1, 1] before the mean is taken
            from it, as the code of the paper does; without it colours drift. False gives the
            formula of the slides, equation 11; the two are the same where nothing is clipped.

    Returns:
        x_{t-1}, of the shape and type of `x_t`.

    Raises:
        ValueError: for another `variance`.
    """
    return p_mean(x_t, t, eps, sched, clip) + _at(_sigma(sched, variance), t, x_t) * z


def p_mean(x_t, t, eps, sched, clip=True):
    """μ_θ(x_t, t), the mean of a reverse step; arguments and result as in `p_sample`."""
    if clip:
        x_0 = tf.clip_by_value(predict_x0(x_t, t, eps, sched), -1, 1)
        return q_mean(x_0, x_t, t, sched)
    return _at(sched["oneover_sqrta"], t, x_t) * (x_t - _at(sched["mab_over_sqrtmab"], t, x_t) * eps)


def q_mean(x_0, x_t, t, sched):
    """μ_q(x_t, x_0), the mean of x_{t-1} given both (DDPM equation 7, slides "Getting the reverse probability")."""
    return _at(sched["posterior_mean_coef1"], t, x_t) * x_0 + _at(sched["posterior_mean_coef2"], t, x_t) * x_t


def _sigma(sched, variance):
    """The table of σ_t, 0 at t = 1: the step that ends in x_0 adds no noise."""
    if variance == "beta":
        sigma = sched["sqrt_beta_t"]
    elif variance == "posterior":
        sigma = np.sqrt(sched["posterior_variance"])
    else:
        raise ValueError(f"variance must be 'beta' or 'posterior', got {variance!r}")
    return np.where(np.arange(len(sigma)) > 1, sigma, 0)


@tf.function(autograph=False)
def standard_normal(seed, t, index, image_shape):
    """Noise from N(0, 1) that belongs to a seed, a step and an image, wherever and whenever drawn.

    Args:
        seed, t: whole numbers; t below 2³².
        index: (batch,) int, the numbers of the images, below 2³¹; batch must be known. Image k gets
            the same noise in every batch.
        image_shape: (height, width, channels).

    Returns:
        (batch, height, width, channels) float32.
    """

    seed, t, index = tf.cast(seed, tf.int64), tf.cast(t, tf.int64), tf.cast(index, tf.int64)
    keys = tf.stack([tf.broadcast_to(seed, tf.shape(index)), index * 2**32 + t], axis=1)
    return tf.stack([tf.random.stateless_normal(image_shape, key) for key in tf.unstack(keys)])


def reverse_step(predict_eps, sched, variance="beta", clip=True, xla=False):
    """One reverse step with the network in it, traced once: the body of the slides' sampling loop.

    Args:
        predict_eps: the network, a function of [x_t, t/T] with t/T (batch, 1) float32 that
            returns ε_θ like x_t.
        sched, variance, clip: see `p_sample`.
        xla: whether XLA compiles it.

    Returns:
        A function (x_t, t, z) → x_{t-1} with x_t and z (batch, height, width, channels) float32 and
        t a scalar int tensor in 1 … T.
    """
    _sigma(sched, variance)  # so that a wrong variance is refused here, not from inside the compiler
    T = len(sched["beta_t"]) - 1

    @tf.function(jit_compile=xla, autograph=False)
    def step(x_t, t, z):
        t_ind = tf.repeat(t, tf.shape(x_t)[0])
        t_input = tf.cast(t_ind, tf.float32)[:, None] / T
        eps = predict_eps([x_t, t_input])
        return p_sample(x_t, t_ind, eps, z, sched, variance, clip)

    return step


def _several(step, noise, image_shape):
    """Two functions, each one call of TensorFlow: the noise x_T, and `count` reverse steps, x_t → x_{t - count}.

    The latest are cached in the step, as they take a second to trace, and live no longer than it does.
    """
    key = noise, image_shape
    if getattr(step, "several", (None,))[0] != key:
        draw = getattr(noise, "python_function", noise)  # a tf.function caches a trace of every batch size for ever

        @tf.function(autograph=False)
        def start(seed, t, index):
            return draw(seed, t, index, image_shape)

        @tf.function(autograph=False)
        def steps(x_t, t, count, seed, index):
            end = t - count

            def one(t, x_t):
                return t - 1, step(x_t, t, draw(seed, t, index, image_shape))

            _, x_t = tf.while_loop(lambda t, x_t: t > end, one, (t, x_t))
            return x_t

        step.several = key, (start, steps)
    return step.several[1]


def reverse_process(step, T, image_shape, seed, index, noise=standard_normal, at_once=10):
    """From noise to images (DDPM algorithm 2): yields (t, x_t) from t = T down to t = 0.

    Args:
        step: what `reverse_step` returned.
        T: the number of steps of its schedule.
        image_shape, seed, index: see `standard_normal`.
        noise: a function with its arguments and result, from which all noise comes.
        at_once: so many steps between two yields where steps are quick, as a loop that TensorFlow runs by itself saves
            a millisecond on each. 1 to see every x_t.
    """
    seed, (start_noise, steps) = tf.constant(seed, tf.int64), _several(step, noise, tuple(image_shape))
    x_t, t, quick = start_noise(seed, tf.constant(T + 1), index), T, False
    yield t, x_t
    while t > 0:
        start, count = time.perf_counter(), (t % at_once or at_once) if quick else 1
        x_t, t = steps(x_t, tf.constant(t), tf.constant(count), seed, index), t - count
        quick = time.perf_counter() - start < QUICK * count
        yield t, x_t


def bound_prior(x_0, sched):
    """L_T of the bound on -log p(x_0): how far x_T is from the noise that sampling starts with.

    Slides "Bayesian inference, again, continued", DDPM equation 5.

    Args:
        x_0: (batch, height, width, channels) float, clean images in [-1, 1].

    Returns:
        (batch,) float32, bits a dimension.
    """
    mean_squared = float(sched["sqrtab"][-1]) ** 2 * tf.square(x_0)
    variance = float(sched["sqrtmab"][-1]) ** 2
    return _bits(0.5 * (mean_squared + variance - 1 - np.log(variance)))


def bound_term(x_0, x_t, t, eps, sched, variance="beta", clip=True):
    """L_{t-1} of the bound on -log p(x_0), for t > 1: the divergence of q(x_{t-1} | x_t, x_0) from p_θ(x_{t-1} | x_t).

    Both are Gaussians (DDPM equations 5 and 8, slides "Understanding the terms, continued").

    Args:
        x_0: (batch, height, width, channels) float, clean images in [-1, 1].
        x_t: like `x_0`, its noisy version.
        t: (batch,) int, 2 … T.
        eps: like `x_0`, the noise that the network sees in x_t.
        sched, variance, clip: see `p_sample`.

    Returns:
        (batch,) float32, bits a dimension.
    """
    sigma_p = np.maximum(_sigma(sched, variance), 1e-30)  # 0 for t < 2, of which nobody asks
    ratio = np.sqrt(np.maximum(sched["posterior_variance"], 1e-30), dtype=np.float64) / sigma_p
    distance = (q_mean(x_0, x_t, t, sched) - p_mean(x_t, t, eps, sched, clip)) / _at(sigma_p, t, x_t)
    return _bits(0.5 * (tf.square(distance) + _at(ratio**2 - 1 - 2 * np.log(ratio), t, x_t)))


def bound_decoder(x_0, x_1, eps, sched, variance="beta", clip=True):
    """L_0 of the bound, -log p_θ(x_0 | x_1): what a Gaussian gives to each pixel's value out of 256 (DDPM equation 13).

    Arguments and result as in `bound_term`, with pixels of 256 values as p / 127.5 - 1. The Gaussian has the variance
    β_1, or instead of β̃_1, which is 0, β̃_2, as in the code of the paper.
    """
    t = tf.ones(tf.shape(x_0)[:1], tf.int32)
    beta = variance == "beta" or len(sched["beta_t"]) == 2
    sigma = np.sqrt(sched["beta_t"][1] if beta else sched["posterior_variance"][2])
    return _bits(-_log_probability_of_pixel(x_0, p_mean(x_1, t, eps, sched, clip), sigma))


def _log_probability_of_pixel(x, mean, sigma):
    """log of the share of N(mean, σ²) that falls to a pixel's value: half-way to its neighbours, or to infinity."""
    x, mean = tf.cast(x, tf.float64), tf.cast(mean, tf.float64)
    infinity = tf.constant(np.inf, tf.float64)
    low = tf.where(x < -0.999, -infinity, (x - 1 / 255 - mean) / sigma)
    high = tf.where(x > 0.999, infinity, (x + 1 / 255 - mean) / sigma)
    upper = low + high > 0  # in the upper half of the Gaussian mirror it: differences of small numbers stay exact
    low, high = tf.where(upper, -high, low), tf.where(upper, -low, high)
    share = 0.5 * (tf.math.erfc(-high / np.sqrt(2)) - tf.math.erfc(-low / np.sqrt(2)))
    return tf.cast(tf.math.log(tf.maximum(share, 1e-300)), tf.float32)


def _bits(nats):
    """The mean over the dimensions of each image, in bits."""
    return tf.reduce_mean(nats, axis=(1, 2, 3)) / np.log(2)


def to_pixels(x_0):
    """Images in [-1, 1] as whole numbers 0 … 255, rounded and clipped: an int16 array, as on the slides."""
    return np.clip(np.rint((np.asarray(x_0) + 1) * 127.5), 0, 255).astype("int16")
