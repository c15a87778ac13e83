"""The benchmarks start, and the networks that they compare with are the same."""

import argparse
import glob
import os

import numpy as np
import pytest
from conftest import ROOT, TINY, save_tiny_images

SCRIPTS = sorted(set(glob.glob("*.py", root_dir=os.path.join(ROOT, "benchmarks"))) - {"common.py", "peer.py"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_question_and_the_command(run, script):
    process = run(os.path.join(ROOT, "benchmarks", script), "--help")
    assert process.returncode == 0, process.stderr
    assert f"python benchmarks/{script}" in process.stdout


def test_benchmarks_are_short_and_formatted():
    for path in glob.glob(os.path.join(ROOT, "benchmarks", "**", "*.py"), recursive=True):
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        assert len(lines) <= 330 and not any("# fmt:" in line for line in lines), path


def test_a_timed_training_goes_on_into_further_epochs(tiny_networks, tmp_path, monkeypatch):
    import common

    monkeypatch.chdir(tmp_path)
    save_tiny_images()
    monkeypatch.setattr(common, "TIMED_STEPS", 3)  # after 3 that warm up, and an epoch has 2
    seconds, count = common.time_training(TINY, "model.keras")
    assert 0 < seconds < 10 and count == 17


def test_recipes_are_options_and_train_as_long_as_their_minutes(tmp_path):
    import recipes

    from training import run_settings, settings

    options = argparse.Namespace(
        data="drawings",
        test=None,
        out=str(tmp_path),
        image_size=32,
        minutes=10,
        epochs=None,
        seeds="0",
        precision="bfloat16",
    )
    search = recipes.Search(options)
    for name in *recipes.SCREENED, "naive", "naive-v-zerosnr", "unet-48-muon":
        typed = settings.parse_options("", search.training_options(name, 3))
        chosen = run_settings.choose_settings(typed, {}, "", None)
        assert (
            chosen["precision"] == "bfloat16"
            and chosen["seed"] == 3
            and chosen["preset"] == "slides"
            and chosen["validation"] == "0.1"
        )
        assert (chosen["network"] == "unet") == name.startswith("unet")
    assert (chosen["n_feat"], chosen["optimizer"], chosen["target"]) == (48, "muon", "v")
    # 10 minutes are 6,000 steps of 0.1 s, and 9,000 images are 563 batches of 16, or 282 of 32
    times = {"unet": (0.1, 9000), "unet-batch32": (0.1, 9000)}
    for name, batches in ("unet", 563), ("unet-batch32", 282):
        chosen = settings.parse_options("", search.length(name, times))
        assert chosen["n_epochs"] == round(6000 / batches)
        assert chosen["weaker_after"] == chosen["n_epochs"] * batches // 16
    options.epochs = 7
    assert search.length("unet", {}) == ["--n-epochs", "7"]


@pytest.mark.parametrize("name, guided", [("unet-learned", True), ("ddpp", False)])
def test_a_row_trains_then_evaluates_its_own_samples(monkeypatch, tmp_path, name, guided):
    import recipes

    import evaluate
    from training import settings

    options = argparse.Namespace(
        data="drawings",
        test="new-drawings",
        out=str(tmp_path),
        image_size=8,
        minutes=1,
        epochs=None,
        precision="float32",
        sampler="ddpm",
        steps=20,
        guidance=1.5,
        features="pixels",
        n_sample=30,
    )
    commands = []

    def run(command, **settings):
        commands.append(command[1:])
        if command[1] == "evaluate.py":
            (path,) = (word for word in command if word.endswith(".json"))
            with open(path, "w") as file:
                file.write('{"step": 3}')

    monkeypatch.setattr(recipes.subprocess, "run", run)
    search = recipes.Search(options)
    monkeypatch.setattr(search, "image_folder", lambda seed: "images")
    (tmp_path / "unet-1min-seed2.keras").touch()
    for _ in range(2):  # cached the second time
        assert search.row(name, 2, {name: (0.5, 64)}) == {"step": 3}
    (script, *training), (_, *evaluation) = commands
    measured = evaluate.parse_options(evaluation)
    assert (measured.sampler, measured.steps, measured.n_sample) == ("ddpm", 20, 30)
    assert measured.guidance == (1.5 if guided else 1) and bool(measured.weaker) == guided
    if name == "ddpp":
        assert script == "benchmarks/ddpp.py" and training[training.index("--train") + 1] == "120"
        assert measured.samples == training[training.index("--out") + 1] and "bits" not in measured.only
    else:
        assert script == "diffusion_model.py" and measured.variance == "learned"
        assert settings.parse_options("", training)["model"] == measured.model and measured.samples is None


def test_cells_of_a_recipe_come_from_its_evaluation():
    import recipes

    numbers = {
        "features": "pixels",
        "step": 9,
        "kid, pixels": {"value": 0.1234, "error": 0.002},
        "loss, training / held-out": {"value": 0.987, "error": 0.01},
        "near-copies, pixels": {"value": 0.0, "error": None},
    }
    cells = dict(zip(recipes.HEADING[4:], recipes.cells(numbers), strict=True))
    assert cells["KID"] == "0.123 ± 0.002" and cells["near-copies"] == "0.000" and cells["recall"] == ""
    assert cells["training / held-out loss"] == "0.99 ± 0.01"


def test_peer_trains_on_our_training_images_of_each_seed(tmp_path):
    import recipes
    from PIL import Image

    import data
    from data.splits import split_held_out

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    options = argparse.Namespace(
        data=str(tmp_path / "images.npy"),
        test=None,
        out=str(tmp_path / "rows"),
        image_size=8,
        minutes=1,
        epochs=None,
        precision="float32",
    )
    search = recipes.Search(options)
    (tmp_path / "rows" / "images-seed1.part").mkdir()  # left by an interruption
    for seed in 1, 0:
        folder = search.image_folder(seed)
        written = [np.asarray(Image.open(os.path.join(folder, name))) for name in sorted(os.listdir(folder))]
        np.testing.assert_array_equal(written, split_held_out(data.load_images(options.data, 8, 3)[0], 0.1, seed)[0])

    options.data = "drawings"
    with pytest.raises(ValueError, match="holds rows for .*images.npy.*choose another folder"):
        recipes.Search(options)


@pytest.mark.parametrize(
    "words, why",
    [
        (("--recipes", "ddpp"), "one of our recipes"),
        (("--recipes", "unet,ddpp", "--epochs", "3"), "one of our recipes"),
        (("--recipes", "unet", "--epochs", "3", "--guidance", "2"), "only such rows have a weaker copy"),
        (("--recipes", "unet-muon-moon"), "unknown recipe unet-muon-moon; there are ddpp, and slides"),
        (("--recipes", "muon"), "unknown recipe muon"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(monkeypatch, capsys, words, why):
    import recipes

    monkeypatch.setattr("sys.argv", ["recipes.py", "--data", "drawings", *words])
    with pytest.raises(SystemExit) as end:
        recipes.main()
    assert end.value.code == 2 and why in capsys.readouterr().err


def small_networks():
    """Both networks at 32×32, and `Unet` with everything that its settings leave out: Keras and PyTorch, classes."""
    import common
    import peer

    from diffusion.networks import Unet

    for name in common.NETWORKS:
        yield common.build(name, 32, 16), peer.build(name, 32, 16), 0
    more = {"classes": 3, "widths": (2, 1), "blocks": 2, "attention": 2, "patch": 4}
    yield Unet((32, 32, 3), 16, **more), peer.Unet((32, 32, 3), 16, **more), 3


def test_the_peers_are_the_same_networks():
    torch = pytest.importorskip("torch")
    import peer

    for model, network, classes in small_networks():
        parameters, difference = peer.check(model, network, classes)
        assert parameters == model.count_params() and 0 < difference < 1e-4
    with torch.device("meta"):
        assert sum(weight.numel() for weight in peer.NaiveUnet((64, 64, 3), 512).parameters()) == 129_329_667


def test_a_peer_that_differs_is_noticed(monkeypatch):
    pytest.importorskip("torch")
    import common
    import peer

    model = common.build("unet", 32, 16)
    with pytest.raises(ValueError, match="shorter"):
        peer.check(model, peer.Unet((32, 32, 3), 16, patch=2, attention=0))
    monkeypatch.setattr(peer, "channel_first", lambda value, *_: value)
    with pytest.raises(ValueError, match="not the same network"):
        peer.check(model, peer.build("unet", 32, 16))


def test_a_step_in_pytorch_runs():
    pytest.importorskip("torch")
    import reverse_step
    import training_step

    step = training_step.torchs("unet", 8, 16, 2, "float32", "channels_last", True)
    assert step() > 0 and step() > 0
    assert reverse_step.torchs("unet", 8, 16, 2, "contiguous_format")().shape == (2, 3, 16, 16)


def test_operations_are_counted_as_pytorch_counts_them():
    torch = pytest.importorskip("torch")
    import common
    import peer
    from torch.utils.flop_counter import FlopCounterMode

    for name in common.NETWORKS:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            peer.build(name, 64, 16)(torch.empty(1, 3, 64, 64), torch.empty(1, 1))
        assert common.operations(name, 16, 64, 5) == 3 * 5 * counter.get_total_flops()


def test_operations_of_the_slides_network_match_a_hand_count():
    """2 for each weight and place of a convolution, and for each weight of the embedding of time."""
    import common

    n, full = 16, 64 * 64
    one = 9 * (3 * n + n * n) * full  # the first Conv3Layer
    one += 9 * 2 * n * n * full + 9 * (2 * n * n + 4 * n * n) * full / 4 + 9 * 2 * 4 * n * n * full / 16  # down
    one += (2 * n) * (2 * n) * full / 64  # 4×4 transposed, one weight for each place it makes
    for place, width_in, width in ((full / 16, 4 * n, 2 * n), (full / 4, 4 * n, n), (full, 2 * n, n)):
        one += (width_in * width + 9 * 4 * width * width) * place  # 2×2 transposed, then four 3×3
    one += 9 * 2 * n * 3 * full  # the last
    one += 2 * n + (2 * n) ** 2  # time
    assert common.operations("naive", n, 64, 5) == 3 * 2 * one * 5


def test_operations_are_grouped_by_their_names():
    import shares

    events = {
        "StatefulPartitionedCall/functional_1/residual_block/conv2d/BiasAdd:_MklNativeFusedConv2D": "convolutions",
        "StatefulPartitionedCall/functional_1/conv2d_transpose/Conv2DBackpropInput:Conv2DBackpropInput": "convolutions",
        "StatefulPartitionedCall_1/gradient_tape/functional_1/conv2d/Conv2D:Conv2D": "… gradients of their inputs",
        "StatefulPartitionedCall/gradient_tape/conv2d/Conv2DBackpropFilter:_MklNativeConv2DBackpropFilterWithBias": (
            "… gradients of their kernels"
        ),
        "StatefulPartitionedCall/functional_1/self_attention/group_normalization_6/add:AddV2": (
            "normalization, activations, loss"
        ),
        "StatefulPartitionedCall_1/mul_76:Mul": "normalization, activations, loss",
        "StatefulPartitionedCall/gradient_tape/functional_1/self_attention/transpose:Transpose": "attention",
        "StatefulPartitionedCall/functional_1/concatenate/concat:ConcatV2": "other layers",
        "adam/Square_22:Square": "optimizer, EMA weights, sums of gradients",
        "stateless_random_normal/StatelessRandomNormalV2:StatelessRandomNormalV2": "noise on the images",
    }
    for name, group in events.items():
        seconds, counts = shares.shares([(name, 1.0, 3.0), ("ExecutorState::Process", 0.0, 9.0)])
        assert {name: s for name, s in seconds.items() if s} == {group: 2.0} and counts == {group: 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "bound_variance.py --model drawings --data new-drawings --count 20 --draws 2",
        "cluster_plan.py --out plan.png",
        "devices.py --rounds 1 --batch-sizes 16",
        "devices.py --rounds 1 --batch-sizes 16 --memory",
        "expect.py",
        "fault_run.py --kills 2",
        "guidance.py --model model.keras --n-sample 12 --steps 3 --features pixels",
        "inversion.py --model model.keras --data new-drawings --count 4 --steps 5 10",
        "loading.py --count 200 --rounds 1",
        "recipes.py --data drawings --recipes unet --rounds 1 --time-only",
        "restore.py --only bias",
        "restore.py --only images --count 2 --steps 3 --iterations 2,2 --features pixels",
        "restore.py --only time --count 2",
        "restore.py --only figure --out restore.png --steps 3",
        "reverse_step.py --rounds 1 --network unet",
        "sanity.py --features pixels --count 200",
        "shares.py --n-feat 8",
        "startup.py --rounds 1",
        "training_step.py --rounds 1 --network unet --n-feat 8 --image-size 32 --batch-size 16",
    ],
)
def test_a_benchmark_runs_in_small(run, words):
    """A minute or two each; `growth.py` and `samplers.py` have no small form."""
    name, *options = words.split()
    if "model.keras" in options:  # with the classes of the drawings
        small = "--network unet --widths 1 --attention 0 --n-feat 8 --T 50 --beta2 0.5 --schedule linear"
        trained = run("diffusion_model.py", *small.split(), "--classes", "--n-epochs", "1", "--sample-every", "0")
        assert trained.returncode == 0, trained.stderr
    process = run(os.path.join(ROOT, "benchmarks", name), *options)
    assert process.returncode == 0, process.stderr
    assert any(shown in process.stdout for shown in ("|--", ".png", " 0 bad", " ms a step"))
