"""The scripts of `cluster/` under a real SLURM of two nodes. Minutes: `pytest -m slow tests/test_slurm.py -s -n 0`."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
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


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def submit(slurm, folder, script, *options, **batch):
    """Submits a training of a script in the project, with options of `sbatch`; returns the job's number."""
    # SLURM sends a signal up to a minute too early: here 15 to 75 seconds after the start.
    batch = {"time": "2", "signal": "B:USR1@45", "mem": "0", "output": "job.out", **batch}
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


def write_images_twice(folder):
    """For an uninterrupted run, and for one with interruptions."""
    for name in "once", "often":
        (folder / name).mkdir()
        write_images(folder / name)
    return folder / "once", folder / "often"


def last_epoch(output):
    return int(EPOCH_LINE.findall(output.read_text())[-1][0])


def run_alone(folder, script, *words, **more):
    env = environment(**more)
    return subprocess.run(command(script, *words), cwd=folder, env=env, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("gpus", [1, 2])
def test_requeued_job_ends_in_the_bits_of_an_uninterrupted_run(slurm, tmp_path, gpus):
    """SLURM's GPUs are pretended, so that each process computes on the CPU.

    The last job trains ten epochs more than the interrupted ones have reached, however fast they were.
    """
    options = (*SMALL, "--sample-every", "0", "--save-every", "1", "--n-epochs")
    once, often = write_images_twice(tmp_path)
    output, wanted = often / "job.out", {"gres": f"gpu:{gpus}", "cpus_per_task": "2"}
    first = submit(slurm, often, "train.slurm", *options, "100000", **wanted)
    wait_for_training(output, 1)  # the time limit has come, and the job is back
    slurm("scontrol", "requeue", first)  # as an administrator, or a pre-emption, does
    wait_for_training(output, 2)
    slurm("scancel", first)
    wait_for(slurm, first, "CANCELLED")
    n_epochs = str(last_epoch(output) + 10)
    second = submit(slurm, often, "train.slurm", *options, n_epochs, **wanted)
    assert wait_for(slurm, second, *ENDS) == "COMPLETED", output.read_text()

    same = {"CUDA_VISIBLE_DEVICES": "0,1"} if gpus == 2 else {}  # else each process would get a core of its own
    at_once = run_alone(once, "diffusion_model.py", *options, n_epochs, "--devices", str(gpus), **same)
    printed = output.read_text()
    print(printed)
    assert "back into the queue" in printed and ("2 like this one" in printed) == (gpus == 2)
    assert EPOCH_LINE.findall(printed)[-1] == EPOCH_LINE.findall(at_once.stdout)[-1]
    assert dict(EPOCH_LINE.findall(printed)) == dict(EPOCH_LINE.findall(at_once.stdout))
    assert table(often / "model.csv") == table(once / "model.csv")
    assert_equal_to_the_bit(once / "model.keras", often / "model.keras")


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
    options = (*SMALL, "--sample-every", "0", "--save-every", "0.05", "--n-epochs")
    once, often = write_images_twice(tmp_path)
    output, script = often / "job.out", "train-multi-node.slurm"
    wanted = {"nodes": "2", "ntasks_per_node": "1", "gres": "gpu:1", "cpus_per_task": "2"}
    first = submit(slurm, often, script, *options, "100000", **wanted)
    wait_for_training(output, 1)  # the time limit has come, and the job is back
    kill_task(1)
    wait_for_training(output, 2)
    slurm("scancel", first)
    wait_for(slurm, first, "CANCELLED")
    n_epochs = str(last_epoch(output) + 10)
    one_node = {"nodes": "1", "ntasks_per_node": "2", "gres": "gpu:2", "cpus_per_task": "1", "time": "5"}
    second = submit(slurm, often, script, *options, n_epochs, **one_node)
    assert wait_for(slurm, second, *ENDS) == "COMPLETED", output.read_text()

    at_once = [start_worker(once, k, 17001, "diffusion_model.py", *options, n_epochs) for k in range(2)]
    at_once = [finish(process) for process in at_once]
    assert [done.returncode for done in at_once] == [0, 0], at_once
    printed = output.read_text()
    print(printed)
    assert printed.count("back into the queue") == 2 and "2 like this one" in printed
    assert re.search(r"worker 2 of 2 \(process \d+ on node2\) was lost: .*; the last save is in model.keras", printed)
    assert len(re.findall("stopped after [0-9,]+ steps", printed)) == 2  # the time limit, and scancel
    assert EPOCH_LINE.findall(printed)[-1] == EPOCH_LINE.findall(at_once[0].stdout)[-1]
    assert table(often / "model.csv") == table(once / "model.csv")
    assert_equal_to_rounding(once / "model.keras", often / "model.keras", 0)


@pytest.mark.parametrize("script", ["train.slurm", "train-multi-node.slurm"])
def test_preempted_job_saves_and_resumes(slurm, tmp_path, script):
    write_images(tmp_path)
    output = tmp_path / "job.out"
    wanted = {"gres": "gpu:1", "cpus_per_task": "2", "time": "10"}
    wanted |= {"nodes": "2", "ntasks_per_node": "1"} if "node" in script else {}
    job = submit(slurm, tmp_path, script, *SMALL, "--sample-every", "0", "--n-epochs", "100000", **wanted)
    wait_for_training(output, 0)
    time.sleep(5)
    slurm(*shlex.split("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap"), "sleep 5")
    wait_for_training(output, 1)
    slurm("scancel", job)
    wait_for(slurm, job, "CANCELLED")
    time.sleep(8)  # for the script, which must not take this for a pre-emption, although there was one
    printed = output.read_text()
    print(printed)
    assert state(slurm, job) == "CANCELLED" and printed.count("back into the queue") <= 1
    stopped, resumed = (
        re.search(rf"{word} .*?([0-9,]+) steps", printed) for word in ("stopped after", "resuming after")
    )
    assert stopped[1] == resumed[1] and "killed" not in printed


def run_on_two_nodes(slurm, folder, script, *words):
    """What someone with a script of their own writes into it: `srun`, after choosing a secret."""
    srun = shlex.split("srun --nodes=2 --ntasks-per-node=1 --gres=gpu:1 --mem=0")
    env = {**environment(DIFFUSION_SECRET="of this job, and of no other"), "SLURM_CONF": slurm.env["SLURM_CONF"]}
    return subprocess.run(
        [*srun, *command(script, *words)], cwd=folder, env=env, capture_output=True, text=True, check=True
    )


def test_job_resumes_on_another_number_of_nodes(slurm, tmp_path):
    """Two nodes, one, two, with one process's losses; then two sample and evaluate as one does."""
    options = (*SMALL, "--sample-every", "0", "--n-epochs")
    once, often = write_images_twice(tmp_path)
    script, n_epochs = "train-multi-node.slurm", "100000"
    wanted = {"ntasks_per_node": "1", "gres": "gpu:1", "cpus_per_task": "2", "time": "10", "output": "job%j.out"}
    said = []
    for k, nodes in enumerate("212"):
        job = submit(slurm, often, script, *options, n_epochs, nodes=nodes, **wanted)
        output = often / f"job{job}.out"
        if k < 2:
            wait_for_training(output, 0)
            time.sleep(5)
            slurm("scancel", job)
        assert wait_for(slurm, job, *ENDS) == ("COMPLETED" if k == 2 else "CANCELLED"), output.read_text()
        n_epochs = str(last_epoch(output) + 10) if k == 1 else n_epochs
        said.append(output.read_text())

    at_once = run_alone(once, "diffusion_model.py", *options, n_epochs)
    print(*said)
    assert ["2 like this one" in text for text in said] == [True, False, True]
    assert ["stopped after" in text for text in said] == [True, True, False]
    losses, expected = (dict(EPOCH_LINE.findall(text)) for text in ("\n".join(said), at_once.stdout))
    assert losses.keys() == expected.keys()
    for epoch, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected[epoch]), rel=1e-2), epoch

    ways = {"one": run_alone, "two": lambda *how: run_on_two_nodes(slurm, *how)}
    images, numbers = [], []
    for name, run in ways.items():
        run(often, "reverse_diffusion.py", *shlex.split(f"--n-sample 7 --seed 3 --npy {name}.npy"))
        images.append(np.load(often / f"{name}.npy").astype(int))
        words = f"--data images.npy --features pixels --n-sample 40 --draws 3 --out {name}.json"
        run(often, "evaluate.py", *shlex.split(words))
        numbers.append(json.loads((often / f"{name}.json").read_text()))
        for cached in (*often.glob("*bits.npz"), *often.glob("*samples.npy")):
            cached.unlink()  # else the second one would take them
    assert len(images[0]) == len(images[1]) == 7 and np.abs(images[0] - images[1]).max() <= 1
    values = [
        {name: row["value"] for name, row in rows.items() if isinstance(row, dict) and "value" in row}
        for rows in numbers
    ]
    assert values[0] and values[1] == pytest.approx(values[0], rel=1e-4)
