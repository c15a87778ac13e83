"""The options of sampling: what is checked, which contradict each other, and that all places agree on them."""

import dataclasses
import inspect
import itertools
import re

import pytest

import evaluate
import reverse_diffusion as rd
from diffusion.command_line import parse_sampling_options
from diffusion.options import Sampling
from diffusion.samplers import SAMPLERS, SPACINGS

# A value of each option that is not its default, with what it needs to mean something.
VALUES = {
    "sampler": "ddim",
    "steps": 10,
    "spacing": "quadratic",
    "eta": 0.5,
    "variance": "posterior",
    "clip": False,
    "corrector": 2,
    "snr": 0.1,
    "label": 0,
    "guidance": 2.0,
    "guidance_interval": (3, 9),
    "classifier": "c.keras",
    "weaker": "w.keras",
}
NEEDED = {
    "snr": {"corrector": 1},
    "guidance": {"label": 0},
    "guidance_interval": {"label": 0, "guidance": 2.0},
    "classifier": {"label": 0},
    "weaker": {"guidance": 2.0},
}
REFUSED = {  # pairs, each option with what it needs, that contradict each other whatever the file recommends
    ("sampler", "variance"),  # ddim has no variance
    ("spacing", "variance"),  # which makes the steps all T
    ("sampler", "spacing"),  # so does a sampler
    ("classifier", "weaker"),
}


def accepted(**options):
    try:
        Sampling(**options)
    except ValueError:
        return False
    return True


def test_pairs_of_options_contradict_each_other_as_listed():
    assert VALUES.keys() == {field.name for field in dataclasses.fields(Sampling)}
    refused = {
        (one, other)
        for one, other in itertools.combinations(VALUES, 2)
        if not accepted(**NEEDED.get(one, {}) | NEEDED.get(other, {}) | {name: VALUES[name] for name in (one, other)})
    }
    assert refused == REFUSED
    with pytest.raises(ValueError, match="eta applies only to sampler ddim"):
        Sampling(eta=0.5, variance="posterior").resolve()  # which makes the sampler ddpm


@pytest.mark.parametrize("name", VALUES)
def test_options_are_refused_without_what_they_need(name):
    needed = NEEDED.get(name, {})
    assert accepted(**{name: VALUES[name]}, **needed)
    for missing in needed:
        rest = {key: value for key, value in needed.items() if key != missing}
        assert (
            not accepted(**{name: VALUES[name]}, **rest)
            or (name, missing) == ("guidance", "label")
            and "weaker" in rest
        )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_take_only_their_own_options(sampler):
    own = {"ddpm": {"variance", "corrector"}, "ddim": {"eta", "corrector"}, "dpm++": {"corrector"}, "langevin": set()}
    for name in "variance", "eta", "corrector":
        assert accepted(sampler=sampler, **{name: VALUES[name]}) == (name in own[sampler]), name
    for spacing in SPACINGS:
        assert accepted(sampler=sampler, steps=5, spacing=spacing)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, dpm.., langevin, got 'euler'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": "5"}, "steps must be an integer of at least 1, got '5'"),
        ({"spacing": "cubic", "steps": 5}, "spacing must be one of uniform, quadratic, logsnr, got 'cubic'"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta must be a number from 0 to 1, got nan"),
        ({"variance": "small"}, "variance must be one of beta, posterior, learned, got 'small'"),
        ({"corrector": 4096}, "corrector must be an integer from 0 to 4095, got 4096"),
        ({"corrector": None}, "corrector must be an integer from 0 to 4095, got None"),
        ({"snr": 11}, "snr must be a number from 1e-06 to 10, got 11"),
        ({"guidance": float("inf")}, "guidance must be a finite number, got inf"),
        ({"guidance": 3.0}, "guidance 3.0 has no effect without a label or a weaker model"),
        ({"weaker": "w.keras"}, "weaker has no effect with guidance 1"),
        ({"classifier": "c.keras"}, "classifier needs a label"),
    ],
)
def test_invalid_values_get_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_what_is_not_asked_for_is_as_the_file_recommends():
    recommended = Sampling("ddpm", 50, variance="posterior")
    assert Sampling().resolve(recommended) == recommended
    assert Sampling(steps=20, clip=False).resolve(recommended) == dataclasses.replace(recommended, steps=20, clip=False)
    assert Sampling(sampler="ddpm").resolve(recommended) == Sampling("ddpm")
    assert Sampling(variance="beta").resolve(recommended) == Sampling("ddpm", variance="beta")
    assert Sampling("ddim", 9).resolve(recommended) == Sampling("ddim", 9)
    assert Sampling(spacing="quadratic").resolve(recommended).steps == 50
    assert Sampling().resolve() == Sampling("ddpm")
    with pytest.raises(ValueError, match="eta applies only to sampler ddim, and the sampler is ddpm"):
        Sampling(eta=0.5).resolve(recommended)
    with pytest.raises(ValueError, match="spacing quadratic has no effect with all T steps"):
        Sampling(spacing="quadratic").resolve()


def test_my_sample_and_scripts_have_all_options_and_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(Sampling)}
    parameters = inspect.signature(rd.my_sample).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
    assert all(re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", rd.my_sample.__doc__, re.MULTILINE) for name in defaults)
    assert Sampling.among(vars(parse_sampling_options(None, []))) == Sampling()
    assert Sampling.among(vars(evaluate.parse_options(["--data", "drawings"]))) == Sampling()
    typed = ["--sampler", "ddpm", "--steps", "9", "--no-clip", "--guidance-interval", "3", "9", "--guidance", "2"]
    asked = Sampling.among(vars(parse_sampling_options(None, [*typed, "--label", "cat", "dog"])))
    assert asked == Sampling("ddpm", 9, clip=False, label=["cat", "dog"], guidance=2, guidance_interval=[3, 9])


def test_an_entry_of_a_table_reaches_parsers_and_errors(run):
    """So a new schedule, target, sampler or spacing is code in one file."""
    process = run(
        "-c",
        "from diffusion import samplers, schedules, targets\n"
        "schedules.SCHEDULES['toy'], targets.TARGETS['toy'] = schedules.cosine, targets.TARGETS['v']\n"
        "samplers.SAMPLERS['toy'], samplers.SPACINGS['toy'] = samplers.SAMPLERS['ddim'], samplers.SPACINGS['uniform']\n"
        "import evaluate\n"
        "from diffusion.command_line import parse_sampling_options\n"
        "from diffusion.options import Sampling\n"
        "from training import settings\n"
        "typed = ['--schedule', 'toy', '--target', 'toy', '--sampler', 'toy']\n"
        "assert settings.parse_options('', typed)['target'] == 'toy'\n"
        "typed = ['--sampler', 'toy', '--spacing', 'toy', '--steps', '5', '--eta', '0.5']\n"
        "for options in parse_sampling_options(None, typed), evaluate.parse_options([*typed, '--data', 'drawings']):\n"
        "    assert Sampling.among(vars(options)).file_name() == 'toy-5-toy-eta0.5-'\n"
        "try:\n"
        "    Sampling('ddpm', eta=0.5)\n"
        "except ValueError as error:\n"
        "    print(error)\n",
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("eta applies only to sampler ddim or toy, and the sampler is ddpm; omit eta")
