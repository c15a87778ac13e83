"""The options of one sampling run: `Sampling` names, checks and documents each of them once. No TensorFlow.

From it come the arguments of `my_sample`, the options of `reverse_diffusion.py` and `evaluate.py`, what a model's file
recommends, and the names of cached samples. Names come from the tables of what they choose.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from diffusion.samplers import SAMPLERS, SPACINGS, VARIANCES
from support import console
from support.checks import LARGEST, check_choice, check_number

MOST_CORRECTOR_STEPS = 4095  # whose draws of noise have a key, see `sampling.standard_normal`


def number_option(default: Any, help: str, low: float, high: float = math.inf, **parser: Any) -> Any:
    """A field of `Sampling`: a number from `low` to `high`."""
    parser["type"] = console.number(low, high)
    return any_option(default, help, lambda name, value: check_number(name, value, low, high), **parser)


def integer_option(default: Any, help: str, low: int, high: int = 2**63 - 1, **parser: Any) -> Any:
    """A field of `Sampling`: an integer from `low` to `high`."""
    parser["type"] = console.integer(low, high)
    return any_option(default, help, lambda name, value: check_number(name, value, low, high, integer=True), **parser)


def choice_option(choices: Collection[str], help: str) -> Any:
    """A field of `Sampling`: one of a few names."""
    check = lambda name, value: check_choice(name, value, choices)  # noqa: E731
    return any_option(None, help, check, choices=tuple(choices))


def any_option(default: Any, help: str, check: Callable[[str, Any], None] = lambda *_: None, **parser: Any) -> Any:
    """A field of `Sampling`: its default, what it means, its check, and how a parser reads it."""
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "parser": parser})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled. None stands for what the model's file recommends, or for what suits the sampler.

    Raises:
        ValueError: for an invalid value, and for options that contradict each other, see `CONTRADICTIONS`. What
            depends on the model is checked by `model_file.TrainedModel.choose` and `sampling.make_plan`.
    """

    sampler: str | None = choice_option(
        SAMPLERS, "how images are sampled (what the model's file recommends, else ddpm)"
    )
    steps: int | None = integer_option(
        None,
        "number of steps, at most T; 20 to 50 do for ddim and dpm++ (what the file recommends with its sampler, else "
        "all)",
        1,
        metavar="N",
    )
    spacing: str | None = choice_option(SPACINGS, "how the steps are spaced (dpm++ and langevin logsnr, else uniform)")
    eta: float = number_option(0.0, "noise of ddim, 0 to 1 (0)", 0, 1)
    variance: str | None = choice_option(
        VARIANCES, "variance of the noise in a step of ddpm (what the file recommends with its sampler, else beta)"
    )
    clip: bool = any_option(
        True, "clip estimates of the image to the range of pixels (yes)", action=argparse.BooleanOptionalAction
    )
    corrector: int = integer_option(0, "Langevin steps after each step (0)", 0, MOST_CORRECTOR_STEPS, metavar="N")
    snr: float = number_option(0.16, "how large those are (0.16)", 1e-6, 10, metavar="RATIO")
    label: Any = any_option(
        None,
        "class of the images, by name or number from 0, or one for each; one that begins with a dash as --label=CLASS "
        "(all kinds)",
        nargs="+",
        action="extend",
        metavar="CLASS",
    )
    guidance: float = number_option(
        1.0,
        "how strongly the class guides: 0 ignores it, 1 follows it, 2 to 4 exaggerate it; or how far to lead away from "
        "--weaker, 1.5 to 2 (1)",
        -LARGEST,
        LARGEST,
        metavar="G",
    )
    guidance_interval: tuple[int, int] | None = any_option(
        None,
        "the first and the last t where --guidance holds, else 1 (all)",
        type=console.integer(0),
        nargs=2,
        metavar=("FIRST", "LAST"),
    )
    classifier: Any = any_option(
        None, "a model of --network classifier that guides to the class (none)", metavar="FILE.keras"
    )
    weaker: Any = any_option(
        None,
        "a smaller or less trained model of the same images, which guides away from its own mistakes (none)",
        metavar="FILE.keras",
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                field.metadata["check"](field.name, value)
        for contradicts, sentence in CONTRADICTIONS:
            if contradicts(self):
                raise ValueError(sentence(self))

    @classmethod
    def among(cls, named: Mapping[str, Any]) -> Sampling:
        """The options of sampling among all options of a script, or all arguments of a function."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: named[name] for name in names if name in named})

    def resolve(self, recommended: Sampling | None = None) -> Sampling:
        """These options with sampler, steps and variance filled in where they are None.

        Args:
            recommended: what the model's file recommends, or None. A file recommends nothing to those who choose a
                sampler or a variance: for them the sampler is ddpm, with all steps and variance β.

        Raises:
            ValueError: if an option contradicts what is filled in.
        """
        base = recommended if recommended and self.sampler is None and self.variance is None else Sampling("ddpm")
        missing = [name for name in ("sampler", "steps", "variance") if getattr(self, name) is None]
        return dataclasses.replace(self, **{name: getattr(base, name) for name in missing})

    def arguments(self) -> dict[str, Any]:
        """All options by name, as keyword arguments of `my_sample`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def guides(self) -> dict[str, Any]:
        """What guides: a model or its path by kind, or None."""
        return {"classifier": self.classifier, "weaker": self.weaker}

    def file_name(self) -> str:
        """What cached samples are named after: nothing for ddpm with all steps, `ddim-50-` for 50 steps of DDIM.

        The fingerprints of models that guide are not part of it.
        """
        words = dict(sampler=self.sampler, variance=self.variance)  # first, as in names of earlier versions
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in ("classifier", "weaker"):
                text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                words[field.name] = field.name + text if isinstance(field.default, int | float) else text
        if self.corrector:
            words["corrector"] += f"-{self.snr}"
        return "".join(
            f"{word}-" for name, word in words.items() if word not in (None, "ddpm", "beta") and name != "snr"
        )


def _takes(option):
    """A row of the table: `option` changes nothing unless the sampler takes it."""
    samplers = [name for name, sampler in SAMPLERS.items() if option in sampler.takes]
    default = Sampling.__dataclass_fields__[option].default
    only = " or ".join([", ".join(samplers[:-1]), samplers[-1]] if samplers[1:] else samplers)
    return (
        lambda s: getattr(s, option) != default and s.sampler not in (None, *samplers),
        lambda s: (
            f"{option} applies only to sampler {only}, and the sampler is {s.sampler}; omit {option}, or choose {only}"
        ),
    )


# Options that contradict each other or would have no effect: when, and the sentence that says so.
CONTRADICTIONS: Iterable[tuple[Callable[[Sampling], bool], Callable[[Sampling], str]]] = (
    _takes("eta"),
    _takes("variance"),
    _takes("corrector"),
    (
        lambda s: s.snr != Sampling.snr and not s.corrector,
        lambda s: "snr is the size of the corrector's steps, and there is no corrector; add one, or omit snr",
    ),
    (
        lambda s: s.spacing and s.steps is None and (s.sampler or s.variance),
        lambda s: f"spacing {s.spacing} needs a number of steps; add steps, or omit spacing",
    ),
    (
        lambda s: s.guidance_interval is not None and s.guidance == 1,
        lambda s: "guidance_interval has no effect with guidance 1; choose another guidance, or omit it",
    ),
    (
        lambda s: s.classifier is not None and s.weaker is not None,
        lambda s: "classifier and weaker both guide; choose one",
    ),
    (
        lambda s: s.weaker is not None and s.guidance == 1,
        lambda s: "with guidance 1 a weaker model has no effect; 1.5 to 2 is usual",
    ),
    (
        lambda s: s.classifier is not None and s.label is None,
        lambda s: "a classifier needs a label to guide to",
    ),
    (
        lambda s: s.guidance != 1 and s.label is None and s.weaker is None,
        lambda s: f"guidance {s.guidance} needs a label to guide to, or a weaker model to lead away from",
    ),
)


def add_sampling_options(parser: argparse.ArgumentParser, omit: Collection[str] = ()) -> None:
    """Adds the options of `Sampling` to a parser, but for those that the script has no use for."""
    for field in dataclasses.fields(Sampling):
        if field.name not in omit:
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, default=field.default, help=field.metadata["help"], **field.metadata["parser"])
