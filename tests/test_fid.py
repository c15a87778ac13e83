"""FIDs: statistics of features, their files, the options around them, and the network of torch-fidelity."""

import functools
import json
import sys
import urllib.error

import numpy as np
import pytest

import evaluate
from data import drawings
from evaluation import features, metrics, statistics
from evaluation import samples as samples_module
from evaluation.statistics import Statistics

NETWORK = "inception-v3-compat"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # the name under which torch-fidelity looks for them


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_of_blocks_are_those_of_all_rows(rng):
    rows = rng.normal(1e6, 1, (50, 4)) @ rng.normal(size=(4, 4))  # sums of squares would lose 12 of 16 digits
    for ends in (50,), (1, 2, 30, 50), (49, 50):
        blocks = np.split(rows, ends[:-1])
        found = statistics.gather_statistics(iter(blocks))
        np.testing.assert_allclose(found.mu, rows.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(found.sigma, np.cov(rows.T), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("blocks", [[], [np.zeros((1, 3))]])
def test_statistics_need_two_images(blocks):
    with pytest.raises(ValueError, match=f"at least 2 images, got {len(blocks)}"):
        statistics.gather_statistics(blocks)


def rotated(rng, variances):
    """A covariance with these variances along random axes, and these axes."""
    axes = np.linalg.qr(rng.normal(size=(len(variances), len(variances))))[0]
    return axes * variances @ axes.T, axes


def test_distance_of_gaussians_on_common_axes_is_the_closed_form(rng):
    """Σ (Δμ)² + Σ (√a − √b)², also where variances are 0."""
    a, b = np.array([4.0, 1.0, 0.25, 0.0, 0.0]), np.array([1.0, 9.0, 0.0, 2.0, 0.0])
    sigma, axes = rotated(rng, a)
    mu, other = rng.normal(size=(2, 5))
    expected = np.sum((mu - other) ** 2) + np.sum((a**0.5 - b**0.5) ** 2)
    found = metrics.frechet_distance(Statistics(mu, sigma), Statistics(other, axes * b @ axes.T))
    assert found == pytest.approx(expected, abs=1e-6)


def test_distance_of_gaussians_on_other_axes_is_the_closed_form(rng):
    """Of a 2×2 matrix with positive eigenvalues, tr √M = √(tr M + 2 √det M)."""
    (one, _), (other, _) = rotated(rng, np.array([3.0, 0.5])), rotated(rng, np.array([1.0, 7.0]))
    product = one @ other
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    found = metrics.frechet_distance(Statistics(np.zeros(2), one), Statistics(np.ones(2), other))
    assert found == pytest.approx(2 + 3.5 + 8 - 2 * root, rel=1e-12)


def test_sets_beyond_a_chunk_are_compared_in_full(rng):
    """KID, precision and recall of more images than are compared at once, against whole matrices."""
    real, samples = rng.normal(size=(600, 3)), rng.normal(0.3, 1, (300, 3))

    def kernel(x, y):
        return (np.einsum("id,jd->ij", x, y) / 3 + 1) ** 3

    def within(x):
        return np.mean(kernel(x, x)[~np.eye(len(x), dtype=bool)])

    def among(points, centres):
        to_centres, between = (np.linalg.norm(p[:, None] - centres, axis=-1) for p in (points, centres))
        return np.mean(np.any(to_centres <= np.sort(between)[:, 3], axis=1))

    expected = within(real) + within(samples) - 2 * kernel(real, samples).mean()
    assert metrics.kid(real, samples) == pytest.approx(expected, rel=1e-9)
    assert metrics.precision(real, samples) == among(samples, real)
    assert metrics.recall(real, samples) == among(real, samples)


# --- files ------------------------------------------------------------------------------------------------------------


def test_statistics_are_read_as_they_were_written(rng, tmp_path):
    path, sigma = str(tmp_path / "some.npz"), np.cov(rng.normal(size=(3, 20)))
    statistics.save_statistics(Statistics(np.arange(3.0), sigma), path)
    with np.load(path) as file:  # as other programs do
        assert sorted(file) == ["mu", "sigma"] and file["sigma"].dtype == np.float64
    for loaded, wanted in zip(statistics.load_statistics(path, 3), (np.arange(3.0), sigma), strict=True):
        np.testing.assert_array_equal(loaded, wanted)
    np.savez(path, mu=np.zeros(3, np.float32), sigma=sigma.astype(np.float32), mu_s=0)  # those of guided-diffusion
    assert statistics.load_statistics(path, 3).sigma.dtype == np.float64


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"images": np.zeros(3)}, "must hold the arrays mu and sigma, and has images"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, r"mu of shape \(2,\) .* must be \(3,\) and \(3, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.ones(3)}, r"sigma of shape \(3,\)"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3, dtype=int)}, "not finite floating-point"),
        ({"mu": np.zeros(3), "sigma": np.tri(3)}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "negative variances"),
    ],
)
def test_files_without_statistics_are_one_sentence(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"--statistics .*a.npz .*{words}"):
        statistics.load_statistics(str(tmp_path / "a.npz"), 3)


def test_files_that_are_no_archives_are_one_sentence(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        statistics.load_statistics(str(path), 3)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    for content in path.read_bytes()[:200], b"text", b"":
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete .npz file"):
            statistics.load_statistics(str(path), 3)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="must hold the arrays mu and sigma, and has neither"):
        statistics.load_statistics(str(path), 3)


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_fid(tiny_folder, monkeypatch, run_here):
    """`run_here` on small models and images; pixels stand in for the network of FIDs."""
    monkeypatch.setitem(
        features.KNOWN, "fid", lambda: lambda images: images[..., 0].reshape(len(images), -1)[:, :12] / 255.0
    )
    images = np.random.default_rng(1).integers(0, 256, (2, 60, 8, 8), np.uint8)
    for name, array in zip(("real", "samples"), images, strict=True):
        np.save(f"{name}.npy", array)
    return functools.partial(run_here, "--samples", "samples.npy")


def rows_written():
    with open("model-evaluation.json", encoding="ascii") as file:
        return json.load(file)


def test_the_fid_is_measured_to_images_and_to_their_statistics(run_fid, monkeypatch):
    """Against the eigenvalues of C₁C₂, from features of which only some are held at once."""
    monkeypatch.setattr(samples_module, "BLOCK", 17)
    fid = ("--features", "fid", "--only", "fid")
    process = run_fid("--data", "real.npy", *fid, "--save-statistics", "real.npz")
    assert process.returncode == 0, process.stderr
    one, other = (
        np.load(f"{name}.npy").reshape(60, -1)[:, :12].astype(np.float64) / 255 for name in ("real", "samples")
    )
    c1, c2 = np.cov(one.T), np.cov(other.T)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    expected = np.sum((one.mean(0) - other.mean(0)) ** 2) + np.trace(c1 + c2) - 2 * roots
    assert rows_written()["FID"]["value"] == pytest.approx(expected, rel=1e-9)
    assert rows_written()["FID"]["remark"] == "of 60 samples and 60 images; published FIDs are of 50,000 of each"
    assert run_fid("--statistics", "real.npz", *fid).returncode == 0  # without the images
    assert rows_written()["FID"]["value"] == pytest.approx(expected, rel=1e-9)
    assert rows_written()["statistics"] == "real.npz" and rows_written()["data"] is None


def test_the_fid_is_a_row_beside_the_other_distances(run_fid):
    options = ("--data", "real.npy", "--only", "kid,frechet,precision,recall,fid", "--features", "fid")
    process = run_fid(*options)
    assert process.returncode == 0, process.stderr
    rows = rows_written()
    assert [name for name in rows if "fid" in name.lower()] == [
        *("FID", "kid, fid", "frechet, fid", "precision, fid", "recall, fid")
    ]
    assert rows["FID"]["value"] == pytest.approx(rows["frechet, fid"]["value"], rel=1e-9)


@pytest.mark.parametrize("name, without", [("fid", "frechet"), ("pixels", "fid")])
def test_the_frechet_distance_is_measured_once_by_default(name, without):
    options = evaluate.parse_options(["--data", "real.npy", "--features", name])
    assert set(evaluate.PARTS) - set(options.only) == {without}


@pytest.mark.parametrize(
    "options, words",
    [
        (("--data", "real.npy", "--only", "fid"), "--only fid needs --features fid"),
        (("--features", "fid"), "required: --data"),
        (("--features", "fid", "--only", "fid"), "required: --data"),
        (("--features", "fid", "--statistics", "wrong.npz"), "required: --data"),
        (("--features", "fid", "--statistics", "wrong.npz", "--only", "fid,kid"), "required: --data"),
        (("--data", "real.npy", "--statistics", "wrong.npz"), "are for the FID; add --features fid"),
        (("--data", "real.npy", "--features", "fid", "--only", "kid", "--save-statistics", "a.npz"), "are for the FID"),
        (("--data", "real.npy", "--features", "fid", "--save-statistics", "wrong.npz"), "wrong.npz exists; read it"),
        (("--data", "real.npy", "--features", "fid", "--save-statistics", "a.txt"), "must end in .npz, got a.txt"),
        (("--data", "real.npy", "--features", "fid", "--save-statistics", "none/a.npz"), "no folder for --save-stat"),
        (("--features", "fid", "--only", "fid", "--statistics", "wrong.npz"), "must be (12,) and (12, 12)"),
        (("--features", "fid", "--only", "fid", "--statistics", "none.npz"), "none.npz: there is no such file"),
        (
            ("--data", "real.npy", "--features", "fid", "--statistics", "wrong.npz", "--save-statistics", "a.npz"),
            "omit one of both",
        ),
        (
            ("--data", "real.npy", "--features", "fid", "--statistics", "wrong.npz", "--out", "wrong.npz"),
            "--out wrong.npz would overwrite",
        ),
    ],
)
def test_wrong_statistics_are_one_sentence_before_the_long_work(run_fid, monkeypatch, options, words):
    monkeypatch.setattr(samples_module, "sample_rows", pytest.fail)
    np.savez("wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    process = run_fid(*options)
    assert process.returncode == 2 and words in process.stderr and len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["fid", "vgg16"])
def test_a_missing_package_is_a_sentence_with_its_command(monkeypatch, name):
    for module in "torch", "torch_fidelity":
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        features.extractor(name)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """torch-fidelity, which looks for weights in a folder of the test."""
    monkeypatch.setitem(sys.modules, "triton", None)  # as the extractor does, to import torch after TensorFlow
    package = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity, see requirements-optional.txt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return package


@pytest.fixture
def random_weights(package, tmp_path, monkeypatch):
    """A file of random weights as the package downloads it."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with monkeypatch.context() as without_weights:
        without_weights.setattr(module, "load_state_dict_from_url", lambda *more, **named: {})
        without_weights.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *more: None)
        network = module.FeatureExtractorInceptionV3(NETWORK, ["2048"])
    for weight in (layer.weight for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(weight)  # with smaller ones all features would be nearly 0
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / WEIGHTS)


def test_all_distances_are_those_of_the_package(package, random_weights):
    import torch

    class Images(torch.utils.data.Dataset):  # the package asks for its type
        def __init__(self, tensor):
            self.tensor = tensor

        def __len__(self):
            return len(self.tensor)

        def __getitem__(self, index):
            return self.tensor[index]

    sets = [drawings.draw_cats(32, count=12, seed=seed) for seed in (0, 1)]
    sets[1][:5] //= 4
    tensors = [Images(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())) for images in sets]
    kinds = {"fid": True, "kid": True, "prc": True, "kid_subsets": 1, "kid_subset_size": 12}
    theirs = package.calculate_metrics(
        input1=tensors[0],
        input2=tensors[1],
        feature_extractor=NETWORK,
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        **kinds,
    )
    assert theirs["frechet_inception_distance"] > 0.1 and 0 < theirs["precision"] < 1
    parts = ("fid", "kid", "precision", "recall")
    rows = samples_module.sample_rows(
        sets[0], None, sets[1], features.extractor("fid"), features="fid", parts=parts, cache=None
    )
    for name, key in (
        ("FID", "frechet_inception_distance"),
        ("kid, fid", "kernel_inception_distance_mean"),
        ("precision, fid", "precision"),
        ("recall, fid", "recall"),
    ):
        assert rows[name]["value"] == pytest.approx(theirs[key], rel=1e-4), name


def test_images_that_are_not_quantised_are_refused(random_weights):
    extract = features.extractor("fid")
    for images in np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 5), np.uint8):
        with pytest.raises(ValueError, match="take uint8 images with 1 or 3 channels"):
            extract(images)


@pytest.mark.parametrize("found", [None, b"half a file"])
def test_weights_of_the_package_that_are_missing_are_a_sentence(package, tmp_path, monkeypatch, found):
    from torch import hub

    def offline(*more, **named):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(hub, "download_url_to_file", offline)
    if found:
        (tmp_path / "hub" / "checkpoints" / WEIGHTS).write_bytes(found)
    with pytest.raises(OSError, match=f"cannot be loaded .*; download https.*{WEIGHTS} and put the file into .*hub"):
        features.extractor("fid")
