"""What a training run starts with: a model, new or from its file, its settings, and its images."""

import copy
import math
import os
from collections.abc import Sequence

import keras
import numpy as np

import data
from data.classes import describe_classes
from data.pixels import as_size
from diffusion import model_file
from diffusion.layers import LearnedSchedule
from diffusion.model_file import TrainedModel
from diffusion.networks import NETWORKS
from diffusion.schedules import LEARNED_FROM, make_schedule
from diffusion.targets import TARGETS
from support import device, files, grids
from support.console import say
from training import advice, checkpoint
from training.images import Images, choose_data
from training.run_settings import DIFFUSION, NOTHING_DONE, choose_settings, complete
from training.saving import copied_epoch, copy_name
from training.settings import NETWORK_OPTIONS, PRESETS
from training.training_run import TrainingRun, copies_early, is_early_copy
from training.transfer import start_from
from training.workers import Workers


def prepare(options: dict, path: str, workers: Workers | None = None) -> tuple[TrainedModel, Images, Images | None]:
    """A compiled model with settings and progress in its metadata, its training images, and held-out ones or None.

    Args:
        options: what `settings.parse_options` returned.
        path: of the model's file.
        workers: those that train together, None for this process alone.

    Returns:
        The model, whose network's attribute `unsaved` says whether its file lacks settings that were typed, and both
        sets.

    Raises:
        ValueError, OSError: if something cannot be used, or contradicts the file.
    """
    resuming = os.path.exists(path)
    trained, metadata = None, {}
    if resuming:
        trained = checkpoint.open_for_training(path)
        metadata = trained.metadata
        complete(metadata, trained.learns_variance)
        if "init" in options:
            say(f"--init is ignored, as {path} exists and is resumed; choose another --model to start a new run")
    in_file = copy.deepcopy(metadata)
    settings = choose_settings(options, metadata, path, preset_for_this_machine)
    check_schedule(settings)
    check_network_options(settings, options)
    check_effects(settings, options)
    images, held_out = choose_data(options, settings, metadata, path)
    if not resuming:
        advise_on_schedule(settings)

    if resuming:
        model = trained.network
    else:
        keras.utils.set_random_seed(settings["seed"])
        model = build_network(settings, len(metadata["classes"]))
        metadata["progress"] = dict(NOTHING_DONE)
    metadata["diffusion"] = {name: settings[name] for name in DIFFUSION}
    metadata["sampling"] = {
        "sampler": settings["sampler"],
        "steps": settings["sample_steps"],
        "variance": settings["variance"],
    }
    metadata["settings"] = settings
    if images.labels is not None:
        now = settings["drop_label"] > 0 or bool(np.any(images.labels < 0))
        metadata["no_class"] = now or bool(metadata["progress"]["step"] and metadata["no_class"])
    model_file.metadata(model).update(metadata)
    model.unsaved = resuming and lacks_settings(in_file, metadata, options)

    if resuming:
        optimizer = model.optimizer
        optimizer.ema_momentum = settings["ema"]
    else:
        if "init" in options:
            start_from(model, options["init"])
        optimizer = build_optimizer(settings)
        optimizer.build(model.trainable_variables)

    xla = options.get("xla", device.has_gpu()) and not options.get("deterministic")
    sequential = bool(options.get("sequential"))
    parts = options.get("parts", 2 if sequential else 1 if xla else device.parts_for(settings["batch_size"]))
    parts = min(parts, settings["batch_size"])
    if workers and settings["batch_size"] < workers.count:
        raise ValueError(
            f"--batch-size {settings['batch_size']} leaves some of {workers.count} devices without images; choose a "
            "larger batch, or fewer devices"
        )
    how = settings["precision"], xla, parts, settings["ema_warmup"], sequential, workers
    checkpoint.compile_for_run(model, optimizer, *how)
    trained = model_file.describe(model)
    if copies_early(trained) and (workers is None or workers.first):
        check_early_copy(trained, files.weaker_name(path), typed_inputs(options))
    return trained, images, held_out


def lacks_settings(in_file: dict, metadata: dict, typed: dict) -> bool:
    """Whether the file lacks settings that were typed; what older files lack anyway does not count."""
    before, now = in_file["settings"], metadata["settings"]
    return metadata["data"] != in_file["data"] or any(now[name] != before[name] for name in typed.keys() & now.keys())


def typed_inputs(options: dict) -> list[str]:
    """The values of --init, --data and --validation: files, but also a fraction or the name of built-in drawings."""
    init = [model_file.locate(options["init"])] if "init" in options else []
    return init + [options[name] for name in ("data", "validation") if name in options]


def check_files(options: dict, path: str) -> None:
    """Checks, before anything is read, that the model can be written, and that no file of the run replaces an input.

    Files other than the model may fail to be written: training goes on without them.

    Raises:
        ValueError, OSError: if not.
    """
    inputs = typed_inputs(options)
    files.check_outputs([("--model", path)], inputs)
    outputs = [("the table", files.table_name(path)), ("the grid", files.grid_name(path))]
    if options.get("keep"):
        epochs = [epoch for epoch in map(copied_epoch, inputs) if epoch is not None]  # only those could be replaced
        outputs += [("the copy", copy_name(path, epoch)) for epoch in epochs]
    files.check_distinct(outputs, [*inputs, path, options.get("tensorboard")])


def check_early_copy(trained: TrainedModel, weaker: str, inputs: Sequence[str] = ()) -> None:
    """Raises ValueError or OSError if the early copy of a model cannot be saved, or would replace another file."""
    files.check_distinct([("the early copy", weaker)], inputs)
    files.check_writable(weaker)
    if os.path.exists(weaker) and not is_early_copy(weaker, trained):
        raise ValueError(
            f"{weaker} is not an early copy of this run, which would overwrite it; move it, or add --weaker-after 0"
        )


def build_optimizer(settings: dict) -> keras.optimizers.Optimizer:
    """Adam, or Muon without decay of weights and with Adam for the embedding of classes; with EMA weights."""
    how = {"learning_rate": settings["learning_rate"], "use_ema": True, "ema_momentum": settings["ema"]}
    if settings["optimizer"] == "muon":
        return keras.optimizers.Muon(weight_decay=None, adam_weight_decay=None, exclude_layers=["class_layer"], **how)
    return keras.optimizers.Adam(**how)


def check_effects(settings: dict, typed: dict) -> None:
    """Raises ValueError for typed options that would have no effect beside the others.

    A variance is stored for a later run with ddpm, so there is only a message that it has none now.
    """
    if "variance" in typed and settings["variance"] != "learned" and settings["sampler"] != "ddpm":
        say(f"--variance {settings['variance']} has no effect with --sampler {settings['sampler']}, only with ddpm")
    if settings["schedule"] == "learned":
        refuse_with_learned_schedule(settings)
    without_effect = {
        "beta1": settings["schedule"] != "linear" and "without --schedule linear",
        "beta2": settings["schedule"] != "linear" and "without --schedule linear",
        "t_sampling": settings["schedule"] == "learned" and "with --schedule learned",
        "weaker_after": settings["schedule"] == "learned" and "with --schedule learned",
        "drop_label": not settings["classes"] and "without --classes",
        "validate_every": settings["validation"] is None and "validation" not in typed and "without --validation",
    }
    if settings["network"] == "classifier":
        without_effect["drop_label"] = "with --network classifier"
        without_effect["weaker_after"] = typed.get("weaker_after") and "with --network classifier"
    for name, why in without_effect.items():
        if why and name in typed:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect {why}; change that, or omit {flag}")


def refuse_with_learned_schedule(settings: dict) -> None:
    """Raises ValueError for settings that a learned schedule cannot have."""
    wrong = {
        "--network classifier, which generates nothing": settings["network"] == "classifier",
        "--learn-variance, whose bound needs a fixed schedule": settings["learn_variance"],
        "--zero-snr, as it learns where the schedule ends": settings["zero_snr"],
        "--T 1, as a single step has no shape": settings["T"] == 1,
    }
    for why in (why for why, applies in wrong.items() if applies):
        raise ValueError(f"--schedule learned does not go with {why}; change one of them")


def check_network_options(settings: dict, typed: dict) -> None:
    """Raises ValueError for typed options that belong to another network."""
    if settings["network"] == "classifier" and not settings["classes"]:
        raise ValueError("--network classifier needs classes to learn; add --classes")
    if typed.get("variance") == "learned" and settings["network"] != "unet":
        raise ValueError("--variance learned requires --network unet; add that, or choose another variance")
    if settings["variance"] == "learned" and not settings["learn_variance"]:
        raise ValueError(
            "--variance learned needs a network that has learned it; choose another variance, or start a new run with "
            "--network unet --learn-variance"
        )
    grids.parse_shown(settings["show"], settings["channels"])
    for name in NETWORK_OPTIONS["unet"]:  # which takes all of them
        others = [network for network, options in NETWORK_OPTIONS.items() if name in options]
        if settings["network"] not in others and typed.get(name, False) is not False:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} requires --network {' or '.join(others)}; add that, or omit {flag}")


def build_network(settings: dict, classes: int) -> keras.Model:
    """A new network, for this number of classes."""
    shape, network = (*as_size(settings["image_size"]), settings["channels"]), settings["network"]
    own = {name: settings[name] for name in NETWORK_OPTIONS[network]}
    if "widths" in own:
        own["widths"] = [int(width) for width in own["widths"].split(",")]
    built = NETWORKS[network](shape, settings["n_feat"], classes, **own)
    if settings["schedule"] != "learned":
        return built
    return keras.Model(built.inputs, LearnedSchedule(*LEARNED_FROM, name="schedule")(built.outputs[0]))


def check_schedule(settings: dict) -> None:
    """Raises ValueError for a schedule that is invalid, or does not go with the target."""
    pure_noise = find_pure_noise(settings)
    if pure_noise and TARGETS[settings["target"]].needs_signal:
        others = " or ".join(f"--target {name}" for name in TARGETS if not TARGETS[name].needs_signal)
        raise ValueError(
            f"with {pure_noise} x_T is pure noise, from which --target {settings['target']} cannot give an image; "
            f"add {others}"
        )


def advise_on_schedule(settings: dict) -> None:
    """Says what is unusual in the schedule of a new model."""
    linear = settings["schedule"] == "linear" and not settings["zero_snr"]
    if linear and (sentence := advice.on_schedule(settings["beta1"], settings["beta2"], settings["T"])):
        say(sentence)
    if sentence := advice.on_weighting(find_pure_noise(settings), settings["weighting"]):
        say(sentence)


def find_pure_noise(settings: dict) -> str | None:
    """The option that makes x_T pure noise, if one does.

    Raises:
        ValueError: if the settings make no schedule.
    """
    sched = make_schedule(**{name: settings[name] for name in DIFFUSION if name != "target"})
    if sched.alphabar[-1] > 0:
        return None
    return "--zero-snr" if settings["zero_snr"] else f"--schedule {settings['schedule']}"


def preset_for_this_machine() -> str:
    """`slides` if its images and a large enough GPU are there, else `first`."""
    return "slides" if os.path.exists(data.CATS) and device.large_gpu() else "first"


def finished(run: TrainingRun) -> bool:
    """Whether all epochs are done; if so, saves new settings, and says how to train further."""
    epochs = run.progress["epoch"]
    if epochs < run.settings["n_epochs"]:
        return False
    if run.model.unsaved:
        with run.interruption.busy:
            checkpoint.save(run.model, run.path)
        say(f"the new settings are saved in {run.path}")
    grid = files.grid_name(run.path)
    if run.grids and (not os.path.exists(grid) or os.path.getmtime(grid) < os.path.getmtime(run.path)):
        run.make_grid(grid)  # the run was killed between its last save and the grid
    say(f"{run.all_done()}; train on with --n-epochs {2 * epochs}, or start a new run with --model NEW.keras")
    return True


def describe_images(trained: TrainedModel) -> str:
    """Shape, and range and precision unless they are the usual ones: `48×64×5, 0 … 1 in 65,535 steps`."""
    shape, scale = "×".join(map(str, trained.image_shape)), trained.scale
    if trained.levels == 255:
        return shape
    return f"{shape}, {scale.black:g} … {scale.white:g} in {scale.levels:,} steps"


def describe(trained: TrainedModel, path: str, labels: np.ndarray | None = None) -> None:
    """Prints what the run is about to do. `labels` belong to the training images."""
    model, metadata = trained.network, trained.metadata
    s, d, done = metadata["settings"], metadata["data"], metadata["progress"]
    steps = math.ceil(d["count"] / s["batch_size"])
    xla = ", XLA" if model.jit_compile else ""
    in_turn, parts = model.parts_in_turn, f", batches in {model.parts} parts" if model.parts > 1 else ""
    parts = f", batches in {in_turn} parts one after another" if in_turn > 1 else parts
    rate = f"learning rate {s['learning_rate']:g}" + (" falling to 0" if s["lr_decay"] == "cosine" else "")
    say(f"preset    {s['preset']} (--preset {'|'.join(PRESETS)}, --help for all options)")
    say(f"device    {device.name()}, {s['precision']}{xla}{parts}")
    if model.devices > 1:
        least, rest = divmod(s["batch_size"], model.devices)
        each = f"{least} or {least + 1}" if rest else str(least)
        say(f"devices   {model.devices} like this one, with {each} of the {s['batch_size']} images of a batch each")
        if sentence := advice.on_batch_size(s):
            say(sentence)
    if device.overlooks_gpu():
        say('TensorFlow cannot use the GPU here; try pip install "tensorflow[and-cuda]", and check nvidia-smi')
    if sentence := advice.on_precision(s["precision"], device.has_bfloat16()):
        say(sentence)
    say(f"data      {d['source']}: {d['count']:,} images, {describe_images(trained)}")
    if metadata["classes"]:
        say(f"classes   {describe_classes(labels, metadata['classes'])}")
        for sentence in advice.on_classes(labels, metadata["classes"]), model_file.warn_of_no_class(trained):
            if sentence:
                say(sentence)
    say(f"network   {s['network']}, n_feat {s['n_feat']}, {model.count_params():,} parameters")
    say(f"training  {s['n_epochs']} epochs of {steps:,} steps of {s['batch_size']} images, {rate}")
    if sentence := grids.describe_shown(trained.shown(), s["channels"]):
        say(f"grids     {sentence}")
    grid = [] if trained.is_classifier else [files.grid_name(path)]
    copy = [files.weaker_name(path)] if copies_early(trained) else []
    say(f"files     {', '.join([path, *grid, *copy])}")
    if grid and s["weaker_after"] and not copy and not is_early_copy(files.weaker_name(path), trained):
        say(f"no early copy will be saved: step {s['weaker_after']:,} (--weaker-after) is not among the steps to come")
    if done["step"]:
        say(f"resuming after {done['epoch']} epochs, {done['step']:,} steps")
    if device.has_gpu() and d["source"] == "drawings" and not os.path.exists(data.CATS):
        say("to train on the slides' cats with this GPU, prepare them with `python -m data cats`")
