"""The figures: made by the script as files, and what is in them."""

import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_guidance import conditional
from test_sampling import light_model

import ddpm
import figures
import reverse_diffusion as rd
from diffusion import model_file, sampling
from diffusion.schedules import SCHEDULES, make_schedule
from support import plots
from unet import NaiveUnet


@pytest.fixture(autouse=True)
def no_window():
    import matplotlib

    matplotlib.use("agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_the_script_writes_every_figure(run, tiny_folder):
    process = run("figures.py", "--out", "images")
    assert process.returncode == 0, process.stderr
    names = [name for name in figures.ALL if name not in ("network", "classes")]  # which this model does not have
    for name in names:
        with Image.open(tiny_folder / "images" / f"{name}.{'gif' if name == 'gif' else 'png'}") as image:
            assert min(image.size) > 100
            assert image.convert("L").getextrema() != (255, 255)
            if name == "gif":
                assert image.n_frames == 21  # each of the 20 steps, and the noise
    assert len(process.stdout.splitlines()) == 1 + len(names)


def test_the_figure_classes_needs_a_model_with_classes(draw):
    status, said, _ = draw("--only", "classes")
    assert status == 2 and len(said) == 1 and "no classes" in said[0]


def test_the_network_of_the_slides_is_drawn_with_its_sizes(draw, tmp_path):
    model = NaiveUnet((32, 32, 3), 8)
    texts = " ".join(text.get_text() for text in figures.network(model).axes[0].texts)
    for size in "32×32×3", "32×32×8", "16×16×8", "8×8×16", "4×4×16", "1×1×16":
        assert size in texts
    chosen = figures.choose_figures(None, model_file.describe(model), None, str(tmp_path / "slides.csv"))
    assert chosen == [name for name in figures.ALL if name not in ("training", "classes")]

    model_file.metadata(model)["diffusion"] = {"beta1": 1e-4, "beta2": 0.5, "T": 20}
    model.save(tmp_path / "slides.keras")
    assert draw("--model", "slides.keras", "--only", "network") == (0, [], ["network.png"])
    with Image.open(tmp_path / "figures" / "network.png") as image:
        assert min(image.size) > 100 and image.convert("L").getextrema() != (255, 255)


def test_a_notebook_keeps_its_own_matplotlib(monkeypatch):
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    monkeypatch.setenv("MPLBACKEND", "svg")
    matplotlib.use("svg")
    with matplotlib.rc_context({"figure.facecolor": "0.5"}):
        figure = figures.schedule(ddpm.ddpm_schedule())
    assert isinstance(figure.canvas, FigureCanvasSVG) and figure.get_facecolor() == (0.5, 0.5, 0.5, 1)
    assert os.environ["MPLBACKEND"] == "svg" and matplotlib.get_backend() == "svg"


def luminance(colour):
    """Of a colour, as WCAG defines it for the contrast of text."""
    from matplotlib.colors import to_rgb

    return np.dot(
        [0.2126, 0.7152, 0.0722], [(c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4) for c in to_rgb(colour)]
    )


def test_figures_in_a_notebook_suit_light_and_dark_themes():
    import matplotlib
    from matplotlib.colors import to_rgba

    with matplotlib.rc_context():
        plots.draw_for_notebooks()
        curves, drawn = figures.schedule(ddpm.ddpm_schedule()), figures.network(NaiveUnet((32, 32, 3), 8))
        text = curves.axes[0].xaxis.label.get_color()
    assert to_rgba(curves.axes[0].get_facecolor())[3] == 0
    for background in "white", "#111111":  # of JupyterLab's themes
        low, high = sorted((luminance(text), luminance(background)))
        assert (high + 0.05) / (low + 0.05) > 4
    boxes, texts = drawn.axes[0].patches, [text for text in drawn.axes[0].texts if "×" in text.get_text()]
    assert len(boxes) == len(texts) == 11
    for box, text in zip(boxes, texts, strict=True):  # black on light, whatever the theme
        assert to_rgba(box.get_facecolor())[3] == 1 and luminance(box.get_facecolor()[:3]) > 0.5
        assert text.get_color() == "black"


USERS_STYLE = """
text.usetex: True
figure.facecolor: black
savefig.facecolor: black
savefig.bbox: tight
savefig.format: pdf
font.family: no such font
"""


@pytest.fixture
def draw(tiny_trained, tmp_path, monkeypatch, capsys):
    """A function that runs figures.py here for a small trained model: exit status, lines on stderr, files written."""
    import matplotlib

    def main(*words):
        monkeypatch.setattr("sys.argv", ["figures.py", "--model", str(tiny_trained / "model.keras"), *words])
        monkeypatch.setenv("MPLBACKEND", "agg")
        monkeypatch.chdir(tmp_path)
        try:
            with matplotlib.rc_context():
                figures.main()
            status = 0
        except SystemExit as end:
            status = end.code
        written = sorted(os.listdir("figures")) if os.path.exists("figures") else []
        return status, capsys.readouterr().err.splitlines(), written

    return main


def test_a_figure_that_fails_stops_no_other(draw, monkeypatch):
    def fail(error):
        raise error

    monkeypatch.setattr(figures, "reverse_gif", lambda *_, **__: fail(OSError("the disk is full")))
    monkeypatch.setattr(figures, "schedule", lambda *_: fail(RuntimeError("no font\nno figure")))
    status, said, written = draw("--only", "gif,schedule,training")
    assert said == ["figures.py: gif: the disk is full", "figures.py: schedule: RuntimeError: no font no figure"]
    assert status == 1 and written == ["training.png"]
    status, said, written = draw("--only", "forward,training", "--data", "nowhere")
    assert status == 2 and len(said) == 1 and "forward" in said[0] and "nowhere" in said[0]


def test_the_settings_of_the_user_change_no_figure(draw, tmp_path, monkeypatch):
    """Neither the backend nor the style of a matplotlibrc; there is no LaTeX to typeset text with."""
    import matplotlib

    (tmp_path / "matplotlibrc").write_text(USERS_STYLE)
    monkeypatch.setenv("PATH", "")
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        matplotlib.use("svg")
        assert draw("--only", "schedule") == (0, [], ["schedule.png"])
    with Image.open(tmp_path / "figures" / "schedule.png") as image:
        assert image.size == (9 * 120, 3.2 * 120) and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_forward_goes_from_the_image_to_noise():
    sched = ddpm.ddpm_schedule(1e-4, 0.02, 1000)
    image = np.full((32, 32, 3), 200, np.uint8)
    figure = figures.forward(image, sched)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert [axis.get_title() for axis in figure.axes] == [f"t = {t}" for t in figures.STEPS]
    np.testing.assert_array_equal(shown[0], image)
    spread = [np.std(image) for image in shown]
    assert sorted(spread) == spread and spread[-1] > 60


def test_an_interpolation_ends_at_the_images_of_two_noises():
    """In between DDIM, η = 0, starts from the point of the circle halfway between the noises."""
    model = light_model()
    figure = figures.interpolation(model, count=3, seed=4)
    shown = np.stack([axis.images[0].get_array() for axis in figure.axes]).astype(int)[..., None]
    one, other = sampling.standard_normal(4, 20 + 1, tf.range(2), (8, 8, 1))  # x_T of T = 20
    noise = np.stack([one, (one + other) / np.sqrt(2), other])
    expected = rd.my_sample(model=model, n_sample=3, noise=noise, sampler="ddim", steps=20, verbose=0)
    np.testing.assert_allclose(shown, expected, atol=1)
    alone = rd.my_sample(model=model, n_sample=2, seed=4, sampler="ddim", steps=20, verbose=0)
    np.testing.assert_allclose(shown[::2], alone, atol=1)
    assert np.ptp(shown) > 50


def test_classes_are_rows_and_guidances_are_columns():
    """ε̂ = x_t / 2 + a constant for each class: what is guided away from "no class" becomes brighter or darker."""
    model = conditional((0.0, 0.2, -0.2), ["dark", "bright"])
    figure = figures.classes(model, guidance=(0, 1, 3), count=1)
    shown = np.array([axis.images[0].get_array().mean() for axis in figure.axes]).reshape(2, 3)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["g = 0", "g = 1", "g = 3"]
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["dark", "bright"]
    assert shown[0, 0] == shown[1, 0] and np.all(np.diff(shown[0]) < 0) and np.all(np.diff(shown[1]) > 0)


def test_figures_that_a_model_lacks_are_left_out_or_refused(tmp_path):
    table = tmp_path / "model.csv"
    model = model_file.describe(conditional((0.0, 0.2, -0.2), ["dark", "bright"]))
    assert figures.choose_figures(["classes"], model, None, table) == ["classes"]
    assert figures.choose_figures(None, model, None, table) == [
        name for name in figures.ALL if name not in ("network", "training")
    ]
    for name, why in ("network", "network of the slides"), ("training", "there is no table .*model.csv"):
        with pytest.raises(ValueError, match=f"^--only {name}: .*{why}"):
            figures.choose_figures(["schedule", name], model, None, table)


def test_the_image_of_a_model_without_a_source_needs_data():
    with pytest.raises(ValueError, match="--data"):
        figures.load_image(None, (8, 8, 1), 0)


def test_the_script_names_the_schedule_of_the_model(draw, monkeypatch):
    """One that is not the default."""
    model = light_model()
    diffusion = model_file.metadata(model)["diffusion"]
    diffusion |= {"schedule": "sigmoid"}
    monkeypatch.setattr(model_file, "open_with_schedule", lambda path: model_file.describe(model))
    legends = []
    schedule = figures.schedule
    monkeypatch.setattr(
        figures, "schedule", lambda *a: legends.append(schedule(*a).axes[1].get_legend()) or schedule(*a)
    )
    assert draw("--only", "schedule")[0] == 0
    assert [text.get_text() for text in legends[0].get_texts()] == ["sigmoid"]


def test_schedules_are_all_drawn_however_many(monkeypatch):
    """Nine of them, one more than there are colours; the first eight can be told apart."""
    names = [*SCHEDULES, *(f"schedule {k}" for k in range(len(SCHEDULES), 9))]
    for name in names:
        monkeypatch.setitem(SCHEDULES, name, SCHEDULES["cosine"])
    _, right = figures.schedules(T=10).axes
    assert [text.get_text() for text in right.get_legend().get_texts()] == names
    colours = [line.get_color() for line in right.get_legend().get_lines()]
    assert len(set(colours[:8])) == 8 and colours[8] == colours[0]


@pytest.mark.parametrize("T, shown", [(10, [0, 1, 2, 5, 10]), (1, [0, 1])])
def test_steps_of_a_short_process_are_each_shown_once(T, shown):
    """Fractions of T that round to the same step."""
    model = light_model(T)
    titles = [f"t = {t}" for t in shown]
    figure = figures.reverse(model)
    assert [axis.get_title() for axis in figure.axes[: len(shown)]] == titles[::-1]
    figure = figures.forward(np.zeros((8, 8, 1), np.uint8), model_file.describe(model).sched)
    assert [axis.get_title() for axis in figure.axes] == titles


@pytest.mark.filterwarnings("error")
def test_axes_show_values_that_have_no_logarithm(tmp_path):
    """A schedule of pure noise alone, and losses of networks that learn the variance."""
    figures.schedule(make_schedule(T=1, schedule="cosine", zero_snr=True)).canvas.draw()
    rows = [["epoch", "step", "loss_sum", "loss_mean", "seconds", "images_per_second", "learning_rate"]]
    rows += [[epoch, epoch, loss, loss, 1, 1, 0.1] for epoch, loss in enumerate((0.5, 0, -0.25))]
    (tmp_path / "model.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    figure = figures.training(str(tmp_path / "model.csv"))
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    assert low < -0.25 and high > 0.5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_table_of_a_spreadsheet_is_drawn(tmp_path, encoding):
    """As one saves it where 0,5 stands for 0.5; the rows are of the earliest version, which held nothing out."""
    rows = "epoch;step;loss_sum;loss_mean;seconds;images_per_second;learning_rate", "0;3;1,5;0,5;1;1;0,001"
    text = "\r\n".join([*rows, "1;6;0,75;0,25;1;1;0,0005", ""])
    (tmp_path / "model.csv").write_bytes(text.encode(encoding))
    loss, rate = (axis.lines[0] for axis in figures.training(str(tmp_path / "model.csv")).axes)
    assert list(loss.get_xdata()) == [0, 1] and list(loss.get_ydata()) == [0.5, 0.25]
    assert list(rate.get_ydata()) == [0.001, 0.0005]


def test_a_model_without_a_table_has_no_figure_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no table .*model.csv"):
        figures.training(str(tmp_path / "model.csv"))


def test_a_table_without_epochs_is_refused(tmp_path):
    (tmp_path / "model.csv").write_text("epoch,step,loss_sum,loss_mean,seconds,images_per_second,learning_rate\n")
    with pytest.raises(ValueError, match="no rows yet"):
        figures.training(tmp_path / "model.csv")


@pytest.mark.parametrize("out", ["taken", "taken/figures", "folder"])
def test_an_unusable_place_for_files_is_refused_at_once(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "taken").write_text("precious")
    (tmp_path / "folder" / "schedule.png").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = light_model()
    monkeypatch.setattr(model_file, "open_with_schedule", lambda path: model_file.describe(model))
    monkeypatch.setattr(figures, "schedule", pytest.fail)
    monkeypatch.setattr("sys.argv", ["figures.py", "--out", out, "--only", "schedule"])
    with pytest.raises(SystemExit) as stop:
        figures.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and out in error
    assert (tmp_path / "taken").read_text() == "precious"
