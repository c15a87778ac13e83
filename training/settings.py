"""The options of `diffusion_model.py`: one table, from which the parser, the presets and `docs/options.md` are made.

python -m training.settings > docs/options.md
"""

import argparse
import dataclasses
from typing import Any

from data import named
from diffusion.samplers import SAMPLERS, VARIANCES
from diffusion.schedules import SCHEDULES
from diffusion.targets import T_SAMPLINGS, TARGETS, WEIGHTINGS
from support import console, device, launcher
from support.console import image_size, integer, integers, number

# Presets: what differs from the defaults of the table below, which are the slides'. See docs/evaluation.md.
BETTER = {"network": "unet", "target": "v", "schedule": "cosine", "lr_decay": "cosine", "variance": "posterior"}
BETTER |= {"n_epochs": None, "sample_every": None, "sample_steps": 50}
ON_CPU = {**BETTER, "image_size": 32, "patch": 2, "batch_size": 16, "learning_rate": 2e-3, "optimizer": "muon"}
ON_GPU = {**BETTER, "blocks": 2, "learning_rate": 3e-4, "precision": "bfloat16"}
# Of DDPM (arXiv 2006.11239, appendix B) for CIFAR-10, but for attention, which that has at 16×16 pixels only.
DDPM = {"network": "unet", "image_size": 32, "n_feat": 128, "widths": "1,2,2,2", "blocks": 2, "attention": 3}
DDPM |= {"dropout": 0.1, "batch_size": 128, "learning_rate": 2e-4, "warmup": 5000, "ema": 0.9999, "ema_warmup": False}
DDPM |= {"n_epochs": None, "sample_every": None}
PRESETS = {
    "first": {**ON_CPU, "target": "x0", "weighting": "min-snr", "n_feat": 32, "warmup": 50, "ema": 0.99},
    "cpu-hour": {**ON_CPU, "n_feat": 48, "warmup": 200, "ema": 0.999, "weaker_after": 3000},
    "cifar10": DDPM,
    "gpu-16gb": {**ON_GPU, "n_feat": 128, "warmup": 1000, "ema": 0.9995, "weaker_after": 6000},
    "slides": {},
}
SHAPE = ("widths", "blocks", "attention", "patch")
# What each network takes.
NETWORK_OPTIONS = {"naive": (), "unet": (*SHAPE, "learn_variance", "dropout"), "classifier": SHAPE}
FOR_GPU = ("gpu-16gb", "slides")  # which train on the slides' cats, where those are prepared
DATA = {"cifar10": "cifar10"}  # what a preset trains on; others on drawings
STEPS = {
    "first": 4100,
    "cpu-hour": 50_000,
    "gpu-16gb": 100_000,
    "cifar10": 800_000,
}  # of which an automatic number of epochs is made


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: as in Python and in the metadata, `n_feat`; on the command line it is `--n-feat`.
        help: what it means.
        value: its default, which a preset may replace.
        default: in words, where the default follows from something else.
        stored: whether it is a setting, which the file of a model keeps for later runs.
        fixed: whether that setting cannot change when a run resumes.
        how: further arguments of `ArgumentParser.add_argument`.
    """

    name: str
    help: str
    value: Any = None
    default: str = ""
    stored: bool = True
    fixed: bool = False
    how: dict = dataclasses.field(default_factory=dict)

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def default_of(self, preset: str) -> str:
        """Its default in a preset, in words."""
        value = PRESETS[preset].get(self.name)
        if isinstance(value, bool):
            return "yes" if value else "no"
        default = self.default.format(steps=f"about {STEPS[preset]:,} steps" if preset in STEPS else "")
        return default if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def help_with_default(self) -> str:
        """Its line in `--help`."""
        presets = {}
        for preset in PRESETS:
            presets.setdefault(self.default_of(preset), []).append(preset)
        if len(presets) == 1:
            (text,) = presets
            return f"{self.help} ({text})" if text else self.help
        return f"{self.help} ({'; '.join(', '.join(names) + f': {text}' for text, names in presets.items())})"


def setting(name: str, help: str, value: Any = None, **more: Any) -> Option:
    """An option that the file keeps; `value` is its default, unless the preset has another."""
    how = {key: more.pop(key) for key in ("type", "choices", "metavar", "action") if key in more}
    return Option(name, help, value, how=how, **more)


def run_option(name: str, help: str, default: str = "", **how: Any) -> Option:
    """An option of a single run, which no file keeps."""
    return Option(name, help, default=default, stored=False, how=how)


YES_OR_NO = argparse.BooleanOptionalAction
OPTIONS = (
    setting("preset", "set of defaults; first: minutes on 2 CPU cores; cpu-hour: an hour on 2 CPU cores; gpu-16gb: "
            "hours on a GPU with 16 GB or more; cifar10: the setting of DDPM's paper, days on a GPU; slides: the "
            "lecture's values, days on a GPU with 28 GB or more",
            default="slides if such a GPU and data/cats64.npz are there, else first", choices=tuple(PRESETS),
            fixed=True),
    run_option("data", f"images to train on: a folder, a .npy or .npz file, or a name: {named.describe()}",
               "drawings; for preset cifar10 that set; for slides and gpu-16gb prepared cats", metavar="SOURCE"),
    run_option("new_data", "resume with other images than the run started with, instead of reporting an error",
               action="store_true"),
    setting("image_size", "height and width to which images are resized, in pixels: one number for both, or "
            "HEIGHTxWIDTH; multiples of 32 with --network naive, else of --patch times 2^(L - 1) with L --widths", 64,
            fixed=True, type=image_size, metavar="PIXELS"),
    setting("channels", "channels of the images: 1 for grey, 3 for colour, or as many as the array or the files have, "
            "up to 64", 3, fixed=True, type=integer(1, 64), metavar="N"),
    setting("bit_depth", "bits of a pixel value: 8, or 16 to keep the precision of arrays and files that have more",
            default="16 for arrays that need it, else 8", fixed=True, type=int, choices=(8, 16)),
    setting("network", "naive: the U-Net of the slides; unet: a U-Net with the time embedding in every residual block "
            "and with attention; classifier: predicts the class of noisy images, to guide another model with "
            "reverse_diffusion.py --classifier", "naive", fixed=True, choices=tuple(NETWORK_OPTIONS)),
    setting("n_feat", "width of the network: its base number of channels, a multiple of 8", 512, fixed=True,
            type=integer(1), metavar="N"),
    setting("widths", "unet and classifier only: channels at each level in multiples of --n-feat, separated by commas; "
            "each level has half the height and width of the one before", "1,2,2", fixed=True, type=integers(1),
            metavar="N,N,…"),
    setting("blocks", "unet and classifier only: residual blocks per level, 1 to 64", 1, fixed=True, type=integer(1),
            metavar="N"),
    setting("attention", "unet and classifier only: number of levels with self-attention, from the lowest resolution "
            "up; 0 for none", 1, fixed=True, type=integer(0), metavar="N"),
    setting("patch", "unet and classifier only: side of the square patches that are processed as one pixel, in pixels",
            1, fixed=True, type=int, choices=(1, 2, 4)),
    setting("learn_variance", "unet only: also learn the variance of a reverse step, for --variance learned", False,
            fixed=True, action=YES_OR_NO),
    setting("dropout", "unet only: fraction of the features of each block that are set to 0 at random in training", 0.0,
            fixed=True, type=number(0, 0.95), metavar="FRACTION"),
    setting("classes", "train with the classes of the images: the sub-folders of a folder, the array labels of a .npz "
            "file, or the fur colours of drawings", False, fixed=True, action=YES_OR_NO),
    setting("drop_label", "with --classes: fraction of the images, 0 to 1, that are shown without their class; "
            "guidance needs more than 0", 0.1, type=number(0, 1), metavar="FRACTION"),
    setting("batch_size", "images per training step", 64, type=integer(1), metavar="N"),
    setting("n_epochs", "number of epochs in total, including earlier runs", 300, default="enough for {steps}",
            type=integer(1), metavar="N"),
    setting("optimizer", "adam, or muon: orthogonalised updates for weight matrices, Adam for the rest", "adam",
            fixed=True, choices=("adam", "muon")),
    setting("learning_rate", "learning rate of the optimizer after --warmup and before --lr-decay", 1e-3,
            type=number(1e-12), metavar="RATE"),
    setting("lr_decay", "none: constant learning rate; cosine: it falls to 0 over all epochs", "none",
            choices=("none", "cosine")),
    setting("warmup", "number of first steps over which the learning rate rises linearly from 0", 0, type=integer(0),
            metavar="STEPS"),
    setting("ema", "momentum of the EMA weights, the running average of the weights that images are sampled with, 0 to "
            "0.999999; 0 for no averaging", 0.999, type=number(0, 0.999999), metavar="MOMENTUM"),
    setting("ema_warmup", "let the momentum of the EMA weights rise to --ema in the first steps, so that they soon "
            "forget the initial weights", True, action=YES_OR_NO),
    setting("flip", "mirror images from left to right at random", default="yes for photographs; no for drawings and "
            "arrays", action=YES_OR_NO),
    setting("precision", "floating-point format that the layers compute in; weights stay float32", "float32",
            choices=("float32", "bfloat16", "float16")),
    setting("beta1", "--schedule linear: noise variance of the first step, between 0 and 1", 1e-4, fixed=True,
            type=number(0, 1), metavar="VARIANCE"),
    setting("beta2", "--schedule linear: noise variance of the last step, between 0 and 1", 0.02, fixed=True,
            type=number(0, 1), metavar="VARIANCE"),
    setting("T", "number of steps from image to noise", 1000, fixed=True, type=integer(1), metavar="STEPS"),
    setting("schedule", "noise schedule: linear in the variance of the steps, as on the slides; cosine; sigmoid; flow: "
            "the straight path of flow matching, which ends in pure noise; learned: beside the network", "linear",
            fixed=True, choices=tuple(SCHEDULES)),
    setting("zero_snr", "rescale the noise schedule so that x_T is pure noise (zero terminal SNR); not for --target "
            "eps", False, fixed=True, action=YES_OR_NO),
    setting("target", "what the network predicts; eps: the noise; x0: the image; v: a combination of both; flow: the "
            "noise minus the image", "eps", fixed=True, choices=tuple(TARGETS)),
    setting("weighting", "loss; none: squared error of the --target; snr: squared error of the image times the "
            "signal-to-noise ratio (SNR), which equals the squared error of the noise; min-snr: squared error of the "
            "image times min(SNR, 5)", "none", choices=WEIGHTINGS),
    setting("t_sampling", "how t is drawn in training; uniform: every t equally often; logsnr: mostly intermediate "
            "noise levels", "uniform", choices=T_SAMPLINGS),
    setting("seed", "seed of all random numbers, 0 to 2^32 - 1", 0, fixed=True, type=integer(0, 2**32 - 1),
            metavar="N"),
    run_option("model", "model file to write, or to resume if it exists", "model.keras", metavar="FILE.keras"),
    run_option("init", "trained model whose weights a new model starts from, in the layers that have the same shape; "
               "drawings is the pretrained one", "none", metavar="FILE.keras"),
    setting("validation", "held-out images to measure the loss on: a fraction of --data, such as 0.1, or a source of "
            "their own, as for --data", default="none", metavar="FRACTION|SOURCE"),
    setting("validate_every", "with --validation: epochs between measurements of the held-out loss", 1, type=integer(1),
            metavar="EPOCHS"),
    setting("sample_every", "epochs between grids of samples; 0 for one at the end only", 10,
            default="half of all epochs", type=integer(0), metavar="EPOCHS"),
    setting("show", "channels that grids show, counted from 1: one as grey, or three, separated by commas, as red, "
            "green and blue", default="all of 1 or 3 channels, else the first", type=integers(1), metavar="N,N,N"),
    setting("sampler", "sampler of the sample grids, and of reverse_diffusion.py by default", "ddpm",
            choices=tuple(name for name in SAMPLERS if name != "langevin")),
    setting("variance", "noise variance of a step of --sampler ddpm; beta: as on the slides; posterior: better with "
            "few steps; learned: with --learn-variance, whose default it is", "beta", choices=VARIANCES),
    setting("sample_steps", "number of steps of --sampler, at most T", default="T", type=integer(1), metavar="N"),
    setting("weaker_after", "number of steps after which an early copy NAME-weaker.keras is saved, for "
            "reverse_diffusion.py --weaker; 0 for none", 0, type=integer(0), metavar="STEPS"),
    run_option("save_every", "minutes between saves: the most that a power cut can cost", "10", type=number(0),
               metavar="MINUTES"),
    run_option("keep", "number of copies NAME-epoch0010.keras, … to keep: the newest, each of the first save after "
               "an epoch", "0", type=integer(0), metavar="K"),
    run_option("tensorboard", "folder for TensorBoard logs: scalars, sample grids and the graph", "none",
               metavar="DIR"),
    run_option("devices", launcher.help_on_devices("each batch"), "1", type=launcher.device_count, metavar="N|all"),
    run_option("xla", "compile the training step with XLA", "yes on a GPU, no on a CPU", action=YES_OR_NO),
    run_option("parts", "number of parts of a batch that are computed in parallel", "one for each CPU core, at most "
               f"{device.MOST_PARTS}; 1 on a GPU", type=integer(1), metavar="N"),
    run_option("sequential", "compute the --parts of a batch one after another (gradient accumulation), for a batch "
               "that does not fit in memory; the result is the same", "no", action="store_true"),
    run_option("deterministic", "on a GPU: make runs bit-identical, slower and without XLA; on a CPU they always are",
               action="store_true"),
)  # fmt: skip
SETTINGS = [option for option in OPTIONS if option.stored]
PRESETS = {name: {option.name: option.value for option in SETTINGS} | values for name, values in PRESETS.items()}


def parse_options(description: str | None, arguments: list[str] | None = None) -> dict:
    """The options that were typed, and `model`, `save_every` and `keep` in any case."""
    parser = console.Parser(description=description, argument_default=argparse.SUPPRESS)
    for option in OPTIONS:
        parser.add_argument(option.flag, help=option.help_with_default(), **option.how)
    parser.set_defaults(model="model.keras", save_every=10.0, keep=0)
    options = vars(parser.parse_args(arguments))
    if not options["model"].endswith(".keras"):
        parser.error(f"--model must end in .keras, got {options['model']}")
    return options


def options_page() -> str:
    """`docs/options.md`."""
    lines = [
        "# Options of `diffusion_model.py`",
        "",
        "Written by `python -m training.settings > docs/options.md`. A resumed run takes its settings from the model",
        "file, unless others are given on the command line. Those marked *fixed* cannot change: another value is an",
        "error. Options marked *run* are not stored in the file. Defaults: those of `--preset slides`; without a GPU",
        "those of `first` apply, see [presets](#presets).",
        "",
        "| option | meaning | default | |",
        "|---|---|---|---|",
    ]
    for option in OPTIONS:
        flag = f"{option.flag} {option.how['metavar']}" if "metavar" in option.how else option.flag
        flag += f" {'|'.join(map(str, option.how['choices']))}" if "choices" in option.how else ""
        flag = f"`{flag}`" + (f", `--no-{option.flag[2:]}`" if option.how.get("action") is YES_OR_NO else "")
        kind = "fixed" if option.fixed else "" if option.stored else "run"
        cells = flag, option.help, option.default_of("slides"), kind
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "## Presets",
        "",
        "The defaults above are those of the preset `slides`. The other presets differ in:",
        "",
        "| option | " + " | ".join(f"`{preset}`" for preset in PRESETS) + " |",
        "|---" * (1 + len(PRESETS)) + "|",
    ]
    for option in SETTINGS:
        if any(values[option.name] != option.value for values in PRESETS.values()):
            lines.append(f"| `{option.flag}` | " + " | ".join(map(option.default_of, PRESETS)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(options_page(), end="")
