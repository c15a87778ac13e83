"""The options of one sampling run: `Sampling` names, checks and documents each of them once. No TensorFlow.

From it come the arguments of `my_sample`, the options of `reverse_diffusion.py` and `evaluate.py`, what a model's file
recommends, and the names of cached samples. Names come from the tables of what they choose.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from diffusion.samplers import SAMPLERS, SPACINGS, VARIANCES
from support import console
from support.checks import LARGEST, MOST, check_choice, check_number

OPERATIONS = ("mask", "downscale", "grey", "blur")  # what restoring undoes, and how: `measurement.py` has the functions
METHODS = ("mmps", "pigdm", "dps", "repaint")
MOST_CORRECTOR_STEPS = 4095  # whose draws of noise have a key, see `sampling.standard_normal`


def option(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    integers: tuple[int, int] | None = None,
    numbers: tuple[float, float] | None = None,
    **parser: Any,
) -> Any:
    """A field of `Sampling`: its default, what it means, what it may be, and how a parser reads it.

    Args:
        choices: the names of which it is one.
        integers, numbers: the smallest and the largest value.
        parser: further arguments of `ArgumentParser.add_argument`.
    """
    checks = {}
    if choices:
        checks, parser["choices"] = {check_choice: (choices,)}, tuple(choices)
    if integers:
        checks, parser["type"] = {check_number: (*integers, True)}, console.integer(*integers)
    if numbers:
        checks, parser["type"] = {check_number: numbers}, console.number(*numbers)
    return dataclasses.field(default=default, metadata={"help": help, "checks": checks, "parser": parser})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled. None stands for what the model's file recommends, or for what suits the sampler.

    Raises:
        ValueError: for an invalid value, and for options that contradict each other, see `CONTRADICTIONS`. What
            depends on the model is checked by `model_file.TrainedModel.choose` and `sampling.make_plan`.
    """

    sampler: str | None = option(
        None, "sampling method (the one that the model's file recommends, else ddpm)", choices=SAMPLERS
    )
    steps: int | None = option(
        None,
        "number of sampling steps, 1 to T; 20 to 50 are enough for ddim and dpm++ (the number that the model's file "
        "recommends, unless --sampler or --variance is given; else T)",
        integers=(1, MOST),
        metavar="N",
    )
    spacing: str | None = option(
        None,
        "how the steps are spaced; uniform: equally in t; quadratic: more densely near t = 0; logsnr: equally in "
        "log-SNR (logsnr for dpm++ and langevin, else uniform)",
        choices=SPACINGS,
    )
    eta: float = option(0.0, "noise that ddim adds, 0 for none to 1 for as much as ddpm (0)", numbers=(0, 1))
    variance: str | None = option(
        None,
        "noise variance of a step of ddpm; beta: as on the slides; posterior: better with few steps; learned: by the "
        "network (the one that the model's file recommends, unless --sampler is given; else beta)",
        choices=VARIANCES,
    )
    clip: bool = option(
        True,
        "clip estimates of the image to the range of pixel values (yes)",
        action=argparse.BooleanOptionalAction,
    )
    corrector: int = option(
        0,
        f"number of Langevin steps that follow each sampling step, 0 to {MOST_CORRECTOR_STEPS} (0)",
        integers=(0, MOST_CORRECTOR_STEPS),
        metavar="N",
    )
    snr: float = option(
        0.16,
        "size of the Langevin steps of --corrector, as a signal-to-noise ratio from 1e-6 to 10 (0.16)",
        numbers=(1e-6, 10),
        metavar="RATIO",
    )
    label: Any = option(
        None,
        "class to generate, by name or number from 0: one for all images or one for each; write --label=CLASS if it "
        "begins with a dash (images of all kinds)",
        nargs="+",
        action="extend",
        metavar="CLASS",
    )
    guidance: float = option(
        1.0,
        "guidance scale; towards a class: 0 ignores it, 1 follows it, 2 to 4 exaggerate it; away from --weaker: 1.5 to "
        "2 is usual (1)",
        numbers=(-LARGEST, LARGEST),
        metavar="G",
    )
    guidance_interval: tuple[int, int] | None = option(
        None,
        "first and last t at which --guidance applies, 0 to T; elsewhere it is 1 (all t)",
        type=console.integer(0),
        nargs=2,
        metavar=("FIRST", "LAST"),
    )
    classifier: Any = option(
        None,
        "classifier that guides towards --label, from diffusion_model.py --network classifier (none: the model itself)",
        metavar="FILE.keras",
    )
    weaker: Any = option(
        None,
        "smaller or less trained model of the same images, whose mistakes --guidance leads away from (none)",
        metavar="FILE.keras",
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                for check, more in field.metadata["checks"].items():
                    check(field.name, value, *more)
        for contradicts, sentence in CONTRADICTIONS:
            if contradicts(self):
                raise ValueError(sentence.format(**self.arguments()))

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
        words = {"sampler": self.sampler, "variance": self.variance}  # first, as in names of earlier versions
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


def _only_for_its_samplers(option):
    """A row of the table: the option changes nothing unless the sampler takes it."""
    *others, last = (name for name, sampler in SAMPLERS.items() if option in sampler.takes)
    only = f"{', '.join(others)} or {last}" if others else last
    return (
        lambda s: getattr(s, option) != getattr(Sampling, option) and s.sampler not in (None, *others, last),
        f"{option} applies only to sampler {only}, and the sampler is {{sampler}}; omit {option}, or choose {only}",
    )


# Options that contradict each other or would have no effect: when, and the sentence that says so.
CONTRADICTIONS: Iterable[tuple[Callable[[Sampling], bool], str]] = (
    _only_for_its_samplers("eta"),
    _only_for_its_samplers("variance"),
    _only_for_its_samplers("corrector"),
    (
        lambda s: s.snr != Sampling.snr and not s.corrector,
        "snr sets the size of the corrector's steps, and corrector is 0; add corrector, or omit snr",
    ),
    (
        lambda s: s.spacing and s.steps is None and (s.sampler or s.variance),
        "spacing {spacing} has no effect with all T steps; add steps, or omit spacing",
    ),
    (
        lambda s: s.guidance_interval is not None and s.guidance == 1,
        "guidance_interval has no effect with guidance 1; choose another guidance, or omit guidance_interval",
    ),
    (
        lambda s: s.classifier is not None and s.weaker is not None,
        "classifier and weaker cannot both guide; choose one",
    ),
    (
        lambda s: s.weaker is not None and s.guidance == 1,
        "weaker has no effect with guidance 1; choose a guidance such as 1.5, or omit weaker",
    ),
    (
        lambda s: s.classifier is not None and s.label is None,
        "classifier needs a label to guide towards; add label, or omit classifier",
    ),
    (
        lambda s: s.guidance != 1 and s.label is None and s.weaker is None,
        "guidance {guidance} has no effect without a label or a weaker model; add one, or omit guidance",
    ),
)
