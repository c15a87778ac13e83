"""`restore`, `inpaint`, `vary` and `interpolate`, and the same on the command line."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Oracle
from conftest import generate as generate_steps
from PIL import Image
from test_samplers import DEVIATION, MEAN, SLIDES, gaussian_predictor

import ddpm
import reverse_diffusion as rd
from diffusion import editing, generate, measurement, reverse, sampling
from diffusion.layers import Logbook
from diffusion.measurement import Task
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling

SHAPE = (4, 6, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, *SHAPE)).astype(np.uint8)
MASK = np.random.default_rng(1).integers(0, 2, SHAPE[:2])


def light_model(shape=SHAPE, T=20):
    """ε̂ of a convolution, whose weights are the same every time, for images of a shape."""
    image, t = keras.Input(shape), keras.Input((1,))
    logged = Logbook({"diffusion": {"beta1": 1e-3, "beta2": 0.5, "T": T}})(t)
    convolution = keras.layers.Conv2D(shape[-1], 3, padding="same", kernel_initializer=keras.initializers.HeNormal(0))
    eps = keras.layers.Add()([convolution(image), keras.layers.Reshape((1, 1, 1))(keras.layers.Rescaling(0.1)(logged))])
    return keras.Model([image, t], eps)


@pytest.fixture(scope="module")
def model():
    return light_model()


HOW = {"seed": 1, "steps": 4, "verbose": 0}


@pytest.mark.parametrize("method", [None, "repaint"])
def test_inpainting_keeps_known_pixels_to_the_grey_level(model, method):
    how = {"n_sample": 2, "method": method, **HOW}
    filled = rd.inpaint(IMAGES[:2], MASK, model, **how)
    assert filled.shape == (4, *SHAPE) and filled.dtype == np.int16
    for k, image in enumerate(filled):
        np.testing.assert_array_equal(image[MASK == 1], IMAGES[k // 2][MASK == 1])
    assert np.any(filled[0] != filled[1])
    for known in MASK.astype(bool), np.uint8(255 * MASK), np.stack([MASK] * 2):
        np.testing.assert_array_equal(rd.inpaint(IMAGES[:2], known, model, **how), filled)
    others = np.where(MASK[..., None], IMAGES[:2], 7)  # what stands in unknown pixels does not matter
    np.testing.assert_array_equal(rd.inpaint(others, MASK, model, **how), filled)


def test_measurements_are_grey_levels_or_floats():
    levels = np.arange(16).reshape(1, 2, 4, 2) * 17
    task = Task("blur", "mmps", 1.0)
    found = editing.as_measurement(levels, task, (2, 4, 2), 0.0)
    np.testing.assert_allclose(found, levels / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(editing.as_measurement(levels / 127.5 - 1, task, (2, 4, 2), 0.0), found, atol=1e-6)
    np.testing.assert_allclose(editing.as_measurement(1.5 * found, task, (2, 4, 2), 0.1), 1.5 * found, atol=1e-6)


GREY = IMAGES.mean(axis=-1, keepdims=True) / 127.5 - 1


def test_restored_images_do_not_depend_on_their_batch(model, monkeypatch):
    together = rd.restore(GREY, "grey", 0.1, model, n_sample=2, **HOW)
    assert together.shape == (6, *SHAPE) and together.dtype == np.int16
    monkeypatch.setattr(reverse, "LARGEST_BATCH", 3)
    np.testing.assert_allclose(rd.restore(GREY, "grey", 0.1, model, n_sample=2, **HOW), together, atol=1)
    np.testing.assert_allclose(rd.restore(GREY[:1], "grey", 0.1, model, n_sample=2, **HOW), together[:2], atol=1)


@pytest.mark.parametrize("deviation, variance", [(0.3, 0.09), (0.0, 1 / 255**2)])
@pytest.mark.parametrize("method, goes_back", [("mmps", False), ("repaint", True)])
def test_restoring_runs_the_plan_and_the_noise_asked_for(model, monkeypatch, deviation, variance, method, goes_back):
    def no_images(plan, trained, asked, count, measurement, **run):
        assert bool(np.any(np.diff(plan.times) > 0)) == goes_back
        np.testing.assert_allclose(measurement[2], [variance] * 3, rtol=1e-6)
        return np.zeros((count, *SHAPE))

    monkeypatch.setattr(generate, "sample_images", no_images)
    rd.restore(GREY, "grey", deviation, model, method=method, verbose=0, steps=20)


def test_an_operation_may_be_any_linear_function(model):
    def mean_of_colours(x):
        return tf.reduce_mean(x, axis=-1)  # without the axis of channels

    own = rd.restore(GREY[..., 0], mean_of_colours, 0.1, model, **HOW)
    assert np.abs(own - rd.restore(GREY, "grey", 0.1, model, **HOW)).max() <= 1


def test_factor_of_downscale_follows_from_the_measurement():
    for factor, shape in (None, (5, 2, 3, 3)), (2, (5, 2, 3, 3)):
        assert measurement.choose_task("downscale", None, factor, shape, SHAPE).factor == 2
    assert measurement.choose_task("blur", None, None, (), SHAPE).factor == 1


def test_batches_with_gradients_are_smaller():
    network = light_model()
    sizes = [reverse.even_batches(network, 64, gradient) for gradient in (False, True)]
    assert sizes[0] == sizes[1] == (1, 64)
    for memory in 4 * 16 * 72, 4 * 100 * 72:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reverse, "MEMORY", memory)
            plain, gradient = (reverse.even_batches(network, 64, gradient)[1] for gradient in (False, True))
            assert gradient <= plain


def test_every_sampler_restores(model):
    for more in *({"sampler": name} for name in ("ddim", "dpm++", "langevin")), {"corrector": 1}:
        images = rd.restore(GREY, "grey", 0.1, model, **{**HOW, "steps": 6}, **more)
        assert images.shape == (3, *SHAPE) and np.any(images != rd.restore(GREY, "grey", 0.1, model, **HOW))


def test_variations_of_a_gaussian_have_the_closed_form():
    """Of a Gaussian, where x_t of an image is known, and a way back that draws from p(x_0 | x_t)."""
    t, value = 300, -0.3
    plan = sampling.make_plan(SLIDES, Sampling(variance="posterior"), begin=t)
    np.testing.assert_array_equal(plan.times, np.arange(300, -1, -1))
    trained = TrainedModel(Oracle(gaussian_predictor(SLIDES), (48, 32, 1)), SLIDES)
    x_t = editing.add_noise(np.full((8, 48, 32, 1), value, np.float32), t, range(8), 0, trained)
    *_, (_, x_0) = generate_steps(
        gaussian_predictor(SLIDES), SLIDES, (48, 32, 1), 8, clip=False, plan=plan, start=tf.constant(x_t)
    )
    ab = SLIDES.alphabar[t]
    variance = 1 / (1 / DEVIATION**2 + ab / (1 - ab))  # of x_0 given x_t
    gain = variance * ab / (1 - ab)
    expected = variance + gain**2 * (1 - ab) / ab
    assert x_0.mean() == pytest.approx(MEAN + gain * (value - MEAN), abs=5 * np.sqrt(expected / x_0.size) + 1e-3)
    assert x_0.var() == pytest.approx(expected, rel=0.04)
    few = sampling.make_plan(SLIDES, Sampling("dpm++", 20), begin=t)
    assert few.times[0] == t and np.all(np.diff(few.times) < 0) and few.times[-1] == 0


def test_variations_grow_with_their_strength(model):
    away = []
    for strength in 0.05, 0.4, 1.0:
        varied = rd.vary(IMAGES[:1], strength, model, n_sample=2, seed=3, verbose=0)
        assert varied.shape == (2, *SHAPE) and varied.dtype == np.int16 and np.any(varied[0] != varied[1])
        away.append(np.abs(varied - IMAGES[:1].astype(int)).mean())
    assert away[0] < away[1] < away[2] and away[0] < 12
    few = [
        rd.vary(images[:2], 0.4, model, seed=3, verbose=0, steps=10) for images in (IMAGES, ddpm.from_pixels(IMAGES))
    ]
    np.testing.assert_array_equal(*few)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_way_begins_and_ends_with_the_images_themselves(model, strength):
    a, b = IMAGES[0], ddpm.from_pixels(IMAGES[1:2])
    way = rd.interpolate(a, b, 4, model, strength=strength, steps=10, seed=0, verbose=0)
    assert way.shape == (4, *SHAPE) and way.dtype == np.int16
    np.testing.assert_array_equal(way[[0, -1]], IMAGES[:2])
    np.testing.assert_array_equal(rd.interpolate(a, b, 2, model, strength=strength, verbose=0), IMAGES[:2])
    other = rd.interpolate(a, b, 4, model, strength=strength, steps=10, seed=1, verbose=0)
    assert np.any(other != way) == (strength is not None)  # by DDIM there is no chance in it


def test_a_way_on_the_sphere_has_equal_angles_and_lengths():
    one, other = np.random.default_rng(0).standard_normal((2, 8, 8, 1))
    other *= np.linalg.norm(one) / np.linalg.norm(other)
    points = editing.on_the_sphere(one, other, np.linspace(0, 1, 6)[:, None, None, None]).reshape(6, -1)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), np.linalg.norm(one))
    steps = [points[k] @ points[k + 1] for k in range(5)]
    np.testing.assert_allclose(steps, steps[0])
    np.testing.assert_allclose(points[[0, -1]], [one.ravel(), other.ravel()], atol=1e-12)
    np.testing.assert_allclose(editing.on_the_sphere(one, one, np.full((1, 1, 1, 1), 0.3))[0], one)


def test_the_middle_of_a_noisy_way_is_the_mean_of_the_images(monkeypatch):
    """Both ends have the same noise, so that every point on the way has noise of the right size."""
    given, network = {}, light_model(T=50)

    def caught(plan, trained, asked, count, **run):
        given.update(run, times=plan.times)
        return np.zeros((count, *SHAPE), np.float32)

    monkeypatch.setattr(generate, "sample_images", caught)
    rd.interpolate(IMAGES[0], IMAGES[1], 5, network, strength=0.3, seed=4, verbose=0)
    trained = generate.open_model(network)
    eps = sampling.standard_normal(4, 51, [0], SHAPE).numpy()[0]
    a, b = ddpm.from_pixels(IMAGES[:2])
    ab = trained.sched.alphabar[15]
    assert given["times"][0] == 15 and len(given["start"]) == 3
    for x_t, share in zip(given["start"], (0.25, 0.5, 0.75), strict=True):
        expected = np.sqrt(ab) * ((1 - share) * a + share * b) + np.sqrt(1 - ab) * eps
        np.testing.assert_allclose(x_t, expected, atol=1e-5)


FLOATS = np.zeros((1, *SHAPE), np.float32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: rd.restore(FLOATS, "sharpen", model=m), "operation must be one of mask, downscale, grey, blur"),
        (lambda m: rd.restore(FLOATS, "mask", model=m), "operation mask needs a mask"),
        (lambda m: rd.restore(FLOATS, "blur", model=m, mask=MASK), "operation blur takes no mask"),
        (lambda m: rd.restore(FLOATS, "blur", model=m, factor=0), "factor must be a number from 0.1 to 6, got 0"),
        (lambda m: rd.restore(FLOATS, "grey", model=m), r"measurement must be .* \(n, 4, 6, 1\)"),
        (lambda m: rd.restore(FLOATS[..., :1], "grey", model=m, factor=2), "factor applies only to .* not to grey"),
        (lambda m: rd.restore(FLOATS, "downscale", model=m), r"such as \(n, 2, 3, 3\), got \(1, 4, 6, 3\)"),
        (lambda m: rd.restore(FLOATS[:, ::2, ::2], "downscale", model=m, factor=4), "divide 4 by 6 pixels.* got 4"),
        (lambda m: rd.restore(FLOATS, "blur", -0.1, m), "deviation must be a number of at least 0, got -0.1"),
        (
            lambda m: rd.restore(FLOATS, "blur", model=m, method="ddrm"),
            "method must be one of mmps, pigdm, dps, repaint",
        ),
        (lambda m: rd.restore(FLOATS + 1.5, "blur", model=m), "measurement must lie in -1 … 1, got 1.5"),
        (lambda m: rd.restore(FLOATS + np.nan, "blur", 0.1, m), "finite numbers"),
        (lambda m: rd.restore(FLOATS, "blur", model=m, n_sample=0), "n_sample must be an integer of at least 1"),
        (lambda m: rd.restore(np.int16(FLOATS), lambda x: x, model=m), "finite floating-point numbers, got int16"),
        (lambda m: rd.restore(FLOATS, "blur", model=m, method="repaint", corrector=1), "combined with a corrector"),
        (lambda m: rd.inpaint(FLOATS, MASK[1:], m), r"shape \(4, 6\) or \(1, 4, 6\), got \(3, 6\)"),
        (lambda m: rd.inpaint(FLOATS, 0.5 * MASK, m), "mask must be 1, True or 255 where the image is known"),
        (lambda m: rd.inpaint(FLOATS[..., :1], MASK, m), r"images must be an array of shape \(n, 4, 6, 3\)"),
        (lambda m: rd.vary(FLOATS, 0, m), "strength must be above 0"),
        (lambda m: rd.vary(FLOATS, 1.1, m), "strength must be a number from 0 to 1, got 1.1"),
        (lambda m: rd.vary(FLOATS, 0.5, m, n_sample=0), "n_sample"),
        (lambda m: rd.interpolate(FLOATS, np.zeros((2, *SHAPE)), 3, m), "one image each, got 1 and 2"),
        (lambda m: rd.interpolate(FLOATS, FLOATS, 1, m), "count must be an integer of at least 2, got 1"),
        (lambda m: rd.interpolate(FLOATS, FLOATS, 3, m, sampler="dpm++"), "takes only steps and label"),
        (lambda m: rd.interpolate(FLOATS, FLOATS[..., :1], 3, m), r"shape \(n, 4, 6, 3\)"),
    ],
)
def test_impossible_edits_get_one_sentence(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_grey_images_have_no_colours_to_restore():
    with pytest.raises(ValueError, match="grey needs a model of images with several channels"):
        rd.restore(np.zeros((1, 4, 4, 1)), "grey", model=light_model((4, 4, 1)))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A folder with a model, two photographs of other sizes, and a mask of the first."""
    folder, rng = tmp_path_factory.mktemp("editing"), np.random.default_rng(0)
    model.save(folder / "m.keras")
    Image.fromarray(rng.integers(0, 256, (40, 72, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).save(folder / "b.png")
    mask = np.full((40, 72), 255, np.uint8)
    mask[:, :36] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    transparent = rng.integers(0, 256, (*SHAPE[:2], 4), np.uint8)
    transparent[..., 3] = 255 * MASK
    Image.fromarray(transparent).save(folder / "transparent.png")
    return folder


@pytest.fixture
def folder(written, monkeypatch):
    """It is the current folder."""
    monkeypatch.chdir(written)
    return written


def command(monkeypatch, capsys, *words):
    """Runs the script here; the exit status and what it says on stderr."""
    monkeypatch.setattr("sys.argv", ["reverse_diffusion.py", "--model", "m.keras", "--steps", "4", *words])
    try:
        rd.main()
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def test_the_script_shows_given_measured_and_restored(folder, monkeypatch, capsys):
    words = ("--restore", "a.png", "--operation", "mask", "--mask", "mask.png", "--n-sample", "2", "--npy", "a.npy")
    assert command(monkeypatch, capsys, *words) == (0, "")
    grid, restored = np.asarray(Image.open("m-samples-restored.png")), np.load("a.npy")
    assert grid.shape == (2 * (64 + 2), 2 * (96 + 2), 3) and restored.shape == (2, *SHAPE)
    cells = [grid[1 + 66 * k : 65 + 66 * k : 16, 1 + 98 * j : 97 + 98 * j : 16] for k, j in np.ndindex(2, 2)]
    given, measured, *shown = cells
    np.testing.assert_array_equal(shown, restored)
    np.testing.assert_array_equal(measured[:, 3:], given[:, 3:])
    assert np.all(measured[:, :3] == 128) and np.all(restored[:, :, 3:] == given[:, 3:])
    words = "--restore b.png --operation downscale --factor 2 --deviation 0.1 --method pigdm --n-sample 2 --out o.png"
    assert command(monkeypatch, capsys, *words.split()) == (0, "")
    measured = np.asarray(Image.open("o.png"))[1:65:16, 99:195:16]
    np.testing.assert_array_equal(measured, measured[::2, ::2].repeat(2, 0).repeat(2, 1))


def test_transparent_pixels_of_a_photo_are_filled_in(folder, monkeypatch, capsys):
    words = "--restore transparent.png --operation mask --n-sample 2 --npy t.npy"
    assert command(monkeypatch, capsys, *words.split()) == (0, "")
    photo = np.asarray(Image.open("transparent.png"))
    np.testing.assert_array_equal(np.load("t.npy")[0][MASK == 1], photo[..., :3][MASK == 1])


def test_the_script_varies_and_interpolates(folder, monkeypatch, capsys):
    words = "--vary a.png --strength 0.5 --n-sample 2 --seed 1 --npy v.npy"
    assert command(monkeypatch, capsys, *words.split()) == (0, "")
    assert np.asarray(Image.open("m-samples-varied.png")).shape == (2 * 66, 2 * 98, 3)
    assert np.load("v.npy").shape == (2, *SHAPE)
    words = "--interpolate a.png b.png --n-sample 4 --npy i.npy"
    assert command(monkeypatch, capsys, *words.split()) == (0, "")
    way = np.load("i.npy")
    again = rd.interpolate(way[0], way[-1], 4, "m.keras", steps=4, verbose=0)
    np.testing.assert_array_equal(way, again)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--restore a.png", "--restore needs an --operation: mask, downscale, grey, blur"),
        ("--restore a.png --operation downscale", "needs a --factor, such as 4"),
        ("--restore a.png --operation downscale --factor 2.5", "factor of downscale must be an integer"),
        ("--restore a.png --operation mask", "a.png has no transparent pixels to fill in; name a mask with --mask"),
        ("--restore a.png --operation mask --mask b.png", "b.png has 12×8 pixels, and a.png 72×40; a mask must have"),
        ("--restore a.png --operation mask --mask nowhere.png", "nowhere.png cannot be read"),
        ("--vary a.png --strength 0.5 --devices 2", "--vary uses one device, several share samples only"),
        ("--restore a.png --operation grey --mask b.png", "--mask applies only to --operation mask"),
        ("--restore nowhere.png --operation grey", "nowhere.png cannot be read"),
        ("--restore m.keras --operation grey", "m.keras cannot be read: not an image"),
        ("--restore a.png --operation grey --out a.png", "would overwrite another file of this command, a.png"),
        ("--restore a.png --operation grey --strength 0.5", "--strength applies only to --vary and --interpolate"),
        ("--restore a.png --operation grey --factor 2", "factor applies only to the operations"),
        ("--operation grey", "--operation applies only to --restore"),
        ("--vary a.png", "--vary needs a --strength"),
        ("--vary a.png --strength 0", "strength must be above 0"),
        ("--vary a.png --interpolate a.png b.png", "not allowed with"),
        ("--vary a.png --strength 2", "--strength"),
    ],
)
def test_impossible_edits_of_files_are_one_line(folder, monkeypatch, capsys, words, message):
    before = sorted(path.name for path in folder.iterdir())
    status, said = command(monkeypatch, capsys, *words.split())
    assert status == 2 and message in said and len(said.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == before
