"""Which recipe gives the best images for the same compute? Recipes are trained side by side, and measured alike.

    pip install -r requirements-optional.txt -r benchmarks/requirements.txt
    python benchmarks/recipes.py --data FOLDER --minutes 8                          screening: all recipes, hours
    python benchmarks/recipes.py --data FOLDER --minutes 25 --recipes unet-48,ddpp --seeds 0,1 --test HELD-OUT
    python benchmarks/recipes.py --data drawings --test new-drawings --epochs 37 --recipes naive,naive-v,unet-x0-minsnr

A recipe is a line of options of `diffusion_model.py`, named by what it starts from and what is changed, `unet-48-muon`,
see `BASES` and `CHANGES`. `ddpp` is denoising-diffusion-pytorch, the network of its README with its defaults, on the
same images. First the time of a training step is measured in turn, on an otherwise idle machine; then every row trains
for as many steps as fit into the minutes (ours for whole epochs, to the nearest one), so what else the machine does
later changes no result. With --epochs all of ours train for as many instead. Without --test
a tenth of the images are held out and compared with, so that other images are left to look at once, in the end.

Each of ours keeps a copy from a sixteenth of its steps; --guidance samples with that as its weaker model.

Rows are files in the folder --out, which belongs to one set of images and one precision; an interrupted row resumes,
and what is there is not measured again.
"""

import argparse
import glob
import json
import os
import statistics
import subprocess
import sys
import time

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
    "learned": "--variance learned",
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
CHANGED = [name for name, words in CHANGES.items() if f"{words} " not in BASES["unet"] + " "]  # what is not so already
SCREENED = ["slides", "unet", *(f"unet-{name}" for name in CHANGED)]
EARLY = 16  # the weaker copy is saved after one in so many of the steps
TIMED = 60  # steps of which the median is taken, after as many that warm up
PARTS = "bits,overfitting,kid,frechet,precision,recall,copies"


def words_of(recipe):
    """The options of `diffusion_model.py` for a recipe; KeyError for a part that is not known."""
    base, *changes = recipe.split("-")
    return [*BASES[base].split(), *(word for change in changes for word in CHANGES[change].split())]


class Timer:
    """Stands in for the `TrainingRun` of a training, to end it after some steps with the median of their seconds."""

    def __init__(self):
        self.seconds, self.last = [], time.perf_counter()

    def before_epoch(self):
        pass

    def after_epoch(self):
        pass

    def after_step(self, loss):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if len(self.seconds) == 2 * TIMED:
            raise StopIteration


def time_ours(options, path):
    """Seconds of a training step with these options of `diffusion_model.py`, and how many images they train on."""
    from support import device

    device.start_tensorflow(parts=device.MOST_PARTS)
    import diffusion_model
    from training.preparation import prepare
    from training.settings import parse_options

    model, images, _ = prepare(parse_options("", [*options, "--n-epochs", "1000"]), path)
    timer = Timer()
    try:
        diffusion_model.train(model, images, timer)
    except StopIteration:
        return statistics.median(timer.seconds[TIMED:]), len(images.images)


class Search:
    """The rows of a table, and the files that they are made from."""

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

    def options_of(self, name, seed):
        """The options of `diffusion_model.py` for a row."""
        o = self.options
        words = ["--data", o.data, "--image-size", str(o.image_size), "--precision", o.precision]
        words += [*words_of(name), "--seed", str(seed), "--sample-every", "0", "--sample-steps", "50"]
        return words + ([] if o.test else ["--validation", "0.1", "--validate-every", "1000"])

    def step_times(self):
        """Seconds of a step of each recipe and the number of its training images, from a file or measured in turn."""
        path = os.path.join(self.out, "steps.json")
        known = {}
        if os.path.exists(path):
            with open(path) as file:
                known = json.load(file)
        missing = [name for name in self.options.recipes if name not in known]
        found = {name: [] for name in missing}
        for _ in range(self.options.rounds if missing else 0):
            for name in missing:
                found[name].append(self.time_step(name))
        for name, turns in found.items():
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
            command = [__file__, "--time-step", self.path(name, 0, "-time.keras"), *self.options_of(name, 0)]
        text = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
        seconds, count = next(line.split()[1:] for line in text.splitlines() if line.startswith("RESULT"))
        return float(seconds), int(count)

    def image_folder(self, seed):
        """A folder of PNG files with the training images, which the peer reads: exactly those of our rows of a seed."""
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
        words = words_of(name)
        batch = int(words[len(words) - words[::-1].index("--batch-size")])
        seconds, count = times[name]
        epoch = -(-count // batch)
        epochs = max(1, round(60 * self.options.minutes / seconds / epoch))
        return ["--n-epochs", str(epochs), "--weaker-after", str(epochs * epoch // EARLY)]

    def run(self, *command):
        print("$ python", " ".join(command), flush=True)
        subprocess.run([sys.executable, *command], check=True, cwd=common.ROOT)

    def row(self, name, seed, times):
        """The numbers of a row: those in its file, or trains, samples and measures."""
        o = self.options
        guided = o.guidance != 1 and name != "ddpp"
        sampler = f"{o.sampler}{o.steps}" + f"-guidance{o.guidance:g}" * guided
        path = self.path(name, seed, f"-{sampler}-{os.path.basename(o.features)}{o.n_sample}.json")
        if os.path.exists(path):
            with open(path) as file:
                return json.load(file)
        of_model, more, parts = self.path(name, seed, ".keras"), [], PARTS
        if name == "ddpp":
            samples, parts = self.path(name, seed, ".npy"), "kid,frechet,precision,recall,copies"
            steps = round(60 * o.minutes / times[name][0])
            self.run(
                "benchmarks/ddpp.py",
                self.image_folder(seed),
                "--image-size",
                str(o.image_size),
                "--train",
                str(steps),
                "--seed",
                str(seed),
                "--n-sample",
                str(o.n_sample),
                "--steps",
                str(o.steps),
                "--out",
                samples,
            )
            of_model = sorted(glob.glob(os.path.join(self.out, f"*-{self.budget}-seed{seed}.keras")))[0]  # its metadata
            more = ["--samples", samples]
        else:
            command = ["diffusion_model.py", *self.options_of(name, seed), "--model", of_model]
            self.run(*command, *self.length(name, times))
        how = ["--sampler", o.sampler, "--steps", str(o.steps)]
        if o.sampler == "ddpm":
            how += ["--variance", "learned" if "learned" in name.split("-") else "posterior"]
        if guided:
            from support import files

            how += ["--weaker", files.weaker_name(of_model), "--guidance", str(o.guidance)]
        self.run(
            "evaluate.py",
            "--model",
            of_model,
            "--data",
            o.test or "held-out",
            "--n-sample",
            str(o.n_sample),
            "--count",
            str(o.n_sample),
            "--features",
            o.features,
            "--draws",
            "3",
            "--only",
            parts,
            "--out",
            path,
            *how,
            *more,
        )
        with open(path) as file:
            return json.load(file)


def cells(numbers):
    """The cells of a row of the table."""

    def value(begin, digits=3):
        row = next((row for key, row in numbers.items() if key.startswith(begin)), None)
        if not isinstance(row, dict):
            return ""
        error = f" ± {row['error']:.{digits}f}" if row.get("error") else ""
        return f"{row['value']:.{digits}f}{error}"

    features = numbers["features"]
    return (
        value("kid"),
        value("frechet", 0),
        value("precision", 2),
        value("recall", 2),
        value("bits/dim, learned, clipped", 2) or value("bits/dim, β, clipped", 2),
        value("loss, training / held-out", 2),
        value(f"nearness to training, {features}", 2),
        value(f"near-copies, {features}", 3),
    )


HEADING = (
    "recipe",
    "seed",
    "ms a step",
    "steps",
    "KID",
    "Fréchet",
    "precision",
    "recall",
    "bits/dim",
    "training / held-out loss",
    "nearness",
    "near-copies",
)


def main():
    if sys.argv[1:2] == ["--time-step"]:
        return print("RESULT", *time_ours(sys.argv[3:], sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, metavar="SOURCE", help="training images")
    add("--test", metavar="SOURCE", help="images to compare samples with, none of them trained on (a tenth of --data)")
    add("--recipes", metavar="NAMES", help="recipes, with commas between them (unet with each change alone)")
    add("--seeds", default="0", help="seeds, with commas between them: each is a row (0)")
    add("--minutes", type=float, default=8, help="of training (8)")
    add("--epochs", type=int, metavar="N", help="train as many epochs instead")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the layers of ours; bfloat16 where the processor has it (float32)",
    )
    add("--n-sample", type=int, default=1000, metavar="N", help="samples of each row, and images to compare (1000)")
    add(
        "--sampler",
        choices=("ddim", "ddpm", "dpm++"),
        default="ddim",
        help="ddpm is that with variance β̃, or learned (ddim)",
    )
    add("--steps", type=int, default=50, metavar="N", help="of the sampler (50)")
    add("--guidance", type=float, default=1.0, metavar="G", help="of ours by their weaker copies, see evaluate.py (1)")
    add("--features", default="efficientnet", help="see evaluate.py (efficientnet)")
    add("--rounds", type=int, default=3, help="turns of each in which the time of a step is measured (3)")
    add("--time-only", action="store_true", help="measure the times of steps, which later calls use, and stop")
    add("--out", default="recipes", metavar="FOLDER", help="where models, samples and numbers go (recipes)")
    options = parser.parse_args()
    options.recipes = options.recipes.split(",") if options.recipes else SCREENED + ["ddpp"] * (not options.epochs)
    options.recipes.sort(key=lambda name: name == "ddpp")  # last, as it is measured with the metadata of ours
    for name in options.recipes:
        try:
            if name != "ddpp":
                words_of(name)
        except KeyError:
            parser.error(
                f"unknown recipe {name}; there are ddpp, and {', '.join(BASES)} with changes of {', '.join(CHANGES)}"
            )
    if options.guidance != 1 and options.epochs:
        parser.error("--guidance needs --minutes: only such rows have a weaker copy")
    if "ddpp" in options.recipes and (options.epochs or options.recipes[0] == "ddpp"):
        parser.error("ddpp is compared at equal --minutes with one of our recipes at least; name one, omit --epochs")
    for name in "data", "test", "features", "out":  # rows are made in another folder
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
