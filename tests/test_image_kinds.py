"""Images that are not squares, are neither grey nor in colour, or have more than 8 bits: read, trained, sampled."""

import os

import numpy as np
import pytest
import tensorflow as tf
from conftest import train_here
from data_helpers import noise
from PIL import Image

import ddpm
import reverse_diffusion as rd
from data import digest, drawings, load_images
from data.pixels import as_size, crop_and_resize
from diffusion import model_file
from diffusion.learned_variance import bound_tables, hybrid_loss
from diffusion.networks import Unet
from evaluation.features import extractor
from evaluation.likelihood import likelihood_rows
from evaluation.samples import sample_rows
from support import console, grids
from support.scale import Scale
from unet import NaiveUnet

RNG = np.random.default_rng(0)
FLOATS = RNG.normal(500, 300, (17, 8, 16, 5)).astype(np.float32)


def save(array, name="array.npy"):
    np.save(name, array)
    return name


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given, size", [(32, (32, 32)), ("48x64", (48, 64)), ((48, 64), (48, 64)), ([5, 3], (5, 3))])
def test_sizes_are_one_number_or_two(given, size):
    assert as_size(given) == size


@pytest.mark.parametrize("given", ["48", "48x", "0x8", "-4x8", "4x8x3", (4,), (4, 0), (4.0, 8), 0, None])
def test_other_sizes_are_refused(given):
    with pytest.raises(ValueError, match="image_size must be a positive integer, or a height and a width, got"):
        as_size(given)


def test_typed_sizes_have_one_spelling():
    assert [console.image_size(text) for text in ("32", "32x32", "48x64", "48X64", "48×64")] == [32, 32, *["48x64"] * 3]
    for text in "", "x", "48x", "a", "48x64x3", "0", "-3", "4.5":
        with pytest.raises(Exception, match="HEIGHTxWIDTH"):
            console.image_size(text)


def test_photographs_are_cropped_to_the_shape():
    """The middle of a photograph whose columns are its numbers: of 120×90, cropped to 2:3, the rows 15 to 75 remain."""
    column = np.broadcast_to(np.arange(120), (90, 120))
    row = np.broadcast_to(np.arange(90)[:, None], (90, 120))
    os.mkdir("photographs")
    Image.fromarray(np.stack([column, row, row], axis=-1).astype(np.uint8)).save("photographs/a.png")
    images, _ = load_images("photographs", "12x24")
    assert images.shape == (1, 12, 24, 3)
    np.testing.assert_allclose(images[0, 5, 1:-1, 0], 5 * np.arange(24)[1:-1] + 2, atol=1)
    np.testing.assert_allclose(images[0, 1:-1, 5, 1], 15 + 5 * np.arange(12)[1:-1] + 2, atol=1)


@pytest.mark.parametrize("levels", [255, 4000, 65535])
def test_channels_of_arrays_are_resized_each_alone(levels):
    array = RNG.integers(0, levels + 1, (20, 30, 4)).astype(Scale(levels=levels).dtype)
    resized = crop_and_resize(array, (10, 15), 4, levels)
    for channel in range(4):
        plane = Image.fromarray(np.float32(array[..., channel])).resize((15, 10), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(resized[..., channel], np.clip(np.rint(plane), 0, levels))


def test_grey_and_colour_of_16_bits_are_converted():
    grey, colour = RNG.integers(0, 65536, (2, 4, 4, 1)), RNG.integers(0, 65536, (2, 4, 4, 3))
    to_colour = load_images(save(grey.astype(np.uint16)), 4, 3, bit_depth=16)[0]
    low, high = grey.min(), grey.max()
    np.testing.assert_array_equal(to_colour, (grey - low).repeat(3, axis=-1))
    to_grey, report = load_images(save(colour.astype(np.uint16)), 4, 1, bit_depth=None)
    np.testing.assert_allclose(
        to_grey[..., 0], (colour - report.scale.black) @ [0.299, 0.587, 0.114], rtol=0, atol=0.51
    )
    assert (to_grey.dtype, report.scale.levels) == (np.uint16, colour.max() - colour.min()) and high > low


PRECISE = {  # an array, the scale that is found, and how far values may be from what is stored, in their own units
    "12 bits": (RNG.integers(37, 4096, (3, 8, 8, 2)).astype("u2"), None, 0),
    "signed": (RNG.integers(-100, 101, (3, 8, 8, 2)).astype("i2"), None, 0),
    "wide integers": (RNG.integers(0, 10**6, (3, 8, 8, 2)), None, 10**6 / 131070),
    "0 … 1": (RNG.random((3, 8, 8, 2)), Scale(0, 1, 65535), 0.5 / 65535),
    "-1 … 1": (RNG.uniform(-1, 1, (3, 8, 8, 2)).astype("f4"), Scale(-1, 1, 65535), 1.01 / 65535),
    "0 … 255": (RNG.uniform(0, 255, (3, 8, 8, 2)), Scale(0, 255, 65535), 127.5 / 65535),
    "any range": (RNG.normal(0, 3, (3, 8, 8, 2)), None, 15 / 65535),
    "8 bits as numbers": (np.float32(noise(3, 8, 8, 2) / 255), Scale(0, 1), 1e-7),
}


@pytest.mark.parametrize("case", PRECISE)
def test_arrays_keep_their_precision(case):
    array, scale, tolerance = PRECISE[case]
    images, report = load_images(save(array), 8, 2, bit_depth=None)
    found = report.scale
    if scale is None:
        assert (found.black, found.white) == (array.min(), array.max())
        assert found.levels == (min(found.white - found.black, 65535) if array.dtype.kind in "ui" else 65535)
    else:
        assert found == scale
    assert images.dtype == (np.uint8 if found.levels <= 255 else np.uint16)
    stored = found.black + images.astype(np.float64) * (found.white - found.black) / found.levels
    np.testing.assert_allclose(stored, array, rtol=0, atol=tolerance)
    assert images.min() == 0 or scale and images.min() < found.levels / 100
    x_0 = ddpm.from_pixels(images, found.levels)
    np.testing.assert_allclose(x_0, 2 * (stored - found.black) / (found.white - found.black) - 1, rtol=0, atol=1e-6)


def test_arrays_of_8_bits_are_read_as_before():
    """Earlier versions trained on 8 bits of any array, and recognise it by its digest."""
    images, _ = load_images(save(FLOATS[..., :3] / 10_000 + 0.4), (8, 16))
    assert images.dtype == np.uint8 and digest(images) == digest(
        np.uint8(np.rint((FLOATS[..., :3] / 10_000 + 0.4) * 255))
    )
    with pytest.raises(ValueError, match="holds integers from 0 to 300, not 0 … 255; scale or clip them"):
        load_images(save(np.arange(301)[:, None, None] + np.zeros((8, 8), int)), 8)


UNFIT = {
    "constant": (np.full((2, 8, 8), 7.5), "floating-point numbers from 7.5 to 7.5"),
    "infinite": (np.full((2, 8, 8), np.inf), r"infinity \(np.inf\)"),
    "no number": (np.full((2, 8, 8), np.nan), r"NaN \(np.nan\)"),
    "65 channels": (np.zeros((2, 8, 8, 65), "u1"), "1 or 3 channels$"),
    "5 channels": (np.zeros((2, 8, 8, 5), "u1"), "add --channels 5 for images with 5"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_arrays_without_a_range_are_refused(case):
    array, said = UNFIT[case]
    with pytest.raises(ValueError, match=said):
        load_images(save(array), 8, bit_depth=None)


@pytest.fixture
def few_drawings(monkeypatch):
    draw = drawings.draw_cats
    monkeypatch.setattr(drawings, "draw_cats", lambda image_size, seed: draw(image_size, 3, seed))


def test_drawings_have_any_shape_and_depth(few_drawings):
    deep, eight = (load_images("drawings", (8, 16), bit_depth=depth)[0] for depth in (16, 8))
    np.testing.assert_array_equal(deep, eight * np.uint16(257))
    square = load_images("drawings", 16)[0]
    assert eight.shape == (3, 8, 16, 3) and np.abs(eight - square[:, 4:12].astype(int)).mean() < 2
    with pytest.raises(ValueError, match="drawings can be read with channels 3 or 1, colour or grey, not 5"):
        load_images("drawings", 8, 5)


def test_other_images_are_read_in_the_scale_of_the_model():
    scale = Scale(100, 300, 1000)
    images, report = load_images(save(np.array([[[[100.0], [300.0], [150.1]]]])), (1, 3), 1, scale=scale)
    assert images.ravel().tolist() == [0, 1000, 250] and report.scale == scale
    with pytest.raises(ValueError, match="holds values from 50 to 300, and the model was trained on 100 … 300; scale"):
        load_images(save(np.array([[[[50.0], [300.0]]]])), (1, 2), 1, scale=scale)
    with pytest.raises(ValueError, match="drawings: the model was trained on values 100 … 300 of an array, which"):
        load_images("drawings", 8, scale=scale)


BANDS = {"LA": 2, "RGBA": 4, "CMYK": 4}


@pytest.mark.parametrize("mode", BANDS)
def test_bands_of_files_are_channels(mode):
    values = noise(8, 8, BANDS[mode])
    os.mkdir("files")
    Image.fromarray(values, mode=mode).save("files/a.tiff")
    Image.fromarray(noise(8, 8, 3)).save("files/b.png")
    for bit_depth, factor in (8, 1), (16, 257):
        images, report = load_images("files", 8, BANDS[mode], bit_depth=bit_depth)
        np.testing.assert_array_equal(images, values[None].astype(int) * factor)
        assert "1 file skipped: b.png (3 channels, not " in str(report)


def test_pages_of_16_bits_are_channels():
    values = RNG.integers(0, 65536, (5, 6, 9)).astype(np.uint16)
    first, *rest = (Image.fromarray(page) for page in values)
    os.mkdir("files")
    first.save("files/a.tiff", save_all=True, append_images=rest)
    images, report = load_images("files", (6, 9), 5, bit_depth=16)
    np.testing.assert_array_equal(images[0], np.moveaxis(values, 0, -1))
    assert report.scale == Scale(0, 65535, 65535)
    np.testing.assert_array_equal(load_images("files", (6, 9), 5)[0][0], np.rint(np.moveaxis(values, 0, -1) / 257))
    with pytest.raises(ValueError, match="5 channels, not 4"):
        load_images("files", (6, 9), 4)
    np.testing.assert_array_equal(load_images("files", (6, 9), 1, bit_depth=16)[0][0, ..., 0], values[0])


def test_a_grey_file_of_16_bits_keeps_them():
    values = RNG.integers(0, 65536, (8, 8)).astype(np.uint16)
    os.mkdir("files")
    Image.fromarray(values).save("files/a.png")
    np.testing.assert_array_equal(load_images("files", 8, 1, bit_depth=16)[0][0, ..., 0], values)
    np.testing.assert_array_equal(load_images("files", 8, 3, bit_depth=16)[0][0], values[..., None].repeat(3, -1))


@pytest.mark.parametrize("levels", [7, 255, 3000])
def test_the_decoder_has_a_bin_for_every_level(levels):
    """The probabilities of all levels sum to 1, and each is the mass of the normal distribution in its bin."""
    x = ddpm.from_pixels(np.arange(levels + 1), levels)
    mean, sigma = 0.3, 0.02
    mass = np.exp(ddpm.log_probability_of_pixel(x, mean, tf.constant(sigma, tf.float64), levels).numpy())
    assert abs(mass.sum() - 1) < 1e-5
    samples = np.random.default_rng(0).normal(mean, sigma, 400_000)
    counted = np.bincount(np.clip(np.rint((samples + 1) / 2 * levels), 0, levels).astype(int), minlength=levels + 1)
    np.testing.assert_allclose(mass, counted / len(samples), atol=4 * np.sqrt(mass.max() / len(samples)))


def test_learned_variance_knows_the_width_of_a_bin():
    """At t = 1 the variance that costs least is that of the values in a bin, (2/levels)² / 12, if nothing else errs."""
    sched = ddpm.ddpm_schedule(1e-7, 0.02, 10)
    for levels in 255, 65535:
        d = bound_tables(sched, levels=levels)[1, 2]
        assert np.isclose(d + 1, (2 / levels) ** 2 / 12 / sched["posterior_variance"][2], rtol=1e-5)
    zero, one = tf.zeros((1, 1, 1, 1)), tf.constant([1])
    losses = [hybrid_loss(sched, levels=levels)(zero, zero, zero, one).numpy().item() for levels in (255, 65535)]
    expected = [1e-3 / np.log(2) * d / 2 for d in (bound_tables(sched, levels=n)[1, 2] for n in (255, 65535))]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_grids_show_what_was_chosen():
    images = noise(4, 3, 5, 6)
    np.testing.assert_array_equal(grids.visible(images), images[..., :1])
    np.testing.assert_array_equal(grids.visible(images[..., :3]), images[..., :3])
    shown = grids.parse_shown("3,2,1", 6)
    np.testing.assert_array_equal(grids.visible(images, shown), images[..., [2, 1, 0]])
    grids.save_grid(images, "grid.png", shown=shown)
    with Image.open("grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid)[1, 1], images[0, 0, 0, [2, 1, 0]])
    assert grids.describe_shown(None, 6) == "showing channel 1 of 6; --show chooses others"
    assert grids.describe_shown(shown, 6) == "showing channels 3, 2, 1 of 6; --show chooses others"
    assert grids.describe_shown(None, 3) is None
    for text in "7", "0", "1,2", "1,2,3,4":
        with pytest.raises(ValueError, match="--show must name one channel, or three"):
            grids.parse_shown(text, 6)


FIVE = (
    "--data array.npy --image-size 8x16 --channels 5 --preset slides --T 20 --beta2 0.5 --batch-size 6 --sample-every 0"
)


def test_five_channels_of_floats_train_resume_and_sample(tiny_networks, capsys):
    save(FLOATS)
    train_here([*FIVE.split(), "--n-epochs", "1", "--show", "5,4,2"])
    out = capsys.readouterr().out
    low, high = float(FLOATS.min()), float(FLOATS.max())
    assert f"17 images, 8×16×5, {low:g} … {high:g} in 65,535 steps" in out and "showing channels 5, 4, 2 of 5" in out
    train_here(["--n-epochs", "2"])
    trained = model_file.open_model("model.keras")
    assert trained.metadata["settings"]["bit_depth"] == 16 and trained.levels == 65535
    assert trained.scale == Scale(low, high, 65535)
    grey, raw = (rd.my_sample(n_sample=2, seed=1, verbose=0, steps=5, raw=raw) for raw in (False, True))
    assert grey.dtype == np.int16 and raw.dtype == np.float32 and grey.shape == raw.shape == (2, 8, 16, 5)
    np.testing.assert_allclose(low + grey / 255 * (high - low), raw, atol=(high - low) / 500)
    with Image.open("samples.png") as grid:
        assert grid.mode == "RGB"
    save(FLOATS + 10_000)
    with pytest.raises(ValueError, match="and the model was trained on"):
        train_here(["--n-epochs", "3"])
    save(FLOATS)
    with pytest.raises(ValueError, match="was trained with --bit-depth 16, not 8"):
        train_here(["--n-epochs", "3", "--bit-depth", "8"])
    with pytest.raises(ValueError, match="was trained with --image-size 8x16, not 8"):
        train_here(["--n-epochs", "3", "--image-size", "8"])


def test_an_evaluation_says_how_wide_its_bins_are(tiny_networks):
    save(FLOATS)
    train_here([*FIVE.split(), "--n-epochs", "1"])
    trained = model_file.open_with_schedule("model.keras")
    images, report = load_images("array.npy", (8, 16), 5, bit_depth=16)
    rows = likelihood_rows(trained, images, None, parts=["bits"], draws=2, cache=None)
    width = (float(FLOATS.max()) - float(FLOATS.min())) / 65535
    assert rows["bits/dim, β, clipped"]["remark"] == f"for values in bins {width:.4g} wide"
    seen = report.scale.to_bytes(images)
    np.testing.assert_allclose(seen, images / 257, atol=0.5)
    rows = sample_rows(seen, None, seen, extractor("pixels"), features="pixels", parts=["kid"])
    assert np.isfinite(rows["kid, pixels"]["value"])


def test_networks_name_the_nearest_size():
    for build, size, said in (
        (NaiveUnet, (40, 64), "multiples of 32, got 40×64; the nearest is 32×64"),
        (lambda *how: Unet(*how, patch=2), (28, 3), r"of 8 \(3 levels and patches of 2 pixels\), got 28×3; .* 32×8"),
    ):
        with pytest.raises(ValueError, match=said):
            build((*size, 3), 8)
