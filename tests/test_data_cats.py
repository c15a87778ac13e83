"""`python -m data cats`: the archives, the download and the prepared file."""

import contextlib
import http.server
import os
import socket
import sys
import threading
import types
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from data_helpers import RED, WHITE, assert_plain, encode, jpeg, noise, pack, posix, python, write
from PIL import Image

import data
from data import __main__ as command
from data import cats, load_images


def shade(animal, k):
    """The colour of the k-th photograph in the archives of these tests."""
    return (15 * k, 60, 40) if animal == "cat" else (40, 15 * k, 220)


def microsoft():
    """PetImages/Cat/0.jpg …, cats 3 and 666 and dog 1 broken as in the original, and other files between."""
    members = {"PetImages/": b""}
    for folder in "Dog", "Cat":
        members[f"PetImages/{folder}/"] = b""
        members |= {f"PetImages/{folder}/{k}.jpg": jpeg(shade(folder.lower(), k)) for k in (10, 2, 0, 1, 3, 12)}
        members[f"PetImages/{folder}/Thumbs.db"] = b"\xd0\xcf\x11\xe0" + bytes(500)
    for broken in "PetImages/Cat/3.jpg", "PetImages/Dog/1.jpg":
        members[broken] = members[broken][: len(members[broken]) // 2]
    members |= {
        "PetImages/Cat/666.jpg": b"",
        "__MACOSX/PetImages/Cat/._0.jpg": b"of a file system",
        "__MACOSX/PetImages/Cat/5.jpg": jpeg(WHITE),
        "CDLA-Permissive-2.0.pdf": b"%PDF-1.5",
        "readme[1].txt": b"Once upon a time",
    }
    return pack(members, zipfile.ZIP_DEFLATED)


def kaggle():
    photographs = {f"train/{a}.{k}.jpg": jpeg(shade(a, k)) for a in ("cat", "dog") for k in (0, 1, 10, 2)}
    return pack({"train/": b"", **photographs})


CATS = [("cat", k) for k in (0, 1, 2, 10, 12)]
DOGS = [("dog", k) for k in (0, 2, 3, 10, 12)]
MICROSOFT = microsoft()
HALF = MICROSOFT[: len(MICROSOFT) // 2]


def assert_prepared(path, expected, size=16):
    """That a prepared file holds these (animal, number) in any order, labelled."""
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["class_names", "images", "labels", "photographs"]
        assert list(archive["class_names"]) == ["cat", "dog"]
        images, labels = archive["images"], archive["labels"]
        assert archive["photographs"].shape == () and archive["photographs"].dtype == bool and archive["photographs"]
    assert images.dtype == np.uint8 and images.shape == (len(expected), size, size, 3)
    assert labels.dtype == np.uint8 and labels.shape == (len(expected),)
    found = set()
    for image, label in zip(images, labels, strict=True):
        animal = ["cat", "dog"][label]
        number = min(range(13), key=lambda k: np.abs(image - np.array(shade(animal, k), float)).sum())
        assert_plain(image, shade(animal, number), 4)
        found.add((animal, number))
    assert found == set(expected)


def assert_failed_in_a_sentence(done, status=1):
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("python -m data cats: ") and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs `python -m data` in this process, and returns what a finished process would."""
    timeout = socket.getdefaulttimeout()

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["data", *map(str, options)])
        capsys.readouterr()
        status = 0
        try:
            command.main()
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        return types.SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)

    yield run
    socket.setdefaulttimeout(timeout)


@pytest.mark.parametrize("animals", [None, "cats", "dogs", "both"])
def test_microsoft_s_archive_is_prepared(tmp_path, run, animals):
    write(tmp_path, {"pets.zip": MICROSOFT})
    out = tmp_path / "result" / "pets.npz"
    out.parent.mkdir()
    options = ("cats", "--archive", tmp_path / "pets.zip", "--image-size", "16", "--out", out)
    done = run(*options, "--animals", animals) if animals else python("-m", "data", *options)
    assert done.returncode == 0 and done.stderr == ""
    expected = {None: CATS, "cats": CATS, "dogs": DOGS, "both": CATS + DOGS}[animals]
    assert_prepared(out, expected)
    assert os.listdir(out.parent) == ["pets.npz"]
    broken = {None: 2, "cats": 2, "dogs": 1, "both": 3}[animals]
    assert f"{broken} file{'s' * (broken > 1)} skipped: " in done.stdout
    assert ("Cat/3.jpg" in done.stdout) == (animals != "dogs")
    assert ("Dog/1.jpg" in done.stdout) == (animals in ("dogs", "both"))
    assert f"\n{len(expected)} images" in done.stdout

    images, report = load_images(out, 16)
    assert images.shape == (len(expected), 16, 16, 3)
    assert report.photographs is True and report.notes == []


def test_kaggle_s_archive_is_prepared_in_the_default_size(tmp_path, run):
    write(tmp_path, {"train.zip": kaggle()})
    out = tmp_path / "both.npz"
    done = run("cats", "--archive", tmp_path / "train.zip", "--animals", "both", "--out", out)
    assert done.returncode == 0 and done.stderr == "" and "skipped" not in done.stdout
    assert_prepared(out, [(animal, k) for animal in ("cat", "dog") for k in (0, 1, 2, 10)], size=64)


def test_the_source_cats_is_prepared_if_it_is_missing(tmp_path, monkeypatch, capsys):
    write(tmp_path, {"pets.zip": MICROSOFT})
    monkeypatch.setattr(cats, "CATS", str(tmp_path / "cats64.npz"))
    downloads = []
    monkeypatch.setattr(cats, "download", lambda: downloads.append(1) or tmp_path / "pets.zip")
    images, report = load_images("cats", 16, classes=True)
    assert_prepared(tmp_path / "cats64.npz", CATS, 64)
    assert capsys.readouterr().out == "the cats of the slides are not prepared yet: 800 MB to download, once\n"
    assert images.shape == (len(CATS), 16, 16, 3) and report.source == "cats" and report.photographs
    assert len(report.skipped) == 2 and "licence CDLA-Permissive-2.0" in report.origin
    again, report = load_images("cats", 16, channels=1, classes=True)
    assert again.shape == (len(CATS), 16, 16, 1) and report.labels.tolist() == [0] * len(CATS)
    assert report.classes == ["cat", "dog"] and report.skipped == [] and len(downloads) == 1
    assert capsys.readouterr().out == ""


@posix
def test_preparing_unpacks_nothing_and_survives_a_full_disk(tmp_path):
    """In a process that can write no file of more than 50,000 bytes."""
    import resource

    photographs = [encode(Image.fromarray(noise(400, 400, 3, seed=k)), "JPEG", quality=95) for k in range(4)]
    assert min(map(len, photographs)) > 100_000
    members = {f"PetImages/Cat/{k}.jpg": photograph for k, photograph in enumerate(photographs)}
    write(tmp_path, {"pets.zip": pack(members), "cats.npz": b"the old one"})

    def prepare(size):
        options = ("--archive", tmp_path / "pets.zip", "--image-size", size, "--out", tmp_path / "cats.npz")
        limit = (resource.RLIMIT_FSIZE, (50_000, 50_000))
        return python("-m", "data", "cats", *options, preexec_fn=lambda: resource.setrlimit(*limit))

    assert_failed_in_a_sentence(prepare("100"))
    assert (tmp_path / "cats.npz").read_bytes() == b"the old one"
    assert sorted(os.listdir(tmp_path)) == ["cats.npz", "pets.zip"]
    done = prepare("8")
    assert done.returncode == 0, done.stderr
    assert len(load_images(tmp_path / "cats.npz", 8)[0]) == 4


ARCHIVES = {
    "truncated": HALF,
    "another page": b"<html>",
    "empty": b"",
    "without its list of contents": MICROSOFT.replace(b"PK\x01\x02", b"\0K\x01\x02", 1),
    "without cats": pack({"PetImages/Cat/0.jpg": b"no image", "PetImages/Dog/0.jpg": jpeg(RED)}),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_other_archives_are_refused_and_leave_the_old_file(tmp_path, run, case):
    write(tmp_path, {"pets.zip": ARCHIVES[case], "cats.npz": b"the old one"})
    done = run("cats", "--archive", tmp_path / "pets.zip", "--out", tmp_path / "cats.npz")
    assert_failed_in_a_sentence(done, status=2)
    assert (tmp_path / "cats.npz").read_bytes() == b"the old one"
    assert sorted(os.listdir(tmp_path)) == ["cats.npz", "pets.zip"]


@pytest.mark.parametrize(
    "options, said",
    [
        ("cats --archive missing.zip --out a.npz", "--archive missing.zip: there is no such file"),
        ("cats --archive train.zip --out a.png", "--out must end in .npz"),
        ("cats --archive train.zip --out a.npz --image-size 0", "at least 1"),
        ("cats --archive train.zip --out a.npz --animals cows", "cows"),
        ("cats --url http://127.0.0.1:1/pets.zip --out missing/a.npz", "missing"),  # before the download
        ("dogs", "dogs"),
    ],
)
def test_wrong_options_are_refused(tmp_path, monkeypatch, run, options, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"train.zip": kaggle()})
    done = run(*options.split())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("python -m data")
    assert said in done.stderr
    assert os.listdir(tmp_path) == ["train.zip"]


def test_the_archive_is_not_overwritten(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"train.npz": kaggle()})  # an archive under a name of ours
    done = run("cats", "--archive", "train.npz", "--out", "./train.npz")
    assert_failed_in_a_sentence(done, 2)
    assert "--out ./train.npz would overwrite" in done.stderr and zipfile.ZipFile("train.npz").namelist()[0] == "train/"


@pytest.mark.parametrize("animals, name", [("cats", "cats64"), ("dogs", "dogs64"), ("both", "cats_and_dogs64")])
def test_the_default_output_is_in_the_package(capsys, animals, name):
    out = command.parse_options(["cats", "--animals", animals]).out
    assert out == os.path.join(ROOT, "data", f"{name}.npz") and (animals != "cats" or out == data.CATS)


@contextlib.contextmanager
def server(content, length=None, status=200):
    """Answers every request with this content, of which it promises `length` bytes; gives the URL, and the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", length or len(content))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}/some/pets.zip", requests
        finally:
            listening.shutdown()
            thread.join()


@pytest.fixture
def download(tmp_path, monkeypatch, run):
    """Downloads with a cache of its own; returns the finished process, what is cached, and the prepared file."""
    cache, out = tmp_path / "keras" / "datasets", tmp_path / "result" / "cats.npz"
    out.parent.mkdir()
    for name, value in {"KERAS_HOME": str(tmp_path / "keras"), "no_proxy": "*", "NO_PROXY": "*"}.items():
        monkeypatch.setenv(name, value)

    def download(url, *options, run=run):
        done = run("cats", "--url", url, "--image-size", "16", "--out", out, *options)
        return done, {path.name: path.read_bytes() for path in cache.iterdir()} if cache.exists() else {}, out

    return download


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"content": HALF, "length": len(MICROSOFT)}, ""),
        ({"content": b"<html>gone</html>", "status": 404}, "404"),
        ({"content": b"<html>Please log in.</html>" * 100}, "zip archive"),
    ],
    ids=["interrupted", "not found", "another page"],
)
def test_a_failed_download_ends_in_a_sentence_and_leaves_nothing(download, answer, said):
    with server(**answer) as (url, requests):
        done, cached, out = download(url)
    assert_failed_in_a_sentence(done)
    assert url in done.stderr and said in done.stderr
    assert requests == ["/some/pets.zip"] and cached == {} and os.listdir(out.parent) == []


@pytest.mark.parametrize("left", [None, HALF], ids=["nothing", "half an archive"])
def test_a_download_is_cached_and_replaces_a_partial_one(tmp_path, download, left):
    if left:  # then in a process of its own, as the import of Keras must print nothing
        write(tmp_path, {"keras/datasets/pets.zip": left})
    with server(MICROSOFT) as (url, requests):
        done, cached, out = download(url, **{"run": lambda *o: python("-m", "data", *o)} if left else {})
    assert done.returncode == 0 and done.stderr == ""
    assert requests == ["/some/pets.zip"] and cached == {"pets.zip": MICROSOFT}
    assert_prepared(out, CATS)
    assert os.listdir(out.parent) == ["cats.npz"] and load_images(out, 16)[1].photographs
    done, cached, out = download(url, "--animals", "dogs")  # the server is no more
    assert done.returncode == 0 and cached == {"pets.zip": MICROSOFT}
    assert_prepared(out, DOGS)
