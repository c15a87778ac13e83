"""The mathematics of denoising diffusion (DDPM): tables, forward noising, one reverse step, the bound.

Beside the slides: "Forward diffusion" is `ddpm_schedule` and `q_sample`, "Reverse diffusion" `p_sample`. Only formulas.

    x_0 = the clean image, values in [-1, 1]      t = 1 … T, one integer per image
    x_t = the image after t steps of noise        eps = the noise in it, N(0, 1)

Paper: Ho, Jain, Abbeel 2020 ("DDPM"), arXiv 2006.11239. Its equation numbers are quoted.
"""

import numpy as np
import tensorflow as tf

from support.checks import check_choice, check_finite


class Schedule(dict):
    """A dict of the float32 tables. Its attribute `alphabar` is ᾱ_t in float64, for the coefficients of samplers."""


def ddpm_schedule(beta1=1e-4, beta2=0.02, T=1000):
    """The tables of the slides' noise schedule, β_t linear in t ("Forward diffusion", DDPM section 4).

    Args:
        beta1, beta2: the variances β_1 and β_T of the first and the last step, in (0, 1).
        T: number of steps, an integer.

    Returns:
        A `Schedule`, see `schedule_tables`.

    Raises:
        ValueError: if T is not an integer of at least 1, a β is outside (0, 1) or not a number, β_1 > β_T, T = 1 has
            two different β, or √ᾱ_T is too small for float32.
    """
    return schedule_tables(linear_alphabar(beta1, beta2, check_steps(T)))


def check_steps(T):
    """T as an integer, or a ValueError."""
    if not (T >= 1 and float(T).is_integer()):
        raise ValueError(f"T must be an integer of at least 1, got {T}")
    return int(T)


def linear_alphabar(beta1, beta2, T):
    """ᾱ_0 … ᾱ_T for β_t linear from β_1 to β_T, float64 (T + 1,)."""
    for name, beta in ("beta1", beta1), ("beta2", beta2):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {beta}")
    if beta1 > beta2:
        raise ValueError(f"beta1 must not exceed beta2, got beta1 = {beta1} and beta2 = {beta2}")
    if T == 1 and beta1 != beta2:
        raise ValueError(f"T = 1 has a single step, so beta1 = {beta1} and beta2 = {beta2} must be equal")
    alphabar = np.cumprod(np.concatenate([[1.0], 1 - np.linspace(beta1, beta2, T, dtype=np.float64)]))
    if alphabar[-1] < 1e-75:  # float32 ends at 1e-38
        raise ValueError(
            f"beta2 = {beta2} with T = {T} leaves nothing of the image in x_T; choose a smaller beta2 or T"
        )
    return alphabar


def schedule_tables(alphabar):
    """All tables that follow from ᾱ, however it was chosen.

    Args:
        alphabar: float64 (T + 1,), ᾱ_0 = 1, falling, the fraction of the image's variance that is left in x_t.

    Returns:
        A `Schedule`, a dict of float32 arrays of length T + 1, computed in float64. Index t = 1 … T is the t-th step
        and index 0 the clean image, so that a step at t = 0 changes nothing. If ᾱ_T = 0, where no estimate of
        x_0 follows from ε, 1 / √α_T is given as 0:
        `beta_t`                β_t = 1 - ᾱ_t / ᾱ_{t-1}
        `alpha_t`               α_t = 1 - β_t
        `alphabar_t`            ᾱ_t = α_1 α_2 … α_t
        `sqrtab`                √ᾱ_t, the factor of the image in x_t
        `sqrtmab`               √(1 - ᾱ_t), the factor of the noise in x_t
        `oneover_sqrta`         1 / √α_t
        `mab_over_sqrtmab`      (1 - α_t) / √(1 - ᾱ_t)
        `sqrt_beta_t`           √β_t
        `posterior_variance`    β̃_t, the variance of q(x_{t-1} | x_t, x_0), equation 7
        `posterior_mean_coef1`  the factor of x_0 in the mean of that, equation 7
        `posterior_mean_coef2`  the factor of x_t in the mean of that, equation 7
    """
    previous = np.concatenate([[1.0], alphabar[:-1]])  # ᾱ_{t-1}
    alpha_t = alphabar / previous
    beta_t, mab = 1 - alpha_t, 1 - alphabar
    mab_safe = np.where(mab > 0, mab, 1)  # no division by zero at t = 0, where all numerators are 0

    coef1 = np.sqrt(previous) * beta_t / mab_safe
    coef2 = np.sqrt(alpha_t) * (1 - previous) / mab_safe
    coef2[0] = 1  # at t = 0 the image stays as it is

    tables = {
        "beta_t": beta_t,
        "alpha_t": alpha_t,
        "alphabar_t": alphabar,
        "sqrtab": np.sqrt(alphabar),
        "sqrtmab": np.sqrt(mab),
        "oneover_sqrta": np.where(alpha_t > 0, 1 / np.sqrt(np.where(alpha_t > 0, alpha_t, 1)), 0),
        "mab_over_sqrtmab": beta_t / np.sqrt(mab_safe),
        "sqrt_beta_t": np.sqrt(beta_t),
        "posterior_variance": beta_t * (1 - previous) / mab_safe,
        "posterior_mean_coef1": coef1,
        "posterior_mean_coef2": coef2,
    }
    sched = Schedule({name: table.astype(np.float32) for name, table in tables.items()})
    sched.alphabar = alphabar
    return sched


def n_steps(sched):
    """T, the number of steps of a schedule."""
    return sched["alphabar_t"].shape[0] - 1


def network_time(t, sched):
    """t/T as networks take it: (batch,) int → (batch, 1) float32."""
    return tf.cast(t, tf.float32)[:, None] / n_steps(sched)


def _at(table, t, x):
    """`table[t]`, shaped and typed to multiply the images `x`: one number per image."""
    values = tf.gather(tf.cast(table, x.dtype), t)
    return tf.reshape(values, tf.concat([tf.shape(t), [1] * (len(x.shape) - 1)], axis=0))


def signal_and_noise(t, x, sched):
    """(√ᾱ_t, √(1 - ᾱ_t)), the factors of image and noise in x_t, one of each per image, to multiply the images `x`."""
    return _at(sched["sqrtab"], t, x), _at(sched["sqrtmab"], t, x)


def q_sample(x_0, t, eps, sched):
    """Forward noising in one go, x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (DDPM equation 4).

    Args:
        x_0: (batch, height, width, channels) float, clean images in [-1, 1].
        t: (batch,) int, 0 … T. At 0 the image is returned unchanged.
        eps: like `x_0`, noise from N(0, 1).
        sched: what `ddpm_schedule` returned.

    Returns:
        x_t, of the shape and type of `x_0`.
    """
    return _at(sched["sqrtab"], t, x_0) * x_0 + _at(sched["sqrtmab"], t, x_0) * eps


def predict_x0(x_t, t, eps, sched):
    """The clean image if `eps` is the noise in `x_t`: `q_sample` solved for x_0 (DDPM equation 15).

    Shapes and dtypes as in `q_sample`. Not clipped: near t = T an error of `eps` is multiplied by √(1 - ᾱ_T) / √ᾱ_T,
    which is 157 for the slides' schedule.
    """
    return (x_t - _at(sched["sqrtmab"], t, x_t) * eps) / _at(sched["sqrtab"], t, x_t)


def predict_eps(x_t, t, x_0, sched):
    """The noise in `x_t` if `x_0` is the clean image: `q_sample` solved for ε. Shapes and types as there, t ≥ 1."""
    return (x_t - _at(sched["sqrtab"], t, x_t) * x_0) / _at(sched["sqrtmab"], t, x_t)


def p_sample(x_t, t, eps, z, sched, variance="beta", clip=True):
    """One reverse step: x_{t-1} = μ_θ(x_t, t) + σ_t z (DDPM algorithm 2, slides "Reverse diffusion").

    Args:
        x_t: (batch, height, width, channels) float, images at step t.
        t: (batch,) int, 0 … T. At 0 the image is returned unchanged.
        eps: like `x_t`, the noise that the network predicts.
        z: like `x_t`, fresh noise from N(0, 1). It is not added at t = 1, the step that ends in x_0.
        sched: what `ddpm_schedule` returned.
        variance: σ_t², `'beta'` for β_t as on the slides, `'posterior'` for β̃_t. DDPM section 3.2: the first is
            optimal for data from N(0, 1), the second for data that are a single point. Or log(σ_t² / β̃_t), a tensor.
        clip: clips the estimate of x_0 that follows from `eps` to [-1, 1], as the code of the paper does; without it
            colours drift. False gives the formula of the slides, equation 11. Both agree where nothing is clipped.

    Returns:
        x_{t-1}, of the shape and type of `x_t`.
    """
    sigma = _at(np.sqrt(sched["posterior_variance"]), t, x_t) * tf.exp(log_variance_ratio(x_t, t, variance, sched) / 2)
    return p_mean(x_t, t, eps, sched, clip) + sigma * z


def p_mean(x_t, t, eps, sched, clip=True):
    """μ_θ(x_t, t), the mean of a reverse step; arguments and result as in `p_sample`."""
    if clip:
        x_0 = tf.clip_by_value(predict_x0(x_t, t, eps, sched), -1, 1)
        return q_mean(x_0, x_t, t, sched)
    return _at(sched["oneover_sqrta"], t, x_t) * (x_t - _at(sched["mab_over_sqrtmab"], t, x_t) * eps)


def q_mean(x_0, x_t, t, sched):
    """μ_q(x_t, x_0), the mean of x_{t-1} given both (DDPM equation 7, slides "Getting the reverse probability")."""
    return _at(sched["posterior_mean_coef1"], t, x_t) * x_0 + _at(sched["posterior_mean_coef2"], t, x_t) * x_t


VARIANCES = ("beta", "posterior")


def log_variance_ratio(x_t, t, variance, sched):
    """log(σ_t² / β̃_t) of the variance σ_t² of a reverse step, one number per image or like `x_t`.

    Args:
        x_t: (batch, height, width, channels) float.
        t: (batch,) int, 0 … T.
        variance: `'beta'` for σ_t² = β_t, `'posterior'` for β̃_t, or this ratio itself, a tensor, of a network that has
            learned it (`diffusion/learned_variance.py`).

    Raises:
        ValueError: for another name.
    """
    if not isinstance(variance, str):
        return variance
    check_choice("variance", variance, VARIANCES)
    return _at(log_variance_range(sched), t, x_t) * float(variance == "beta")


def log_variance_range(sched):
    """log(β_t / β̃_t), float64 (T + 1,), with β̃_2 in place of β̃_1, which is 0, as in the code of DDPM."""
    noise, ratio = 1 - sched.alphabar, np.zeros(len(sched.alphabar))
    ratio[2:] = np.log(noise[2:] / noise[1:-1])
    if len(ratio) > 2:  # T = 1 has β_1 alone
        ratio[1] = np.log(noise[2] / (1 - sched.alphabar[2] / sched.alphabar[1]))
    return ratio


def divergence(squared_distance, log_ratio):
    """The divergence of N(m, β̃) from N(m', β̃ e^log_ratio), in nats, for (m - m')² / β̃; elementwise."""
    return 0.5 * (squared_distance * tf.exp(-log_ratio) + tf.math.expm1(-log_ratio) + log_ratio)


def bound_prior(x_0, sched):
    """L_T of the bound on -log p(x_0): the divergence of x_T from the noise that sampling starts with.

    Slides "Bayesian inference, again, continued", DDPM equation 5. Argument and result as in `bound_term`.
    """
    mean_squared, variance = float(sched["sqrtab"][-1]) ** 2 * tf.square(x_0), float(sched["sqrtmab"][-1]) ** 2
    return _bits(0.5 * (mean_squared + variance - 1 - np.log(variance)))


def bound_term(x_0, x_t, t, estimate, sched, variance="beta"):
    """L_{t-1} of the bound on -log p(x_0), for t > 1: the divergence of q(x_{t-1} | x_t, x_0) from p_θ(x_{t-1} | x_t).

    Both are Gaussians (DDPM equations 5 and 8, slides "Understanding the terms, continued").

    Args:
        x_0: (batch, height, width, channels) float, clean images in [-1, 1].
        x_t: like `x_0`, its noisy version.
        t: (batch,) int, 2 … T.
        estimate: like `x_0`, the estimate of it from x_t, clipped or not.
        sched, variance: see `p_sample`.

    Returns:
        (batch,) float32, bits per dimension.
    """
    sigma_q = np.sqrt(np.maximum(sched["posterior_variance"], 1e-30))  # 0 for t < 2, where this term is not defined
    distance = (q_mean(x_0, x_t, t, sched) - q_mean(estimate, x_t, t, sched)) / _at(sigma_q, t, x_t)
    return _bits(divergence(tf.square(distance), log_variance_ratio(x_t, t, variance, sched)))


def bound_decoder(x_0, x_1, estimate, sched, variance="beta", levels=255):
    """L_0 of the bound, -log p_θ(x_0 | x_1), a Gaussian discretised to the values of a pixel (DDPM equation 13).

    Arguments and result as in `bound_term`; pixels as from `from_pixels`. The variance is β_1, or β̃_2 in place of β̃_1,
    which is 0, as in the code of the paper.
    """
    t = tf.ones(tf.shape(x_0)[:1], tf.int32)
    smallest = sched["posterior_variance"][2] if n_steps(sched) > 1 else sched["beta_t"][1]
    sigma = np.sqrt(smallest) * tf.exp(log_variance_ratio(x_1, t, variance, sched) / 2)
    return _bits(-log_probability_of_pixel(x_0, q_mean(estimate, x_1, t, sched), tf.cast(sigma, tf.float64), levels))


def log_probability_of_pixel(x, mean, sigma, levels=255):
    """log of the mass of N(mean, σ²) in a pixel's bin: half-way to the neighbouring values, or to infinity."""
    x, mean = tf.cast(x, tf.float64), tf.cast(mean, tf.float64)
    infinity = tf.constant(np.inf, tf.float64)
    low = tf.where(x < 1 / levels - 1, -infinity, (x - 1 / levels - mean) / sigma)
    high = tf.where(x > 1 - 1 / levels, infinity, (x + 1 / levels - mean) / sigma)
    upper = low + high > 0  # mirrored in the upper half, where erfc is small and differences stay exact
    low, high = tf.where(upper, -high, low), tf.where(upper, -low, high)
    mass = 0.5 * (tf.math.erfc(-high / np.sqrt(2)) - tf.math.erfc(-low / np.sqrt(2)))
    return tf.cast(tf.math.log(tf.maximum(mass, 1e-300)), tf.float32)


def _bits(nats):
    """Mean over the dimensions of each image, in bits."""
    return tf.reduce_mean(nats, axis=(1, 2, 3)) / np.log(2)


def from_pixels(images, levels=255):
    """Images of integers 0 … levels as x_0, float32 in [-1, 1]; NumPy arrays. For 255 the inverse of `to_pixels`."""
    return images / np.float32(levels / 2) - 1


def to_pixels(x_0):
    """Images in [-1, 1] as integers 0 … 255, rounded and clipped: an int16 array, as on the slides.

    Raises:
        FloatingPointError: for values that are NaN or infinite, which stand for no grey level.
    """
    check_finite(x_0)
    return np.clip(np.rint((np.asarray(x_0) + 1) * 127.5), 0, 255).astype("int16")
