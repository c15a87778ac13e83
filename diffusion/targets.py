"""What a network predicts, the estimates that follow from it, and how its squared error is weighted.

With a = √ᾱ_t and b = √(1 - ᾱ_t), x_t = a x_0 + b ε. A target is one more view of the same prediction: from x_t and any
of them follow x̂_0 and ε̂. Its functions take arrays or tensors, so that a table of t serves as well as a continuous t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion.schedules import log_snr
from support.checks import check_choice

Array = Any  # NumPy array or tensor


@dataclass(frozen=True)
class Target:
    """One thing that a network can be trained to predict.

    Attributes:
        wanted: (x_0, ε, a, b) → what is to be predicted.
        estimates: (x_t, the prediction, a, b) → (x̂_0, ε̂), not clipped.
        error: ᾱ, 0 < ᾱ < 1 → the squared error of the prediction for a squared error of 1 of x̂_0.
        needs_signal: whether it says nothing of the image where ᾱ_t = 0.
        inverted_from: √(1 - ᾱ_t) from which its ε̂ can be trusted on the way from an image to noise: where the network
            is first asked, and where x_t begins.
    """

    wanted: Callable[[Array, Array, Array, Array], Array]
    estimates: Callable[[Array, Array, Array, Array], tuple[Array, Array]]
    error: Callable[[Array], Array]
    needs_signal: bool = False
    inverted_from: tuple[float, float] = (0.0, 0.0)


TARGETS = {
    "eps": Target(  # the noise, as on the slides; DDPM equation 15
        wanted=lambda x_0, eps, a, b: eps,
        estimates=lambda x_t, eps, a, b: ((x_t - b * eps) / a, eps),
        error=lambda alphabar: alphabar / (1 - alphabar),
        needs_signal=True,
    ),
    "x0": Target(  # the image
        wanted=lambda x_0, eps, a, b: x_0,
        estimates=lambda x_t, x_0, a, b: (x_0, (x_t - a * x_0) / b),
        error=lambda alphabar: 1 + 0 * alphabar,
        # ε̂ divides the error of a nearly clean image by b. With these, noise has deviation 0.8 to 1 and leads back.
        inverted_from=(0.056, 0.13),
    ),
    "v": Target(  # between both, and no division at any t (Salimans & Ho 2022, arXiv 2202.00512)
        wanted=lambda x_0, eps, a, b: a * eps - b * x_0,
        estimates=lambda x_t, v, a, b: (a * x_t - b * v, b * x_t + a * v),
        error=lambda alphabar: alphabar / (1 - alphabar) + 1,
    ),
    # The velocity ε - x_0 of the straight path y = x_t / (a + b) = (1 - s) x_0 + s ε, s = b / (a + b), of flow matching
    # (Lipman et al. 2022, arXiv 2210.02747): x̂_0 = y - s û and ε̂ = y + (1 - s) û, whatever the schedule.
    "flow": Target(
        wanted=lambda x_0, eps, a, b: eps - x_0,
        estimates=lambda x_t, u, a, b: ((x_t - b * u) / (a + b), (x_t + a * u) / (a + b)),
        error=lambda alphabar: (1 + (alphabar / (1 - alphabar)) ** 0.5) ** 2,  # 1 / s²
    ),
}


def find_target(name: str) -> Target:
    """The target of that name. Raises ValueError, naming all, if there is none."""
    check_choice("target", name, TARGETS)
    return TARGETS[name]


WEIGHTINGS = ("none", "min-snr", "snr")


def loss_weights(alphabar: np.ndarray, target: str = "eps", weighting: str = "none", gamma: float = 5.0) -> np.ndarray:
    """The weights of the squared error of a target at every t, like `alphabar`, (T + 1,) float64 with ᾱ_0 = 1.

    With SNR = ᾱ_t / (1 - ᾱ_t), the weighted error is, for `'snr'` and `'min-snr'` whatever the target:
        `'none'`     the error of the target as it is, weight 1; for ε the loss of the slides
        `'snr'`      SNR ‖x_0 - x̂_0‖² = ‖ε - ε̂‖²
        `'min-snr'`  min(SNR, γ) ‖x_0 - x̂_0‖² (Hang et al. 2023, arXiv 2303.09556)

    Raises:
        ValueError: for another target or weighting.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    find_target(target)
    weights, known = np.zeros(len(alphabar)), (alphabar < 1) & (alphabar > 0)  # SNR is infinite at t = 0, 0 at ᾱ_T = 0
    if weighting == "none":
        return weights + 1
    weights[known] = loss_weight(alphabar[known], target, weighting, gamma)
    return weights


def loss_weight(
    alphabar: Array, target: str, weighting: str, gamma: float = 5.0, minimum: Callable = np.minimum
) -> Array:
    """The weight at 0 < ᾱ < 1, see `loss_weights`; arrays, or tensors with `minimum` a function of them."""
    if weighting == "none":
        return 1 + 0 * alphabar
    snr = alphabar / (1 - alphabar)
    return (minimum(snr, gamma) if weighting == "min-snr" else snr) / find_target(target).error(alphabar)


def comparable_weights(alphabar: np.ndarray) -> np.ndarray:
    """What the squared error of ε̂ is multiplied by at every t for a loss that means the same for every target.

    That loss is the smaller of the errors of x̂_0 and ε̂, which differ by the factor (1 - ᾱ_t) / ᾱ_t: min-SNR weights
    with γ = 1. Neither of them alone will do: at small t the ε̂ of a network that predicts x_0 is off by many times its
    size, at large t the x̂_0 of one that predicts ε, and that would be most of the mean over all t.
    """
    return loss_weights(alphabar, "eps", "min-snr", gamma=1.0)


T_SAMPLINGS = ("uniform", "logsnr")


def log_snr_probabilities(
    alphabar: np.ndarray, mean: float = 0.0, scale: float = 0.5, uniform: float = 0.1
) -> np.ndarray:
    """Probabilities of t = 1 … T that concentrate training around log-SNR 0, float64 (T,).

    P(t) is the mass of a Laplace distribution of the log-SNR (Hang & Gu 2024, arXiv 2407.03297, table 1) between the
    midpoints to the neighbours of t; but a fraction `uniform` is spread evenly over all t, since samplers ask the
    network at t that the Laplace distribution would never draw in a short run. As in the paper the loss is not divided
    by these probabilities: drawing some t more often is a re-weighting of the loss.
    """
    values = log_snr(alphabar[1:])
    middle = (values[1:] + values[:-1]) / 2
    edges = np.concatenate([[np.inf], middle, [-np.inf]])
    below = 0.5 + 0.5 * np.sign(edges - mean) * -np.expm1(-np.abs(edges - mean) / scale)
    return (1 - uniform) * (below[:-1] - below[1:]) + uniform / len(values)
