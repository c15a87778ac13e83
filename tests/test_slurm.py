"""`cluster/train.slurm` under a real SLURM with one node. Minutes: `pytest -m slow tests/test_slurm.py -s -n 0`."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, command, environment, write_images
from test_resume import table
from test_training import EPOCH_LINE, assert_equal_to_the_bit

NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "munged")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason="SLURM is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="starting SLURM takes root"),
]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=8
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running SLURM with one node and two pretended GPUs; returns a function that calls its commands."""
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    os.makedirs("/run/munge", exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground"])
    time.sleep(1)
    daemons = [
        subprocess.Popen([daemon, "-D"], env=env, stderr=subprocess.DEVNULL) for daemon in ("slurmctld", "slurmd")
    ]
    time.sleep(3)

    def call(*words):
        return subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, check=True).stdout

    call.env = env
    yield call
    for daemon in (*daemons, munge):
        daemon.terminate()
        daemon.wait()


def submit(slurm, folder, gpus, *options):
    """Submits a training of the script in the project; returns the job's number."""
    batch = [
        "sbatch",
        f"--gres=gpu:{gpus}",
        "--parsable",
        f"--time={gpus}",  # minutes; several processes on two cores take longer to start
        f"--signal=B:USR1@{25 * gpus}",
        "--cpus-per-task=2",
        "--mem=0",
        "--output=job.out",
    ]
    env = {**slurm.env, **environment(), "PYTHON": sys.executable, "PROJECT": ROOT}
    words = [*batch, os.path.join(ROOT, "cluster", "train.slurm"), *options]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout.strip()


def state(slurm, job):
    return slurm("scontrol", "show", "job", job).split("JobState=")[1].split()[0]


def wait_for(slurm, job, *states, seconds=1200):
    end = time.monotonic() + seconds
    while state(slurm, job) not in states:
        assert time.monotonic() < end, (state(slurm, job), states)
        time.sleep(0.5)
    return state(slurm, job)


def wait_for_training(output, start, seconds=200):
    """Until the job, started again for the n-th time, is in its training loop."""
    end = time.monotonic() + seconds
    while "ms a step" not in output.read_text().partition(f"start {start},")[2] if output.exists() else True:
        assert time.monotonic() < end, output.read_text() if output.exists() else "no output"
        time.sleep(0.2)


@pytest.mark.parametrize(("gpus", "n_epochs"), [(1, "900"), (2, "200")])
def test_requeued_job_ends_in_the_bits_of_an_uninterrupted_run(slurm, tmp_path, gpus, n_epochs):
    """SLURM's GPUs are pretended, so that each process computes on the CPU."""
    options = (*SMALL, "--n-epochs", n_epochs, "--sample-every", "0", "--save-every", "1")
    for name in "once", "often":
        (tmp_path / name).mkdir()
        write_images(tmp_path / name)
    at_once = subprocess.run(
        command("diffusion_model.py", *options, "--devices", str(gpus)),
        cwd=tmp_path / "once",
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert at_once.returncode == 0, at_once.stderr

    output = tmp_path / "often" / "job.out"
    first = submit(slurm, tmp_path / "often", gpus, *options)
    wait_for_training(output, 1)  # the time limit has come, and the job is back
    slurm("scontrol", "requeue", first)  # as an administrator, or a pre-emption, does
    wait_for_training(output, 2)
    slurm("scancel", first)
    wait_for(slurm, first, "CANCELLED")
    second = submit(slurm, tmp_path / "often", gpus, *options)
    assert wait_for(slurm, second, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", output.read_text()

    printed = output.read_text()
    print(printed)
    assert "back into the queue" in printed and ("2 like this one" in printed) == (gpus == 2)
    assert EPOCH_LINE.findall(printed)[-1] == EPOCH_LINE.findall(at_once.stdout)[-1]
    assert dict(EPOCH_LINE.findall(printed)) == dict(EPOCH_LINE.findall(at_once.stdout))
    assert table(tmp_path / "often" / "model.csv") == table(tmp_path / "once" / "model.csv")
    assert_equal_to_the_bit(tmp_path / "once" / "model.keras", tmp_path / "often" / "model.keras")
