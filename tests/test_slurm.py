"""The scripts of `cluster/` under a real SLURM of two nodes. Minutes: `pytest -m slow tests/test_slurm.py -s -n 0`."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, command, environment, finish, write_images
from test_devices import assert_equal_to_rounding, start_worker
from test_resume import table
from test_training import EPOCH_LINE, assert_equal_to_the_bit

NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun", "munged", "unshare")
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
AuthInfo=socket={folder}/munge/socket,cred_expire=8
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17821 CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17822 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A running SLURM with two nodes of two pretended GPUs each; returns a function that calls its commands.

    Both nodes are this machine, where their names are known to what runs on them only.
    """
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    with open("/etc/hosts") as file:
        (folder / "hosts").write_text(file.read() + "\n127.0.0.1 node1 node2\n")
    for name in "state", "spool-node1", "spool-node2", "munge":
        (folder / name).mkdir()
    shutil.chown(folder / "munge", "munge", "munge")
    for parent in (folder, *folder.parents):
        parent.chmod(parent.stat().st_mode | 0o111)  # munged runs as its own user
    own = [f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    munge = subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground", *own])
    time.sleep(1)
    node = f"mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N "
    commands = ["slurmctld", "-D"], *(["unshare", "-m", "sh", "-c", node + name] for name in ("node1", "node2"))
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) for command in commands]
    time.sleep(3)

    def call(*words):
        return subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, check=True).stdout

    call.env = env
    yield call
    for daemon in (*daemons, munge):
        daemon.terminate()
        daemon.wait()


def submit(slurm, folder, script, *options, **batch):
    """Submits a training of a script in the project, with options of `sbatch`; returns the job's number."""
    batch = {"time": "1", "signal": "B:USR1@45", "mem": "0", "output": "job.out", **batch}
    batch = ["sbatch", "--parsable", *(f"--{name.replace('_', '-')}={value}" for name, value in batch.items())]
    env = {**slurm.env, **environment(), "PYTHON": sys.executable, "PROJECT": ROOT}
    words = [*batch, os.path.join(ROOT, "cluster", script), *options]
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

    output, wanted = tmp_path / "often" / "job.out", {"gres": f"gpu:{gpus}", "cpus_per_task": "2"}
    wanted |= {"time": f"{gpus}", "signal": f"B:USR1@{25 * gpus}"}  # two processes on two cores take longer to start
    first = submit(slurm, tmp_path / "often", "train.slurm", *options, **wanted)
    wait_for_training(output, 1)  # the time limit has come, and the job is back
    slurm("scontrol", "requeue", first)  # as an administrator, or a pre-emption, does
    wait_for_training(output, 2)
    slurm("scancel", first)
    wait_for(slurm, first, "CANCELLED")
    second = submit(slurm, tmp_path / "often", "train.slurm", *options, **wanted)
    assert wait_for(slurm, second, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", output.read_text()

    printed = output.read_text()
    print(printed)
    assert "back into the queue" in printed and ("2 like this one" in printed) == (gpus == 2)
    assert EPOCH_LINE.findall(printed)[-1] == EPOCH_LINE.findall(at_once.stdout)[-1]
    assert dict(EPOCH_LINE.findall(printed)) == dict(EPOCH_LINE.findall(at_once.stdout))
    assert table(tmp_path / "often" / "model.csv") == table(tmp_path / "once" / "model.csv")
    assert_equal_to_the_bit(tmp_path / "once" / "model.keras", tmp_path / "often" / "model.keras")


def kill_task(number):
    """Kills the process of a task of `srun`, as the kernel does when memory runs out."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ") as file, open(f"/proc/{pid}/cmdline") as command_line:
                variables, words = file.read().split("\0"), command_line.read().split("\0")
        except OSError:
            continue
        if f"SLURM_PROCID={number}" in variables and "SLURM_STEP_NUM_TASKS=2" in variables and "python" in words[0]:
            os.kill(int(pid), signal.SIGKILL)


def test_job_on_two_nodes_keeps_what_one_node_does(slurm, tmp_path):
    """Time limit, a killed task and `scancel` on two nodes, then one node with as many tasks: the same bits."""
    options = (*SMALL, "--n-epochs", "400", "--sample-every", "0", "--save-every", "0.05")
    for name in "once", "often":
        (tmp_path / name).mkdir()
        write_images(tmp_path / name)
    at_once = [start_worker(tmp_path / "once", k, 17001, "diffusion_model.py", *options) for k in range(2)]
    at_once = [finish(process) for process in at_once]
    assert [done.returncode for done in at_once] == [0, 0], at_once

    output, script = tmp_path / "often" / "job.out", "train-multi-node.slurm"
    wanted = {"nodes": "2", "ntasks_per_node": "1", "gres": "gpu:1", "cpus_per_task": "2"}
    first = submit(slurm, tmp_path / "often", script, *options, **wanted)
    wait_for_training(output, 1)  # the time limit has come, and the job is back
    kill_task(1)
    wait_for_training(output, 2)
    slurm("scancel", first)
    wait_for(slurm, first, "CANCELLED")
    one_node = {"nodes": "1", "ntasks_per_node": "2", "gres": "gpu:2", "cpus_per_task": "1", "time": "5"}
    second = submit(slurm, tmp_path / "often", script, *options, **one_node)
    assert wait_for(slurm, second, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", output.read_text()

    printed = output.read_text()
    print(printed)
    assert printed.count("back into the queue") == 2 and "2 like this one" in printed
    assert re.search(r"worker 2 of 2 \(process \d+ on node2\) was lost: .*; the last save is in model.keras", printed)
    assert len(re.findall("stopped after [0-9,]+ steps", printed)) == 2  # the time limit, and scancel
    assert EPOCH_LINE.findall(printed)[-1] == EPOCH_LINE.findall(at_once[0].stdout)[-1]
    assert table(tmp_path / "often" / "model.csv") == table(tmp_path / "once" / "model.csv")
    assert_equal_to_rounding(tmp_path / "once" / "model.keras", tmp_path / "often" / "model.keras", 0)
