"""Which recipe gives the best images for the same compute? Recipes are trained and measured in the same way.

    pip install -r requirements-optional.txt -r benchmarks/requirements.txt
    python benchmarks/recipes.py --data FOLDER --minutes 8                          screening: all recipes, hours
    python benchmarks/recipes.py --data FOLDER --minutes 25 --recipes unet-48,ddpp --seeds 0,1 --test HELD-OUT
    python benchmarks/recipes.py --data drawings --test new-drawings --epochs 37 --recipes naive,naive-v,unet-x0-minsnr

A recipe is a set of options of `diffusion_model.py`, named by a base and its changes, `unet-48-muon`: see `BASES` and
`CHANGES`. `ddpp` is denoising-diffusion-pytorch, the network of its README with its defaults, on the same images.

First the time of a training step is measured, for all recipes in turn, on an otherwise idle machine. Then every row
trains for as many steps as fit into the minutes (ours to the nearest whole epoch), so that other load on the machine no
longer changes a result. With --epochs all of ours train for that many epochs instead. Without --test a tenth of the
images is held out to compare samples with, so that other images can be kept for a single final test.

Each of ours saves a copy after a sixteenth of its steps, which --guidance uses as the weaker model.

Rows are cached in the folder --out, which belongs to one set of images and one precision: an interrupted row resumes,
and finished ones are not measured again.
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys

import common

COMMON = "--preset slides --batch-size 16 --lr-decay cosine"
SLIDES = COMMON + " --learning-rate 2e-3 --warmup 200 --ema 0.999 --n-feat 32"
BASES = {
    "slides": SLIDES,
    "unet": SLIDES + " --network unet --patch 2 --target v --schedule cosine",
    "naive": COMMON + " --learning-rate 4e-3 --warmup 50 --ema 0.99 --n-feat 16",  # the first run, the slides' network
}
CHANGES = {
    "48": "--n-feat 48",
    "64": "--n-feat 64",
    "patch1": "--patch 1",
    "blocks2": "--blocks 2",
    "wide": "--widths 1,2,4",
    "deep": "--widths 1,2,2,2",
    "attention2": "--attention 2",
    "muon": "--optimizer muon",
    "eps": "--target eps",
    "x0": "--target x0",
    "v": "--target v",
    "snr": "--weighting snr",
    "minsnr": "--weighting min-snr",
    "logsnr": "--t-sampling logsnr",
    "linear": "--schedule linear",
    "cosine": "--schedule cosine",
    "sigmoid": "--schedule sigmoid",
    "zerosnr": "--zero-snr",
    "flow": "--schedule flow --target flow",
    "flowtarget": "--target flow",
    "learnedschedule": "--schedule learned",
    "learned": "--learn-variance",
    "rate1": "--learning-rate 1e-3",
    "rate4": "--learning-rate 4e-3",
    "constant": "--lr-decay none",
    "warmup1000": "--warmup 1000",
    "ema0": "--ema 0",
    "ema99": "--ema 0.99",
    "ema999": "--ema 0.999",
    "ema9995": "--ema 0.9995",
    "noemawarmup": "--no-ema-warmup",
    "batch8": "--batch-size 8",
    "batch32": "--batch-size 32",
    "batch64": "--batch-size 64",
}
CHANGED = [name for name, words in CHANGES.items() if f"{words} " not in BASES["unet"] + " "]  # not in it already
SCREENED = ["slides", "unet", *(f"unet-{name}" for name in CHANGED)]
EARLY = 16  # the weaker copy is saved after this fraction of the steps, 1/16
PARTS = "bits,overfitting,kid,frechet,precision,recall,copies"
COLUMNS = {  # rows of an evaluation, by how they begin: the first that is there; and digits
    "KID": (("kid",), 3),
    "Fréchet": (("frechet",), 0),
    "precision": (("precision",), 2),
    "recall": (("recall",), 2),
    "bits/dim": (("bits/dim, learned, clipped", "bits/dim, β, clipped"), 2),
    "training / held-out loss": (("loss, training / held-out",), 2),
    "nearness": (("nearness to training",), 2),
    "near-copies": (("near-copies",), 3),
}
HEADING = ("recipe", "seed", "ms a step", "steps", *COLUMNS)


def recipe_options(recipe):
    """The options of `diffusion_model.py` for a recipe; KeyError for an unknown part."""
    base, *changes = recipe.split("-")
    return [*BASES[base].split(), *(word for change in changes for word in CHANGES[change].split())]


class Search:
    """The rows of a table, and the files in which they are cached."""

    def __init__(self, options):
        self.options, self.out = options, options.out
        self.budget = f"{options.epochs}epochs" if options.epochs else f"{options.minutes:g}min"
        os.makedirs(self.out, exist_ok=True)
        images = {name: getattr(options, name) for name in ("data", "test", "image_size", "precision")}
        path = os.path.join(self.out, "images.json")
        if not os.path.exists(path):
            with open(path, "w") as file:
                json.dump(images, file)
        with open(path) as file:
            known = json.load(file)
        if known != images:
            raise ValueError(f"--out {self.out} holds rows for {known}, not for {images}; choose another folder")

    def path(self, name, seed, ending):
        return os.path.join(self.out, f"{name}-{self.budget}-seed{seed}{ending}")

    def training_options(self, name, seed):
        """The options of `diffusion_model.py` for a row."""
        o = self.options
        words = ["--data", o.data, "--image-size", str(o.image_size), "--precision", o.precision]
        words += [*recipe_options(name), "--seed", str(seed), "--sample-every", "0", "--sample-steps", "50"]
        return words + ([] if o.test else ["--validation", "0.1", "--validate-every", "1000"])

    def step_times(self):
        """Seconds of a step and number of training images of each recipe, from a file or measured in turn."""
        path = os.path.join(self.out, "steps.json")
        known = {}
        if os.path.exists(path):
            with open(path) as file:
                known = json.load(file)
        missing = [name for name in self.options.recipes if name not in known]
        measured = {name: [] for name in missing}
        for _ in range(self.options.rounds if missing else 0):
            for name in missing:
                measured[name].append(self.time_step(name))
        for name, turns in measured.items():
            known[name] = [statistics.median(seconds for seconds, _ in turns), turns[0][1]]
            print(f"{name}: {1e3 * known[name][0]:.1f} ms a step", flush=True)
        with open(path, "w") as file:
            json.dump(known, file, indent=1)
        return known

    def time_step(self, name):
        if name == "ddpp":
            import ddpp

            command = [ddpp.__file__, "--time", self.image_folder(0), "--image-size", str(self.options.image_size)]
        else:
            command = [__file__, "--time-step", self.path(name, 0, "-time.keras"), *self.training_options(name, 0)]
        text = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
        seconds, count = next(line.split()[1:] for line in text.splitlines() if line.startswith("RESULT"))
        return float(seconds), int(count)

    def image_folder(self, seed):
        """A folder of PNG files for the peer, with exactly the training images of our rows of the same seed."""
        folder = os.path.join(self.out, "images" if self.options.test else f"images-seed{seed}")
        if not os.path.isdir(folder):
            from PIL import Image

            import data
            from data.splits import split_held_out

            images, _ = data.load_images(self.options.data, self.options.image_size, 3)
            images = images if self.options.test else split_held_out(images, 0.1, seed)[0]
            os.makedirs(folder + ".part", exist_ok=True)
            for k, image in enumerate(images):
                Image.fromarray(image).save(os.path.join(folder + ".part", f"{k:05d}.png"))
            os.rename(folder + ".part", folder)
        return folder

    def length(self, name, times):
        """The options for how long a row trains."""
        if self.options.epochs:
            return ["--n-epochs", str(self.options.epochs)]
        words = recipe_options(name)
        batch = int(words[len(words) - words[::-1].index("--batch-size")])
        seconds, count = times[name]
        epoch = -(-count // batch)
        epochs = max(1, round(60 * self.options.minutes / seconds / epoch))
        early = [] if "learned" in words else ["--weaker-after", str(epochs * epoch // EARLY)]  # its schedule differs
        return ["--n-epochs", str(epochs), *early]

    def row(self, name, seed, times):
        """The numbers of a row: from its file, or after training, sampling and measuring."""
        o = self.options
        guided = o.guidance != 1 and name != "ddpp"
        sampler = f"{o.sampler}{o.steps}" + f"-guidance{o.guidance:g}" * guided
        path = self.path(name, seed, f"-{sampler}-{os.path.basename(o.features)}{o.n_sample}.json")
        if not os.path.exists(path):
            options = self.train_peer(seed, times) if name == "ddpp" else self.train_ours(name, seed, times)
            options |= {"--data": o.test or "held-out", "--n-sample": o.n_sample, "--count": o.n_sample}
            options |= {"--features": o.features, "--draws": 3, "--sampler": o.sampler, "--steps": o.steps}
            if o.sampler == "ddpm":
                options["--variance"] = "learned" if "learned" in name.split("-") else "posterior"
            if guided:
                from support import files

                options |= {"--weaker": files.weaker_name(options["--model"]), "--guidance": o.guidance}
            run("evaluate.py", *as_words(options | {"--out": path}))
        with open(path) as file:
            return json.load(file)

    def train_ours(self, name, seed, times):
        """Trains a recipe; returns the options of `evaluate.py` that say what is measured."""
        model = self.path(name, seed, ".keras")
        words = [*self.training_options(name, seed), "--model", model, *self.length(name, times)]
        run("diffusion_model.py", *words)
        return {"--model": model, "--only": PARTS}

    def train_peer(self, seed, times):
        """Trains the peer and samples with it; returns the options of `evaluate.py` that say what is measured."""
        o, samples = self.options, self.path("ddpp", seed, ".npy")
        options = {
            "--image-size": o.image_size,
            "--train": round(60 * o.minutes / times["ddpp"][0]),
            "--seed": seed,
            "--n-sample": o.n_sample,
            "--steps": o.steps,
            "--out": samples,
        }
        run("benchmarks/ddpp.py", self.image_folder(seed), *as_words(options))
        ours = sorted(glob.glob(os.path.join(self.out, f"*-{self.budget}-seed{seed}.keras")))[0]  # for its metadata
        return {"--model": ours, "--only": "kid,frechet,precision,recall,copies", "--samples": samples}


def as_words(options):
    """The words of a command from a dict of options."""
    return [str(word) for option in options.items() for word in option]


def run(*command):
    """Prints a command of the project and runs it."""
    print("$ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=common.ROOT)


def cells(numbers):
    """The cells of `COLUMNS` from the numbers of an evaluation."""

    def cell(rows, digits):
        found = (numbers[key] for row in rows for key in numbers if key.startswith(row))
        row = next((row for row in found if isinstance(row, dict)), None)
        if row is None:
            return ""
        error = f" ± {row['error']:.{digits}f}" if row.get("error") else ""
        return f"{row['value']:.{digits}f}{error}"

    return [cell(rows, digits) for rows, digits in COLUMNS.values()]


def main():
    if sys.argv[1:2] == ["--time-step"]:
        return print("RESULT", *common.time_training(sys.argv[3:], sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="SOURCE", help="training images")
    add("--test", metavar="SOURCE", help="held-out images to compare samples with (a tenth of --data)")
    add("--recipes", metavar="NAMES", help="recipes, separated by commas (unet, and unet with one change each)")
    add("--seeds", default="0", help="seeds, separated by commas, each for a row of its own (0)")
    add("--minutes", type=float, default=8, help="training time of each row in minutes (8)")
    add("--epochs", type=int, metavar="N", help="train our recipes for N epochs instead of --minutes (none)")
    add("--image-size", type=int, default=32, metavar="PIXELS", help="height and width in pixels (32)")
    precisions = "float32", "bfloat16", "float16"
    add(
        "--precision",
        choices=precisions,
        default="float32",
        help="precision of our layers; bfloat16 only if the processor supports it (float32)",
    )
    add("--n-sample", type=int, default=1000, metavar="N", help="number of samples per row, and of real images (1000)")
    samplers = "ddim", "ddpm", "dpm++"
    add("--sampler", choices=samplers, default="ddim", help="sampler; ddpm with variance β̃, or a learned one (ddim)")
    add("--steps", type=int, default=50, metavar="N", help="number of sampling steps (50)")
    add(
        "--guidance",
        type=float,
        default=1.0,
        metavar="G",
        help="guidance scale of our models, away from their weaker copies; 1 for none (1)",
    )
    add("--features", default="efficientnet", help="feature extractor, as for evaluate.py (efficientnet)")
    add("--rounds", type=int, default=3, help="number of rounds in which the time of a step is measured (3)")
    add("--time-only", action="store_true", help="only measure the time of a step, and store it for later runs")
    add("--out", default="recipes", metavar="FOLDER", help="folder for models, samples and numbers (recipes)")
    options = parser.parse_args()
    options.recipes = options.recipes.split(",") if options.recipes else SCREENED + ["ddpp"] * (not options.epochs)
    options.recipes.sort(key=lambda name: name == "ddpp")  # last: its evaluation needs a model of ours
    for name in options.recipes:
        try:
            if name != "ddpp":
                recipe_options(name)
        except KeyError:
            known = f"ddpp, and {', '.join(BASES)} with changes of {', '.join(CHANGES)}"
            parser.error(f"unknown recipe {name}; there are {known}")
    if options.guidance != 1 and options.epochs:
        parser.error("--guidance needs --minutes: only such rows have a weaker copy")
    if "ddpp" in options.recipes and (options.epochs or options.recipes[0] == "ddpp"):
        parser.error("ddpp is compared at equal --minutes with one of our recipes at least; name one, omit --epochs")
    for name in "data", "test", "features", "out":  # scripts run in another folder
        value = getattr(options, name)
        if name == "out" or (value and os.path.exists(value)):
            setattr(options, name, os.path.abspath(value))
    try:
        search = Search(options)
    except ValueError as error:
        parser.error(str(error))
    times = {} if options.epochs else search.step_times()
    if options.time_only:
        return None
    rows = [HEADING]
    for name in options.recipes:
        for seed in map(int, options.seeds.split(",")):
            numbers = search.row(name, seed, times)
            ms = f"{1e3 * times[name][0]:.1f}" if times else ""
            steps = round(60 * options.minutes / times[name][0]) if name == "ddpp" else numbers["step"]
            rows.append((name, seed, ms, f"{steps:,}", *cells(numbers)))
    packages = ("tensorflow", "keras") + (("torch", "denoising-diffusion-pytorch") if "ddpp" in options.recipes else ())
    print(common.machine(*packages))
    common.table(
        f"{search.budget}, {options.image_size}×{options.image_size}, {options.n_sample} samples, "
        f"{options.sampler} {options.steps} steps, guidance {options.guidance:g}"
        f"{', ddpp with ddim and without' if 'ddpp' in options.recipes else ''}",
        rows,
    )
    return None


if __name__ == "__main__":
    main()
