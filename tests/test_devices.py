"""Training on several devices, a process for each, gives what one process gives; here all of them are CPU cores."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import zipfile
from subprocess import PIPE

import h5py
import numpy as np
import pytest
from conftest import (
    ROOT,
    SMALL,
    TINY,
    command,
    environment,
    finish,
    iterations,
    start,
    tiny_network,
    train_here,
    write_images,
)
from test_resume import progress, read_until, small_disk, table  # noqa: F401
from test_training import assert_equal_to_the_bit, losses

from support.launcher import free_port

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="tried on Linux only")


def weights(path):
    """All variables in the file of a model, of the network and of its optimizer."""
    found = []
    with zipfile.ZipFile(path) as file, h5py.File(io.BytesIO(file.read("model.weights.h5"))) as content:
        content.visititems(lambda name, part: found.append(part[()]) if isinstance(part, h5py.Dataset) else None)
    return found


def assert_equal_to_rounding(one, other, tolerance=1e-5):
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(a).max()))


def train_as_worker(index, count, port, folder, words, fault):
    """What one worker does, in a process of its own, with a tiny network and without grids."""
    os.chdir(folder)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from diffusion.networks import NETWORKS
    from support import device
    from support.places import Place
    from support.worker import Worker

    device.start_tensorflow(parts=8)
    from training import train_step, training_run, workers
    from training.workers import Workers

    if fault:
        train_step.STEPS_BETWEEN_CHECKS, workers.LONGEST_SUM = 4, 3
        training_run.Follower.after_step = FAULTS[fault]
    NETWORKS["naive"] = tiny_network
    training_run.Grids.sample = lambda grids: np.zeros((16, 8, 8, 1), np.int16)
    worker = Worker(Place(index, count, port=port))
    worker.open("")
    workers = Workers(worker)
    with open(f"worker-{index}.txt", "w") as printed, contextlib.redirect_stdout(printed):
        try:
            train_here(words, workers)
        except OSError as error:
            print(error)
    if index:
        time.sleep(120)  # the first one ends the job
    os._exit(0)


def change_a_bit(weight):
    values = weight.numpy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(9))
    weight.assign(values)


FAULTS = {
    "weights": lambda run, loss: change_a_bit(run.trained.network.trainable_weights[0]),
    "hangs": lambda run, loss: time.sleep(60),  # and gives signs of life
}


def train_in_workers(count, folder, words, fault="", status=0):
    """Trains in processes that are forked from one that has imported TensorFlow, and what the first one printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "keras", "numpy"])
    how = count, free_port(), str(folder), words, fault
    workers = [context.Process(target=train_as_worker, args=(index, *how), daemon=True) for index in range(count)]
    for worker in workers:
        worker.start()
    workers[0].join(120)
    found = workers[0].exitcode
    for worker in workers:
        worker.kill()
    assert found == status
    return (folder / "worker-0.txt").read_text()


def test_two_workers_train_like_one_process(train_tiny, tmp_path, black_grids):
    """The last batch of an epoch has one image, so none for the first worker."""
    words = [*TINY, *shlex.split("--batch-size 8 --validation 0.06 --n-epochs 3 --model")]
    train_tiny(*words, "one.keras")
    together = train_in_workers(2, tmp_path, [*words, "two.keras"])
    assert "2 like this one, with 4 of the 8 images of a batch each" in together
    epochs = [{k: float(v) for k, v in row.items() if v} for row in (*table("one.csv"), *table("two.csv"))]
    for one, two in zip(epochs[:3], epochs[3:], strict=True):
        assert one.keys() == two.keys() and one == pytest.approx(two, rel=1e-5) and "held_out_loss" in one
    assert_equal_to_rounding("one.keras", "two.keras")


@pytest.mark.slow
def test_workers_whose_weights_part_do_not_train_on(train_tiny, tmp_path):
    words = [*TINY, *shlex.split("--batch-size 8 --n-epochs 3 --model two.keras")]
    assert "no longer have the same weights" in train_in_workers(2, tmp_path, words, "weights")


@pytest.mark.slow
def test_worker_that_does_not_add_its_gradients_ends_the_job(train_tiny, tmp_path):
    words = [*TINY, *shlex.split("--batch-size 8 --n-epochs 3 --model two.keras")]
    assert "Epoch" not in train_in_workers(2, tmp_path, words, "hangs", status=137)


def test_digest_of_weights_changes_with_every_bit():
    """Against the same sums in Python's integers, which do not overflow."""
    import tensorflow as tf

    from training.workers import LIMB, digest_weights

    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,), ())]

    def by_hand(arrays):
        total = 0
        for k, array in enumerate(arrays):
            bits = array.reshape(-1).view(np.int32).tolist()
            total += (2 * k + 1) * sum((2 * place + 1) * number for place, number in enumerate(bits))
        return [total % LIMB, total // LIMB % LIMB]

    def digest(arrays):
        return digest_weights([tf.Variable(array) for array in arrays]).numpy().tolist()

    assert digest(values) == by_hand(values)
    for array in values:
        for place in np.ndindex(array.shape):
            before = digest(values)
            array[place] = np.nextafter(array[place], np.float32(9))
            assert digest(values) != before and digest(values) == by_hand(values)


def test_workers_notice_that_one_of_them_differs():
    from training.workers import LIMB, Workers

    def total(digests):
        found = 0
        for k, digest in enumerate(digests):
            worker = object.__new__(Workers)
            worker.index, worker.count = k, len(digests)
            found += worker.difference(np.array(digest)).numpy()
        return found.tolist()

    assert total([[LIMB - 1, 7]] * 64) == [0, 0]
    assert total([[LIMB - 1, 7]] * 63 + [[LIMB - 1, 8]]) == [0, -1]


def test_sum_that_fails_is_one_sentence(monkeypatch):
    """As where two processes got the same GPU."""
    import tensorflow as tf

    from training import workers

    def fail(vector):
        raise tf.errors.InternalError(None, None, "NCCL: duplicate GPU\n" + 100 * "and more ")

    worker = object.__new__(workers.Workers)
    worker.index, worker._add, waited = 1, fail, []
    monkeypatch.setattr(workers.time, "sleep", waited.append)
    with pytest.raises(OSError, match="all-reduce of gradients failed .NCCL: duplicate GPU and more") as found:
        worker.add(tf.zeros(3))
    assert waited == [60] and len(str(found.value)) < 400 and "\n" not in str(found.value)


def train(folder, *options, devices=2, **more):
    return start(folder, "diffusion_model.py", *options, "--devices", devices, **more)


def find_workers(process):
    """The processes of the workers that a launcher has started, in order."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    numbers = {}
    for pid in children:
        with open(f"/proc/{pid}/environ") as file, contextlib.suppress(StopIteration):
            variables = file.read().split("\0")
            numbers[next(word.split("=")[1].split()[0] for word in variables if word.startswith("DIFFUSION_"))] = pid
    return [numbers[str(k)] for k in range(len(numbers))]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


KINDS = {
    "dropout": "--dropout 0.3 --attention 1",
    "learned variance": "--learn-variance",
    "learned schedule": "--schedule learned --T 50",
    "float16": "--precision float16",
    "muon": "--optimizer muon --n-feat 16",
    "classes": "--data drawings --classes --n-epochs 1 --batch-size 512",
    "classifier": "--data drawings --classes --network classifier --n-epochs 1 --batch-size 512",
    "xla": "--xla",
}


def options_of(kind):
    """SMALL with other options, without those that do not go with them."""
    options = [*SMALL, *shlex.split(f"--n-epochs 2 --sample-every 0 --batch-size 10 --validation 0.2 {KINDS[kind]}")]
    if kind == "learned schedule":
        options = [
            word for pair in zip(options[::2], options[1::2], strict=True) if pair[0] != "--beta2" for word in pair
        ]
    return options


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_is_the_same_on_two_devices(tmp_path, kind):
    write_images(tmp_path)
    done = [
        finish(train(tmp_path, *options_of(kind), "--model", f"{devices}.keras", devices=devices)) for devices in (1, 2)
    ]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    tolerance = 2e-2 if kind == "float16" else 1e-3
    for one, two in zip(table(tmp_path / "1.csv"), table(tmp_path / "2.csv"), strict=True):
        for name, value in one.items():
            assert float(value) == pytest.approx(float(two[name]), rel=tolerance), name
    assert_equal_to_rounding(tmp_path / "1.keras", tmp_path / "2.keras", tolerance)


@pytest.mark.slow
def test_three_workers_and_runs_on_other_numbers_of_devices(tmp_path):
    """A batch of two leaves one of three workers without a row. 2 → 1 → 2 devices give the losses of one."""
    for name in "one", "three", "mixed":
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, count=44)  # 14 + 14 + 14 + 2
    options = [*SMALL, *shlex.split("--batch-size 14 --sample-every 0 --n-epochs 6 --lr-decay cosine")]
    one = finish(train(tmp_path / "one", *options, devices=1))
    three = finish(train(tmp_path / "three", *options, devices=3))
    found = {}
    for k, devices in enumerate((2, 1, 2)):
        process = train(tmp_path / "mixed", *options, devices=devices)
        printed = read_until(process, f"Epoch :{2 * k + 1}")
        process.send_signal(signal.SIGTERM)
        done = finish(process, printed)
        assert done.returncode == (143 if k < 2 else done.returncode), done.stderr
        found |= losses(done)
    if done.returncode:
        found |= losses(finish(train(tmp_path / "mixed", *options)))
    assert one.returncode == three.returncode == 0, one.stderr + three.stderr
    assert losses(three) == pytest.approx(losses(one), rel=1e-4) and found == pytest.approx(losses(one), rel=1e-4)
    for name in "three", "mixed":
        assert_equal_to_rounding(tmp_path / "one" / "model.keras", tmp_path / name / "model.keras", 1e-4)


LONG = (*SMALL, "--n-epochs", "40", "--sample-every", "0", "--lr-decay", "cosine")


@pytest.mark.slow
def test_interrupted_run_on_two_devices_is_bit_exact(tmp_path):
    for name in "once", "often":
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, count=40)
    at_once = finish(train(tmp_path / "once", *LONG))
    steps = []
    for who in "launcher", 0, 1, None:
        process = train(tmp_path / "often", *LONG)
        printed = read_until(process, f"Epoch :{5 if not steps else steps[-1] // 3 + 5} ")
        if who is not None:
            begun = time.monotonic()
            os.kill(process.pid if who == "launcher" else find_workers(process)[who], signal.SIGTERM)
        done = finish(process, printed)
        assert done.returncode == (0 if who is None else 143) and done.stderr == "", (who, done.stderr)
        assert who is None or time.monotonic() - begun < 20
        steps.append(progress(tmp_path / "often" / "model.keras")["step"])
    assert 0 < steps[0] < steps[1] < steps[2] < steps[3] == 120, steps
    assert table(tmp_path / "often" / "model.csv") == table(tmp_path / "once" / "model.csv"), at_once.stderr
    assert_equal_to_the_bit(tmp_path / "once" / "model.keras", tmp_path / "often" / "model.keras")


def wait_for_save(folder):
    """Until a save is under way."""
    end = time.monotonic() + 200
    while not [name for name in os.listdir(folder) if name.startswith(".model.keras.saving")]:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "save", "grid"])
@pytest.mark.parametrize("who", ["launcher", 0, 1])
def test_killed_process_ends_the_job_and_leaves_the_last_save(tmp_path, who, moment):
    write_images(tmp_path)
    options = [*SMALL, "--n-epochs", "100000", "--save-every", "0.02", "--sample-every", "0"]
    if moment == "grid":
        options += ["--T", "500", "--beta2", "0.02", "--sample-steps", "500", "--sample-every", "8"]
    process = train(tmp_path, *options)
    printed = read_until(process, "Epoch :7" if moment == "grid" else "ms a step")
    while not (tmp_path / "model.keras").exists():
        time.sleep(0.05)
    workers = find_workers(process)
    if moment == "grid":
        time.sleep(1)
    elif moment == "save":
        wait_for_save(tmp_path)
    begun = time.monotonic()
    os.kill(process.pid if who == "launcher" else workers[who], signal.SIGKILL)
    done = finish(process, printed)
    while any(map(is_running, workers)):
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    assert time.monotonic() - begun < 60
    if who == "launcher":
        assert done.returncode == -9
    else:
        assert done.returncode == 137 and len(done.stderr.splitlines()) == 1, done.stderr
        for word in f"worker {who + 1} of 2", f"process {workers[who]}", "SIGKILL", "model.keras":
            assert word in done.stderr
    saved = iterations(tmp_path / "model.keras")
    again = train(tmp_path, *options[:-2], "--sample-every", "0")
    printed = read_until(again, "ms a step")
    again.send_signal(signal.SIGINT)
    done = finish(again, printed)
    assert done.returncode == 130 and f"{saved:,} steps" in done.stdout, done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.slow
def test_sampling_and_evaluation_are_the_same_on_two_devices(model_folder, run):
    np.save(model_folder / "new.npy", np.load(model_folder / "images.npy")[:30])
    for devices in 1, 2, 3:
        sampled = run(
            "reverse_diffusion.py", *shlex.split(f"--n-sample 7 --seed 3 --npy {devices}.npy"), "--devices", devices
        )
        assert sampled.returncode == 0 and sampled.stderr == "", sampled.stderr
    one, *others = (np.load(model_folder / f"{devices}.npy").astype(int) for devices in (1, 2, 3))
    for other in others:
        assert other.shape == one.shape and np.abs(other - one).max() <= 1
    rows = []
    for devices in 1, 2:
        words = f"--data new.npy --features pixels --n-sample 40 --draws 3 --out {devices}.json --devices {devices}"
        measured = run("evaluate.py", *shlex.split(words))
        assert measured.returncode == 0, measured.stderr
        rows.append(json.loads((model_folder / f"{devices}.json").read_text()))
        for name in os.listdir(model_folder):
            if name.endswith(("bits.npz", "samples.npy")):
                os.remove(model_folder / name)  # else the second run would take them
    for name, row in rows[0].items():
        if isinstance(row, dict) and "value" in row:
            assert row["value"] == pytest.approx(rows[1][name]["value"], rel=1e-4), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--devices 0", "integer of at least 1"),
        ("--devices two", "all"),
        ("--devices 2 --parts 2", "--parts"),
        ("--devices 2 --sequential", "--sequential"),
    ],
)
def test_wrong_devices_are_refused_at_once(run, tmp_path, words, said):
    process = run("diffusion_model.py", *shlex.split(words))
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert said in process.stderr and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_batch_smaller_than_the_devices_is_refused(tmp_path):
    write_images(tmp_path)
    done = finish(train(tmp_path, *SMALL, "--batch-size", "2", devices=3))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--batch-size 2" in done.stderr and "3 devices" in done.stderr
    assert os.listdir(tmp_path) == ["images.npy"]


@pytest.mark.slow
def test_second_run_on_several_devices_is_refused(tmp_path):
    write_images(tmp_path)
    first = train(tmp_path, *SMALL, "--n-epochs", "100000", "--sample-every", "0")
    printed = read_until(first, "files ")
    second = finish(train(tmp_path, *SMALL))
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1, second.stderr
    assert "being trained by another run" in second.stderr
    first.send_signal(signal.SIGTERM)
    assert finish(first, printed).returncode == 143


@pytest.mark.slow
def test_signal_during_start_ends_all_at_once(tmp_path):
    write_images(tmp_path)
    process = train(tmp_path, *SMALL)
    read_until(process, "starting TensorFlow")
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 143 and done.stderr == "" and time.monotonic() - begun < 5
    assert os.listdir(tmp_path) == ["images.npy"]


def start_worker(folder, index, port, *words, **more):
    """Python as one of two workers that no launcher has started."""
    cluster = {"worker": [f"127.0.0.1:{port}"] * 2}
    variables = {
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        "DIFFUSION_SECRET": "a secret of this test",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    how = {"cwd": folder, "env": environment(**variables, **more), "text": True}
    return subprocess.Popen(command(*words), stdout=PIPE, stderr=PIPE, **how)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["options and settings", "images", "code"])
def test_workers_that_differ_do_not_train(tmp_path, what):
    """In options, in images of the same name on a disk of each, or in code. The sentence is said once."""
    more, folders = [], [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        write_images(folder)
    if what == "images":
        np.save(folders[1] / "images.npy", 255 - np.load(folders[1] / "images.npy"))
    elif what == "code":
        shutil.copytree(ROOT, tmp_path / "project", ignore=shutil.ignore_patterns(".*", "docs", "tests", "models"))
        with open(tmp_path / "project" / "ddpm.py", "a") as file:
            file.write("\n# another version\n")
    else:
        more = ["--learning-rate", "1"]
    script = tmp_path / "project" / "diffusion_model.py" if what == "code" else "diffusion_model.py"
    port = free_port()
    first = start_worker(folders[0], 0, port, "diffusion_model.py", *SMALL)
    second = start_worker(folders[1], 1, port, script, *SMALL, *more, PYTHONPATH="")
    done = [finish(process) for process in (first, second)]
    assert [process.returncode for process in done] == [2, 2], done
    assert done[0].stderr.count("\n") == 1 and done[1].stderr == "", done
    assert f"and the first one differ in their {what};" in done[0].stderr and "worker 2 of 2" in done[0].stderr
    assert [os.listdir(folder) for folder in folders] == [["images.npy"]] * 2


@pytest.mark.slow
def test_worker_without_images_is_named(tmp_path):
    for name in "first", "second":
        (tmp_path / name).mkdir()
    write_images(tmp_path / "first")
    port = free_port()
    processes = [
        start_worker(tmp_path / name, k, port, "diffusion_model.py", *SMALL)
        for k, name in enumerate(["first", "second"])
    ]
    done = [finish(process) for process in processes]
    assert [process.returncode for process in done] == [2, 2] and done[1].stderr == "", done
    assert re.fullmatch(
        r".*worker 2 of 2 .* exit status 2 \(.*there is no folder or file images.npy.*\n", done[0].stderr
    )


@pytest.mark.slow
def test_full_disk_and_other_clock_of_one_worker_change_nothing(small_disk, tmp_path):  # noqa: F811
    """The first one's disk is full for a while, and the other one's clock is a day ahead."""
    (tmp_path / "ahead").mkdir()
    (tmp_path / "ahead" / "sitecustomize.py").write_text(
        "import time\nnow = time.time\ntime.time = lambda: now() + 86400\n"
    )
    (tmp_path / "second").mkdir()
    for folder in small_disk, tmp_path / "second":
        write_images(folder)
    options = [*SMALL, "--n-epochs", "100000", "--sample-every", "0", "--save-every", "0.01"]
    port = free_port()
    first = start_worker(small_disk, 0, port, "diffusion_model.py", *options)
    second = start_worker(
        tmp_path / "second", 1, port, "diffusion_model.py", *options, PYTHONPATH=f"{tmp_path / 'ahead'}:{ROOT}"
    )
    printed = read_until(first, "ms a step")
    while not (small_disk / "model.keras").exists():
        time.sleep(0.05)
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(65536))
    time.sleep(2)
    before = iterations(small_disk / "model.keras")
    os.remove(small_disk / "filler")
    second.send_signal(signal.SIGTERM)  # to the other one
    done = [finish(first, printed), finish(second)]
    assert [process.returncode for process in done] == [143, 143] and done[1].stderr == "", done
    assert "No space left" in done[0].stderr and iterations(small_disk / "model.keras") > before
