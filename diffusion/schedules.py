"""Every way to make ᾱ_0 … ᾱ_T, the fraction of the image's variance that is left in x_t.

    sched = make_schedule("cosine", T=1000)

A schedule is a function of (T, beta1, beta2) in `SCHEDULES` that returns ᾱ, NumPy float64 (T + 1,), falling from 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # `ddpm` brings TensorFlow, which a parser of options does without
    from ddpm import Schedule


def linear(T: int, beta1: float, beta2: float) -> np.ndarray:
    """β_t linear from β_1 to β_T, as on the slides."""
    from ddpm import linear_alphabar

    return linear_alphabar(beta1, beta2, T)


def cosine(T: int, beta1: float, beta2: float, offset: float = 0.008) -> np.ndarray:
    """ᾱ_t = cos²(π/2 (t/T + s)/(1 + s)), scaled to ᾱ_0 = 1 (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17)."""
    return clip_betas(np.cos(np.pi / 2 * (np.arange(T + 1) / T + offset) / (1 + offset)) ** 2)


def sigmoid(T: int, beta1: float, beta2: float, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> np.ndarray:
    """ᾱ_t = (σ(-u_t) - σ(-u_T)) / (σ(-u_0) - σ(-u_T)), u_t = (start + (end - start) t/T) / τ, with the logistic σ.

    Jabri, Fleet & Chen 2022, arXiv 2212.11972, algorithm 5.
    """
    logistic = 1 / (1 + np.exp((np.arange(T + 1) / T * (end - start) + start) / tau))
    return clip_betas(logistic - logistic[-1])


def flow(T: int, beta1: float, beta2: float) -> np.ndarray:
    """ᾱ_t = (1 - s)² / ((1 - s)² + s²), s = t/T, so that x_t / (√ᾱ_t + √(1 - ᾱ_t)) is (1 - s) x_0 + s ε; ᾱ_T = 0.

    The straight path of flow matching (Lipman et al. 2022, arXiv 2210.02747) and rectified flow (Liu et al. 2022, arXiv
    2209.03003), scaled to keep variances.
    """
    s = np.arange(T + 1) / T
    return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


LEARNED_FROM = -13.3, 5.0  # γ = -log-SNR at t = 1 and t = T, as in VDM


def learned(T: int, beta1: float, beta2: float) -> np.ndarray:
    """Where a learned schedule begins: log-SNR falls as a straight line (VDM, Kingma et al. 2021, arXiv 2107.00630).

    What it has become is in the model's file, see `layers.LearnedSchedule`.
    """
    return np.append(1.0, 1 / (1 + np.exp(np.linspace(*LEARNED_FROM, T))))


SCHEDULES = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid, "flow": flow, "learned": learned}


def make_schedule(
    schedule: str = "linear", beta1: float = 1e-4, beta2: float = 0.02, T: int = 1000, zero_snr: bool = False
) -> Schedule:
    """The tables of any noise schedule, see `ddpm.schedule_tables`.

    Args:
        schedule: a name in `SCHEDULES`.
        beta1, beta2: the variances of the first and the last step of the linear schedule; the others have none.
        T: number of steps, an integer.
        zero_snr: whether ᾱ_T becomes 0, so that x_T is pure noise, for targets other than ε.

    Raises:
        ValueError: if there is no such schedule, or for what `ddpm.ddpm_schedule` refuses.
    """
    from ddpm import check_steps, schedule_tables
    from support.checks import check_choice

    check_choice("schedule", schedule, SCHEDULES)
    alphabar = SCHEDULES[schedule](check_steps(T), beta1, beta2)
    return schedule_tables(with_zero_snr(alphabar) if zero_snr else alphabar)


def clip_betas(alphabar: np.ndarray, largest: float = 0.999) -> np.ndarray:
    """ᾱ scaled to ᾱ_0 = 1, with no β_t above `largest`, so that ᾱ_T stays above 0 (arXiv 2102.09672, section 3.2)."""
    beta_t = 1 - alphabar[1:] / alphabar[:-1]
    return np.cumprod(np.concatenate([[1.0], 1 - np.minimum(beta_t, largest)]))


def with_zero_snr(alphabar: np.ndarray) -> np.ndarray:
    """√ᾱ shifted and scaled so that ᾱ_T = 0 and ᾱ_1 stays (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(alphabar)
    scale = root[1] / (root[1] - root[-1]) if len(root) > 2 else 1.0
    return np.concatenate([[1.0], ((root[1:] - root[-1]) * scale) ** 2])


def log_snr(alphabar: np.ndarray) -> np.ndarray:
    """log(ᾱ / (1 - ᾱ)), float64: ∞ for ᾱ = 1, the clean image, and -∞ for ᾱ = 0, pure noise."""
    with np.errstate(divide="ignore"):
        return np.log(alphabar) - np.log1p(-alphabar)
