"""`my_sample` and the sampling script."""

import shutil

import keras
import numpy as np
import pytest
from PIL import Image

import parts
import reverse_diffusion as rd


@pytest.fixture
def model(trained):
    return str(trained[0] / "model.keras")


def sample(model, n, **more):
    return rd.my_sample(None, n, model, seed=more.pop("seed", 5), verbose=0, **more)


def test_an_int16_array_of_pictures(model):
    pictures = sample(model, 2)
    assert pictures.shape == (2, 32, 32, 3) and pictures.dtype == np.int16
    assert pictures.min() >= 0 and pictures.max() <= 255 and pictures.std() > 5


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(model):
    np.testing.assert_array_equal(sample(model, 2), sample(model, 2))
    assert np.any(sample(model, 2) != sample(model, 2, seed=6))
    assert np.any(sample(model, 2, seed=None) != sample(model, 2, seed=None))


def test_a_picture_depends_neither_on_their_number_nor_on_the_batches(model, monkeypatch):
    seven = sample(model, 7)
    monkeypatch.setattr(parts, "LARGEST_BATCH", 3)
    in_batches = sample(model, 7)
    assert np.abs(seven - in_batches).max() <= 1  # rounding
    assert np.abs(seven[:2] - sample(model, 2)).max() <= 1
    assert len({picture.tobytes() for picture in seven}) == 7


def test_one_compiled_step_is_kept_and_an_incomplete_batch_needs_no_other(model, monkeypatch):
    monkeypatch.setattr(parts, "LARGEST_BATCH", 4)
    rd.compiled_step.cache_clear()
    sample(model, 6)
    sample(model, 5)
    loaded = rd.load(*rd.load_key(model))
    step, _ = rd.compiled_step(loaded, "beta", True, 3)
    assert rd.compiled_step.cache_info().misses == 1
    assert step.experimental_get_tracing_count() == 1


def test_variance_and_clipping_matter(model):
    plain = sample(model, 2)
    assert np.any(sample(model, 2, variance="posterior") != plain)
    assert np.any(sample(model, 2, clip=False) != plain)


def test_a_changed_file_is_loaded_anew(model, tmp_path):
    copy = str(tmp_path / "model.keras")
    shutil.copy(model, copy)
    before = sample(copy, 2)
    assert rd.load(*rd.load_key(copy)) is rd.load(*rd.load_key(copy))
    changed = keras.models.load_model(copy)
    changed.set_weights([w + 0.05 for w in changed.get_weights()])
    changed.save(copy)
    assert np.any(sample(copy, 2) != before)


def test_a_loaded_model_does_as_well_as_its_path(model):
    np.testing.assert_array_equal(sample(keras.models.load_model(model), 2), sample(model, 2))


@keras.saving.register_keras_serializable("Tests")
class GaussianPredictor(keras.layers.Layer):
    """The best noise predictor there is for data N(mean, deviation²), with the slides' schedule."""

    MEAN, DEVIATION = -0.2, 0.25

    def call(self, inputs):
        x_t, t_input = inputs
        alphabar = np.cumprod([1, *(1 - np.linspace(1e-4, 0.02, 1000))])
        t = keras.ops.cast(keras.ops.round(t_input * 1000), "int32")
        ab = keras.ops.reshape(keras.ops.take(keras.ops.convert_to_tensor(alphabar, "float32"), t), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * (x_t - ab**0.5 * self.MEAN) / (ab * self.DEVIATION**2 + 1 - ab)


def test_a_model_without_settings_gets_the_schedule_of_the_slides_and_the_sampler_is_exact():
    image, t = keras.Input((32, 32, 1)), keras.Input((1,))
    model = keras.Model([image, t], GaussianPredictor()([image, t]))
    values = sample(model, 64) / 127.5 - 1
    assert values.mean() == pytest.approx(GaussianPredictor.MEAN, abs=0.005)
    assert values.std() == pytest.approx(GaussianPredictor.DEVIATION, abs=0.005)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"image_shape": (64, 64, 3)}, r"\(32, 32, 3\)"),
        ({"n_sample": 0}, "n_sample"),
        ({"n_sample": 1.5}, "n_sample"),
        ({"seed": -1}, "seed"),
        ({"variance": "small"}, "'beta' or 'posterior'"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(model, wrong, word):
    with pytest.raises(ValueError, match=word):
        rd.my_sample(**{"model": model, "verbose": 0, **wrong})


def test_a_missing_model_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python diffusion_model.py"):
        rd.my_sample(model=tmp_path / "model.keras")


def test_importing_takes_no_time_and_prints_nothing(run):
    code = (
        "import time; start = time.perf_counter(); import reverse_diffusion, sys; "
        "assert not {'tensorflow', 'keras', 'unet', 'ddpm'} & set(sys.modules); print(time.perf_counter() - start)"
    )
    process = run("-c", code)
    assert process.returncode == 0 and process.stderr == ""
    assert float(process.stdout) < 0.3


def test_the_lines_of_the_slides(run, model_folder):
    process = run(
        "-c", "import matplotlib.pyplot as plt\nimport reverse_diffusion as rd\na = rd.my_sample()\nplt.imshow(a[0])"
    )
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.splitlines()[0] == "t = 20" and process.stdout.splitlines()[-1] == "t = 0"


def test_the_script_writes_a_grid_and_the_array(run, model_folder):
    process = run("reverse_diffusion.py", "--n-sample", "5", "--out", "grid.png", "--npy", "a.npy", "--seed", "5")
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.startswith("reverse_diffusion.py: starting TensorFlow")
    pictures = np.load(model_folder / "a.npy")
    np.testing.assert_array_equal(pictures, sample(str(model_folder / "model.keras"), 5))
    grid = np.asarray(Image.open(model_folder / "grid.png"))
    assert grid.shape == (2 * 34, 3 * 34, 3)
    np.testing.assert_array_equal(grid[1:33, 35:67], pictures[1])


@pytest.mark.parametrize(
    "options, status, words",
    [
        (("--model", "nowhere.keras"), 2, ("nowhere.keras", "diffusion_model.py")),
        (("--model", "text.keras"), 2, ("text.keras", "not a Keras model")),
        (("--n-sample", "0"), 2, ("--n-sample",)),
        (("--out", "grid"), 2, ("--out", "grid")),
        (("--out", "nowhere/grid.png"), 2, ("nowhere",)),
        (("--npy", "a.txt"), 2, ("--npy", "a.txt")),
        (("--variance", "small"), 2, ("--variance", "small")),
    ],
)
def test_wrong_use_of_the_script_is_answered_in_one_sentence(run, tmp_path, options, status, words):
    (tmp_path / "text.keras").write_text("hello")
    process = run("reverse_diffusion.py", *options)
    assert process.returncode == status
    assert len(process.stderr.splitlines()) == 1
    for word in words:
        assert word in process.stderr
