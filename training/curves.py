"""Curves: a noise schedule, all of them beside each other, and the table of a run."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import numpy as np

from support.plots import BLUE, COLOURS, GREEN, GREY, VERMILION, two_axes, two_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ddpm import Schedule


def schedule(sched: Schedule, name: str = "linear") -> Figure:
    """The factors of image and noise in x_t, and the signal-to-noise ratio ᾱ_t / (1 - ᾱ_t), against t."""
    t = np.arange(len(sched["beta_t"]))
    figure, left, right = two_axes("t", "factor in $x_t$", "signal-to-noise ratio")
    left.plot(t, sched["sqrtab"], color=BLUE, label=r"image, $\sqrt{\bar\alpha_t}$")
    left.plot(t, sched["sqrtmab"], color=VERMILION, linestyle="--", label=r"noise, $\sqrt{1 - \bar\alpha_t}$")
    left.legend()
    right.axhline(1, color=GREY, linewidth=0.8)  # first, as a logarithmic axis needs a value above 0
    right.semilogy(t[1:], sched["sqrtab"][1:] ** 2 / sched["sqrtmab"][1:] ** 2, color=GREEN, label=name)
    right.legend()
    return figure


def schedules(T: int = 1000, learned: Schedule | None = None) -> Figure:
    """All noise schedules beside each other: ᾱ_t, and log(ᾱ_t / (1 - ᾱ_t)) (slide "Improvements").

    Dotted: with zero terminal SNR, where the log-SNR of t = T is -∞.

    Args:
        learned: what a model has made of the learned schedule; None for where that begins.
    """
    from diffusion.schedules import SCHEDULES, log_snr, make_schedule

    figure, left, right = two_axes("t", r"$\bar\alpha_t$", "log-SNR")
    t = np.arange(T + 1) if learned is None else np.arange(len(learned.alphabar))
    T = len(t) - 1
    for name, colour in zip(SCHEDULES, itertools.cycle(COLOURS), strict=False):
        for zero_snr, style in [(False, "-"), (True, ":")][: 1 if name == "learned" else 2]:
            ab = make_schedule(name, T=T, zero_snr=zero_snr).alphabar
            ab = learned.alphabar if name == "learned" and learned else ab
            known = np.isfinite(log_snr(ab))
            left.plot(t, ab, style, color=colour)
            right.plot(t[known], log_snr(ab[known]), style, color=colour, label=None if zero_snr else name)
    right.legend()
    return figure


def training(path: str) -> Figure:
    """Loss and learning rate of `model.csv` against the epoch."""
    from training import history

    if not os.path.exists(path):
        raise FileNotFoundError(no_table(path))
    rows = [dict(zip(history.COLUMNS, row, strict=True)) for row in history.read_rows(path)]
    if not rows:
        raise ValueError(f"{path} has no rows yet; train the model for at least one epoch")
    epochs = [int(row["epoch"]) for row in rows]
    loss, rate = ([float(row[name]) for row in rows] for name in ("loss_mean", "learning_rate"))
    figure, left, right = two_curves("epoch", epochs, ("loss", loss), ("learning rate", rate))
    left.set_yscale("log" if min(loss) > 0 else "linear")  # with a learned variance it may be negative
    right.set_ylim(0)
    return figure


def rate_distortion(t: np.ndarray, rate: np.ndarray, distortion: np.ndarray) -> Figure:
    """Error of x̂_0 against the bits received, and both against t; see `evaluation.likelihood.rate_and_distortion`."""
    figure, left, right = two_axes("t", "grey levels", "bits per dimension")
    left.set_xlabel("bits per dimension received")
    left.plot(rate, distortion, "o-", color=BLUE, markersize=3, label=r"error of $\hat x_0$")
    left.legend()
    right.plot(t, rate, color=VERMILION, label="received when $x_t$ is known")
    right.invert_xaxis()
    right.legend()
    return figure


def no_table(path: str) -> str:
    """The sentence to say when a model has no table of epochs."""
    return f"there is no table {path}, which training writes beside the model"
