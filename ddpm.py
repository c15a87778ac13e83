"""The mathematics of denoising diffusion (DDPM): tables, forward noising, one reverse step, the bound.

Read it beside the slides: "Forward diffusion" is `ddpm_schedule` and `q_sample`, "Reverse diffusion" is `p_sample`.
Formulas only: no network, no files.

    x_0 = the clean image, values in [-1, 1]      t = 1 … T, one integer per image
    x_t = the image after t steps of noise        eps = the noise in it, N(0, 1)

Paper: Ho, Jain, Abbeel 2020 ("DDPM"), arXiv 2006.11239. Its equation numbers are quoted.
"""

import numpy as np
import tensorflow as tf


class Schedule(dict):
    """A dict of the float32 tables. Its attribute `alphabar` is ᾱ_t in float64, for the coefficients of samplers."""


def check_choice(name, value, choices):
    """Raises ValueError, naming the valid choices, if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def ddpm_schedule(beta1=1e-4, beta2=0.02, T=1000, schedule="linear", zero_snr=False):
    """The tables of a noise schedule (slides "Forward diffusion", DDPM section 4).

    Args:
        beta1, beta2: the variances β_1 and β_T of the first and the last step of the linear schedule, in (0, 1). The
            other schedules have none.
        T: number of steps, an integer.
        schedule: how ᾱ falls, `'linear'` (in β_t, as on the slides), `'cosine'` or `'sigmoid'`.
        zero_snr: whether ᾱ_T becomes 0, so that x_T is pure noise, for networks that predict x_0 or v.

    Returns:
        A `Schedule`, see `schedule_tables`.

    Raises:
        ValueError: if T is not an integer of at least 1, there is no such schedule, or, for the linear one, a β is
            outside (0, 1) or not a number, β_1 > β_T, T = 1 has two different β, or √ᾱ_T is too small for float32.
    """
    if not (T >= 1 and float(T).is_integer()):
        raise ValueError(f"T must be an integer of at least 1, got {T}")
    check_choice("schedule", schedule, SCHEDULES)
    alphabar = SCHEDULES[schedule](beta1, beta2, int(T))
    if alphabar[-1] < 1e-75:  # float32 ends at 1e-38
        raise ValueError(f"beta2 = {beta2} with T = {T} leaves nothing of the image in x_T; choose a smaller one")
    return schedule_tables(with_zero_snr(alphabar) if zero_snr else alphabar)


def linear_alphabar(beta1, beta2, T):
    """ᾱ_0 … ᾱ_T for β_t linear from β_1 to β_T, float64 (T + 1,)."""
    for name, beta in ("beta1", beta1), ("beta2", beta2):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {beta}")
    if beta1 > beta2:
        raise ValueError(f"beta1 must not exceed beta2, got beta1 = {beta1} and beta2 = {beta2}")
    if T == 1 and beta1 != beta2:
        raise ValueError(f"T = 1 has a single step, so beta1 = {beta1} and beta2 = {beta2} must be equal")
    return np.cumprod(np.concatenate([[1.0], 1 - np.linspace(beta1, beta2, T, dtype=np.float64)]))


def cosine_alphabar(_beta1, _beta2, T, offset=0.008):
    """ᾱ_t = cos²(π/2 (t/T + s)/(1 + s)), scaled to ᾱ_0 = 1 (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17)."""
    return clip_betas(np.cos(np.pi / 2 * (np.arange(T + 1) / T + offset) / (1 + offset)) ** 2)


def sigmoid_alphabar(_beta1, _beta2, T, start=-3.0, end=3.0, tau=1.0):
    """ᾱ_t = (σ(-u_t) - σ(-u_T)) / (σ(-u_0) - σ(-u_T)), u_t = (start + (end - start) t/T) / τ, with the logistic σ.

    Jabri, Fleet & Chen 2022, arXiv 2212.11972, algorithm 5.
    """
    sigmoid = 1 / (1 + np.exp((np.arange(T + 1) / T * (end - start) + start) / tau))
    return clip_betas(sigmoid - sigmoid[-1])


def clip_betas(alphabar, largest=0.999):
    """ᾱ scaled to ᾱ_0 = 1, with no β_t above `largest`, so that ᾱ_T stays above 0 (arXiv 2102.09672, section 3.2)."""
    beta_t = 1 - alphabar[1:] / alphabar[:-1]
    return np.cumprod(np.concatenate([[1.0], 1 - np.minimum(beta_t, largest)]))


SCHEDULES = {"linear": linear_alphabar, "cosine": cosine_alphabar, "sigmoid": sigmoid_alphabar}


def with_zero_snr(alphabar):
    """√ᾱ shifted and scaled so that ᾱ_T = 0 and ᾱ_1 stays (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(alphabar)
    scale = root[1] / (root[1] - root[-1]) if len(root) > 2 else 1.0
    return np.concatenate([[1.0], ((root[1:] - root[-1]) * scale) ** 2])


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
    return len(sched["alphabar_t"]) - 1


def network_time(t, sched):
    """t/T as networks take it: (batch,) int → (batch, 1) float32."""
    return tf.cast(t, tf.float32)[:, None] / n_steps(sched)


def _at(table, t, x):
    """`table[t]`, shaped and typed to multiply the images `x`: one number per image."""
    values = tf.gather(tf.cast(table, x.dtype), t)
    return tf.reshape(values, tf.concat([tf.shape(t), [1] * (len(x.shape) - 1)], axis=0))


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


def predict_score(t, eps, sched):
    """The score ∇ log q(x_t) that goes with the noise `eps` in x_t, -ε / √(1 - ᾱ_t), for t ≥ 1; like `eps`.

    Denoising score matching: Vincent 2011; Song & Ermon 2019, arXiv 1907.05600; for DDPM Luo 2022, arXiv 2208.11970.
    """
    return -eps / _at(sched["sqrtmab"], t, eps)


def add_to_score(x_0, t, eps, score, sched):
    """The estimates (x̂_0, ε̂) of x_t once `score` is added to its score -ε / √(1 - ᾱ_t) (ADM, arXiv 2105.05233, eq. 14).

    ε̂ falls by √(1 - ᾱ_t) `score`, and x̂_0 rises by (1 - ᾱ_t) / √ᾱ_t `score`, so that both still make up x_t. Shapes and
    types as in `q_sample`, t ≥ 1. Nothing is added where ᾱ_t = 0: x_t is pure noise there, whatever x_0 is.
    """
    sqrtab, sqrtmab = _at(sched["sqrtab"], t, eps), _at(sched["sqrtmab"], t, eps)
    score = tf.where(sqrtab > 0, score, 0)
    return x_0 + tf.math.divide_no_nan(sqrtmab**2, sqrtab) * score, eps - sqrtmab * score


def clip_estimate(x_t, t, x_0, sched):
    """An estimate of x_0 clipped to [-1, 1], and the noise that goes with it: (x̂₀, ε̂), so that both make up x_t."""
    x_0 = tf.clip_by_value(x_0, -1, 1)
    return x_0, predict_eps(x_t, t, x_0, sched)


def velocity(x_0, t, eps, sched):
    """v = √ᾱ_t ε - √(1 - ᾱ_t) x_0, a target between noise and image (Salimans & Ho 2022, arXiv 2202.00512).

    Shapes and dtypes as in `q_sample`.
    """
    return _at(sched["sqrtab"], t, x_0) * eps - _at(sched["sqrtmab"], t, x_0) * x_0


def estimates_from_velocity(x_t, t, v, sched):
    """(x̂_0, ε̂) that `v` stands for in `x_t`: a rotation, with no division at any t. Shapes as in `q_sample`."""
    sqrtab, sqrtmab = _at(sched["sqrtab"], t, x_t), _at(sched["sqrtmab"], t, x_t)
    return sqrtab * x_t - sqrtmab * v, sqrtmab * x_t + sqrtab * v


TARGETS = ("eps", "x0", "v")


def training_target(x_0, t, eps, sched, target="eps"):
    """What the network is trained to predict: ε, x_0 or v. Shapes and dtypes as in `q_sample`."""
    check_choice("target", target, TARGETS)
    if target == "eps":
        return eps
    return x_0 if target == "x0" else velocity(x_0, t, eps, sched)


def log_snr(alphabar):
    """log(ᾱ / (1 - ᾱ)), NumPy float64: ∞ for ᾱ = 1, the clean image, and -∞ for ᾱ = 0, pure noise."""
    with np.errstate(divide="ignore"):
        return np.log(alphabar) - np.log1p(-alphabar)


def log_snr_probabilities(sched, mean=0.0, scale=0.5, uniform=0.1):
    """Probabilities of t = 1 … T that concentrate training around log-SNR 0, float64 (T,).

    P(t) is the mass of a Laplace distribution of the log-SNR (Hang & Gu 2024, arXiv 2407.03297, table 1) between the
    midpoints to the neighbours of t; but a fraction `uniform` is spread evenly over all t, since samplers ask the
    network at t of which the Laplace distribution would draw none in a short run. As in the paper the loss is not
    divided by these probabilities: drawing some t more often is a re-weighting of the loss.
    """
    of_t = log_snr(sched.alphabar[1:])
    middle = (of_t[1:] + of_t[:-1]) / 2
    edges = np.concatenate([[np.inf], middle, [-np.inf]])
    below = 0.5 + 0.5 * np.sign(edges - mean) * -np.expm1(-np.abs(edges - mean) / scale)
    return (1 - uniform) * (below[:-1] - below[1:]) + uniform / len(of_t)


WEIGHTINGS = ("none", "min-snr", "snr")


def loss_weight(t, sched, target="eps", weighting="none", gamma=5.0):
    """The weight of the squared error of each image's target, (batch, 1, 1, 1) float32.

    With SNR = ᾱ_t / (1 - ᾱ_t), a squared error of x̂_0 is SNR times as large in ε̂ and SNR + 1 times in v̂. The weighted
    error is, for `'snr'` and `'min-snr'` whatever the target:
        `'none'`     that of the target as it is, weight 1; for ε the loss of the slides
        `'snr'`      SNR ‖x_0 - x̂_0‖² = ‖ε - ε̂‖²
        `'min-snr'`  min(SNR, γ) ‖x_0 - x̂_0‖² (Hang et al. 2023, arXiv 2303.09556)

    Args:
        t: (batch,) int, 1 … T.
    """
    check_choice("target", target, TARGETS)
    check_choice("weighting", weighting, WEIGHTINGS)
    ab = sched.alphabar
    if weighting == "none":
        weight = np.ones(len(ab))
    else:
        # Of ᾱ itself, as SNR is infinite at t = 0 and 0 at ᾱ_T = 0: SNR / (SNR + 1) = ᾱ, and so on.
        per_x_0 = np.where(ab < 1, ab / np.where(ab < 1, 1 - ab, 1), 0)
        wanted = np.minimum(per_x_0, gamma) if weighting == "min-snr" else per_x_0
        unit = {"eps": np.where(per_x_0 > 0, per_x_0, 1), "x0": 1, "v": per_x_0 + 1}[target]
        weight = wanted / unit
    return tf.gather(tf.constant(weight, tf.float32), t)[:, None, None, None]


def comparable_weight(t, sched):
    """What the squared error of ε̂ is multiplied by for a loss that means the same for every target.

    That loss is the smaller of the errors of x̂_0 and ε̂, which differ by the factor (1 - ᾱ_t) / ᾱ_t: min-SNR weights
    with γ = 1. Neither of them alone will do: at small t the ε̂ of a network that predicts x_0 is off by many times its
    size, at large t the x̂_0 of one that predicts ε, and that would be most of the mean over all t.

    Args:
        t: (n,) int, 1 … T.

    Returns:
        (n,) float32.
    """
    return loss_weight(t, sched, "eps", "min-snr", gamma=1.0)[:, 0, 0, 0]


def p_sample(x_t, t, eps, z, sched, variance="beta", clip=True):
    """One reverse step: x_{t-1} = μ_θ(x_t, t) + σ_t z (DDPM algorithm 2, slides "Reverse diffusion").

    Args:
        x_t: (batch, height, width, channels) float, images at step t.
        t: (batch,) int, 0 … T. At 0 the image is returned unchanged.
        eps: like `x_t`, the noise that the network predicts.
        z: like `x_t`, fresh noise from N(0, 1). It is not added at t = 1, the step that ends in x_0.
        sched: what `ddpm_schedule` returned.
        variance: σ_t², `'beta'` for β_t as on the slides, `'posterior'` for β̃_t. DDPM section 3.2: the first is
            optimal for data from N(0, 1), the second for data that are a single point. Or u, like `x_t`, of a network
            that has learned where between them it lies, see `log_variance_ratio`.
        clip: clips the estimate of x_0 that follows from `eps` to [-1, 1], as the code of the paper does; without it
            colours drift. False gives the formula of the slides, equation 11. Both agree where nothing is clipped.

    Returns:
        x_{t-1}, of the shape and type of `x_t`.

    Raises:
        ValueError: for another name of a `variance`.
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
        variance: `'beta'` for σ_t² = β_t, `'posterior'` for β̃_t, or u, like `x_t`, for β_t^u β̃_t^(1 - u), which a
            network can learn (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15).

    Raises:
        ValueError: for another `variance`.
    """
    if isinstance(variance, str):
        check_choice("variance", variance, VARIANCES)
        variance = float(variance == "beta")
    return _at(log_variance_range(sched), t, x_t) * variance


def log_variance_range(sched):
    """log(β_t / β̃_t), float64 (T + 1,), with β̃_2 in place of β̃_1, which is 0, as in the code of DDPM."""
    noise, of_t = 1 - sched.alphabar, np.zeros(len(sched.alphabar))
    of_t[2:] = np.log(noise[2:] / noise[1:-1])
    if len(of_t) > 2:  # T = 1 has β_1 alone
        of_t[1] = np.log(noise[2] / (1 - sched.alphabar[2] / sched.alphabar[1]))
    return of_t


def divergence(squared_distance, log_ratio):
    """The divergence of N(m, β̃) from N(m', β̃ e^log_ratio), in nats, for (m - m')² / β̃; elementwise."""
    return 0.5 * (squared_distance * tf.exp(-log_ratio) + tf.math.expm1(-log_ratio) + log_ratio)


def bound_prior(x_0, sched):
    """L_T of the bound on -log p(x_0): the divergence of x_T from the noise that sampling starts with.

    Slides "Bayesian inference, again, continued", DDPM equation 5.

    Args:
        x_0: (batch, height, width, channels) float, clean images in [-1, 1].

    Returns:
        (batch,) float32, bits per dimension.
    """
    mean_squared = float(sched["sqrtab"][-1]) ** 2 * tf.square(x_0)
    variance = float(sched["sqrtmab"][-1]) ** 2
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


def bound_decoder(x_0, x_1, estimate, sched, variance="beta"):
    """L_0 of the bound, -log p_θ(x_0 | x_1), a Gaussian discretised to the 256 values of a pixel (DDPM equation 13).

    Arguments and result as in `bound_term`; pixel p is given as p / 127.5 - 1. The variance is β_1, or β̃_2 in place of
    β̃_1, which is 0, as in the code of the paper.
    """
    t = tf.ones(tf.shape(x_0)[:1], tf.int32)
    smallest = sched["posterior_variance"][2] if n_steps(sched) > 1 else sched["beta_t"][1]
    sigma = np.sqrt(smallest) * tf.exp(log_variance_ratio(x_1, t, variance, sched) / 2)
    return _bits(-_log_probability_of_pixel(x_0, q_mean(estimate, x_1, t, sched), tf.cast(sigma, tf.float64)))


SHARE = 1e-3  # of a term of the bound in the hybrid error


def bound_weights(t, sched, target="eps"):
    """What `hybrid_error` needs of each image to know its term of the bound, (batch, 1, 1, 3) float32.

    log(β_t / β̃_t), k and d: with an error e of the target the mean of a reverse step is wrong by (μ_q - μ_θ)² / β̃_t =
    k e². d corrects that at t = 1, where the term is that of a pixel's bin, of variance (2/255)² / 12, not that of a
    Gaussian of variance β̃; else it is 0.

    Args:
        t: (batch,) int, 1 … T.
    """
    check_choice("target", target, TARGETS)
    ab, log_ratio = sched.alphabar, log_variance_range(sched)
    before = np.append(1.0, ab[:-1])
    mab, beta = np.append(1.0, 1 - ab[1:]), 1 - ab / before
    of_x_0 = {"eps": (1 - ab) / np.where(ab > 0, ab, 1), "x0": np.ones(len(ab)), "v": 1 - ab}[target]
    k = before * beta * np.exp(log_ratio) / mab**2 * of_x_0
    d = np.where(np.arange(len(ab)) == 1, (2 / 255) ** 2 / 12 * np.exp(log_ratio) / np.append(1.0, beta[1:]) - 1, 0)
    return tf.gather(tf.constant(np.stack([log_ratio, k, d], axis=1), tf.float32), t)[:, None, None, :]


def hybrid_error(squared_error, u, weight, log_ratio, k, d):
    """The error that teaches a network the variance u of a step too: `weight` e² and `SHARE` of its bound, in bits.

    L_simple + λ L_vlb of Nichol & Dhariwal 2021, arXiv 2102.09672, equation 16. As there the bound teaches u alone, and
    not what is predicted. Its share is a thousandth of the paper's for T = 1000: the layers before the output are the
    same for both, and a new network that predicts x_0 has a bound of thousands of bits. Optimizers like Adam scale the
    steps of those weights that only u has.

    Args:
        squared_error, u: (batch, height, width, channels) float32, e² of the target; see `log_variance_ratio`.
        weight, log_ratio, k, d: (batch, 1, 1, 1) float32, see `loss_weight` and `bound_weights`.
    """
    of_bound = divergence(k * tf.stop_gradient(squared_error) + d, log_ratio * u)
    return weight * squared_error + SHARE * of_bound / np.log(2)


def _log_probability_of_pixel(x, mean, sigma):
    """log of the mass of N(mean, σ²) in a pixel's bin: half-way to the neighbouring values, or to infinity."""
    x, mean = tf.cast(x, tf.float64), tf.cast(mean, tf.float64)
    infinity = tf.constant(np.inf, tf.float64)
    low = tf.where(x < -0.999, -infinity, (x - 1 / 255 - mean) / sigma)
    high = tf.where(x > 0.999, infinity, (x + 1 / 255 - mean) / sigma)
    upper = low + high > 0  # mirrored in the upper half, where erfc is small and differences stay exact
    low, high = tf.where(upper, -high, low), tf.where(upper, -low, high)
    mass = 0.5 * (tf.math.erfc(-high / np.sqrt(2)) - tf.math.erfc(-low / np.sqrt(2)))
    return tf.cast(tf.math.log(tf.maximum(mass, 1e-300)), tf.float32)


def _bits(nats):
    """Mean over the dimensions of each image, in bits."""
    return tf.reduce_mean(nats, axis=(1, 2, 3)) / np.log(2)


def check_finite(images):
    """Raises FloatingPointError if values of images, an array or a tensor, are NaN or infinite."""
    if not np.all(np.isfinite(images)):
        raise FloatingPointError(
            "the result has values that are NaN or infinite; the weights of the model, or guidance without clipping, "
            "are too large"
        )


def to_pixels(x_0):
    """Images in [-1, 1] as integers 0 … 255, rounded and clipped: an int16 array, as on the slides.

    Raises:
        FloatingPointError: for values that are NaN or infinite, which stand for no grey level.
    """
    check_finite(x_0)
    return np.clip(np.rint((np.asarray(x_0) + 1) * 127.5), 0, 255).astype("int16")
