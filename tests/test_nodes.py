"""Processes that no launcher has started: how they find their place, know each other, and notice that one is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import environment
from test_launcher import slow

from support import line, places
from support.launcher import free_port
from support.line import Line
from support.places import Place, choose_hosts, find_place

SECRET = "a secret of this job"
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "node[01-03]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "node02",
    "DIFFUSION_SECRET": SECRET,
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node07", ["node07"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a,b[9-11],c[1],login-0", ["a", "b9", "b10", "b11", "c1", "login-0"]),
        ("r[1-2]n[08-09]-ib", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]),
    ],
)
def test_lists_of_nodes_are_expanded_as_slurm_writes_them(text, names):
    assert places.expand_nodes(text) == names


def test_task_of_srun_finds_its_place():
    nodes = "node01", "node02", "node03"
    expected = Place(3, 6, "node01", places.choose_port(4711), SECRET, local=1, node="node02", nodes=nodes)
    assert find_place(SLURM) == expected


@pytest.mark.parametrize("missing", ["SLURM_STEP_NUM_TASKS", None])
def test_batch_script_and_single_task_run_alone(missing):
    env = {name: value for name, value in SLURM.items() if name != missing}
    if missing is None:
        env["SLURM_STEP_NUM_TASKS"] = "1"
    assert find_place({**env, "SLURM_NTASKS": "6"}) == Place()


def config(index, addresses, kind="worker", **more):
    cluster = {"worker": addresses, **more}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def test_tf_config_says_the_place_also_beside_slurm():
    hosts = ["a:1", "a:2", "b:1", "b:2"]
    found = find_place({**SLURM, **config(3, hosts)})
    assert (found.index, found.count, found.host, found.port, found.local, found.nodes) == (3, 4, "a", 1, 1, ("a", "b"))
    assert find_place({**config(0, ["b:1"], chief=["a:7"]), "DIFFUSION_SECRET": SECRET}).index == 1
    assert find_place({**config(0, ["b:1"], "chief", chief=["a:7"]), "DIFFUSION_SECRET": SECRET}).port == 7
    for alone in config(0, ["a:1"]), {"TF_CONFIG": ""}, {"TF_CONFIG": '{"task": {}}'}, {}:
        assert find_place(alone) == Place()


@pytest.mark.parametrize(
    "env",
    [{"TF_CONFIG": "{"}, {"TF_CONFIG": "[1]"}, config(4, ["a:1", "b:1"]), config(-1, ["a:1", "b:1"])]
    + [config(0, ["a", "b"]), config(0, ["a:1", "b:1"], "ps"), config("x", ["a:1", "b:1"])],
)
def test_invalid_tf_config_is_an_error(env):
    with pytest.raises(ValueError, match="TF_CONFIG does not say"):
        find_place({**env, "DIFFUSION_SECRET": SECRET})


@pytest.mark.parametrize("secret", ["", "short"])
def test_several_tasks_need_a_secret(secret):
    with pytest.raises(ValueError, match="export DIFFUSION_SECRET"):
        find_place({**SLURM, "DIFFUSION_SECRET": secret})


def test_jobs_and_steps_at_the_same_time_have_different_ports():
    jobs = [places.choose_port(job, step) for job in range(10**6, 10**6 + 900) for step in range(3)]
    assert len(set(jobs)) == len(jobs) and min(jobs) > 1024 and max(jobs) < 32768


def connect(secret=SECRET, other=SECRET):
    """Both ends of a line, or the errors that they raised."""
    ends, sockets = {}, socket.socketpair(socket.AF_UNIX)

    def open_end(k, known):
        try:
            ends[k] = Line(sockets[k], known, caller=k == 0)
        except (OSError, EOFError) as error:
            sockets[k].close()
            ends[k] = error

    threads = [threading.Thread(target=open_end, args=(k, known)) for k, known in enumerate((secret, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends[0], ends[1]


@pytest.fixture
def over_unix(monkeypatch):
    """Lines over a pair of sockets that know no TCP."""
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *options: None)


def test_line_carries_values_both_ways(over_unix):
    one, other = connect()
    large = os.urandom(3 * line.PIECE + 1)
    threading.Thread(target=one.send, args=({"a": large},), daemon=True).start()
    other.send(2)
    assert other.receive() == {"a": large} and one.receive() == 2
    other.close()
    with pytest.raises((OSError, EOFError)):
        one.receive()


def test_line_to_one_that_does_not_know_the_secret_is_not_opened(over_unix):
    one, other = connect(other="another secret")
    assert isinstance(one, PermissionError) and isinstance(other, (PermissionError, EOFError, OSError))


def test_proof_that_is_sent_back_opens_no_line(monkeypatch, over_unix):
    """Somebody without the secret who returns whatever they receive."""
    monkeypatch.setattr(line, "GREETING", 0.3)
    ours, theirs = socket.socketpair(socket.AF_UNIX)

    def echo():
        while piece := theirs.recv(64):
            theirs.sendall(piece)

    threading.Thread(target=echo, daemon=True).start()
    with pytest.raises(PermissionError):
        Line(ours, SECRET, caller=False)
    ours.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.0\r\n\r\n", bytes(64)])
def test_stranger_opens_no_line_and_nothing_is_unpickled(monkeypatch, over_unix, sent):
    monkeypatch.setattr(line, "GREETING", 0.3)
    monkeypatch.setattr(line.pickle, "loads", None)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    theirs.sendall(sent)
    with pytest.raises(OSError):
        Line(ours, SECRET, caller=False)


def test_silent_end_is_noticed_and_a_living_one_is_waited_for(monkeypatch, over_unix):
    monkeypatch.setattr(line, "BEAT", 0.05)
    one, other = connect()
    one.patience = other.patience = 0.3
    threading.Timer(0.6, other.send, ["late"]).start()
    assert one.receive() == "late"
    other._sending.acquire()  # as if the process was stopped
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        one.receive()
    assert 0.2 < time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("callers", "called", "hosts"),
    [
        (["10.0.0.2", "10.0.0.3"], ["10.0.0.1"] * 2, ["10.0.0.1", "10.0.0.2", "10.0.0.3"]),
        (["127.0.0.1", "10.0.0.3"], ["127.0.1.1", "10.0.0.1"], ["10.0.0.1", "10.0.0.1", "10.0.0.3"]),
        (["127.0.0.1"], ["127.0.1.1"], ["127.0.0.1"] * 2),
    ],
)
def test_workers_beside_the_first_are_reached_from_others(callers, called, hosts):
    assert choose_hosts(callers, called) == hosts


BEGIN = """
import os, signal, sys, time
from support import line, worker
worker.GRACE, line.BEAT = 0.3, 0.1
from support.worker import at_work
with at_work("program.py") as me:
    me.obey(lambda number: me.leave(128 + number), comfort="; comfort")
"""


def start(index, port, code, count=3, **more):
    """Starts a worker."""
    env = {**config(index, [f"127.0.0.1:{port}"] * count), "DIFFUSION_SECRET": SECRET, **more}
    code = BEGIN + "".join(f"    {row}\n" for row in code.splitlines())
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=environment(**env), stdout=pipe, stderr=pipe, text=True)


def run_all(code, count=3):
    """The exit status, output and errors of each worker."""
    port = free_port()
    processes = [start(index, port, code, count) for index in range(count)]
    done = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *printed) for process, printed in zip(processes, done, strict=True)]


def test_workers_exchange_values_and_end_with_the_first_one():
    code = """
parts = me.gather(list(me.share(7)))
word = me.from_first(f"word {me.index}")
words = me.gather(word)
hosts = {address.split(":")[0] for address in me.addresses(5)}
print(parts, words, hosts)
if not me.first: time.sleep(60)
sys.exit(7)
"""
    first, *others = run_all(code)
    assert first == (7, "[[0, 1], [2, 3], [4, 5, 6]] ['word 0', 'word 0', 'word 0'] {'127.0.0.1'}\n", "")
    assert others == [(7, "", "")] * 2


NAMED = r"program.py: worker {} of 3 \(process \d+ on \S+\) {}; comfort\n"


@pytest.mark.parametrize(
    ("code", "statuses", "said"),
    [
        ("if me.index == 1: sys.exit('why')", (1, 1, 1), NAMED.format(2, r"ended with exit status 1 \(why\)")),
        ("if me.index == 2: os.kill(os.getpid(), 9)", (137, 137, -9), NAMED.format(3, "was lost: it ended .*")),
        ("time.sleep(0.1 * me.first)\nsys.exit('alike')", (1, 1, 1), "alike\n"),
        slow("if me.index == 2: raise OSError('disk')", (1, 1, 1), NAMED.format(3, r".* 1 \(program.py: disk\)")),
        slow("if me.index == 1: 1 / 0", (1, 1, 1), NAMED.format(2, r".* 1 \(ZeroDivisionError: division by zero\)")),
    ],
)
def test_first_worker_says_how_another_one_ended(code, statuses, said):
    """Nothing is said twice."""
    done = run_all(f"me.from_first(me.gather(0))\n{code}\ntime.sleep(60)")
    assert tuple(status for status, _, _ in done) == statuses, done
    assert re.fullmatch(said, "".join(errors for _, _, errors in done)), done


def test_second_worker_says_that_the_first_one_is_lost():
    """The third one, on the same machine, is silent."""
    done = run_all("me.from_first(me.gather(0))\nif me.first: os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert [status for status, _, _ in done] == [-9, 137, 137]
    assert re.fullmatch(NAMED.format(1, "was lost: it ended .*"), done[1][2]) and done[2][2] == ""


@pytest.mark.slow
def test_two_workers_that_are_lost_at_once_are_one_sentence():
    """Although the end takes a while, as when a save is finished first."""
    code = """
me.obey(print, lambda: time.sleep(0.5), "; comfort")
me.from_first(me.gather(0))
if not me.first: os.kill(os.getpid(), 9)
time.sleep(60)
"""
    first, *_ = run_all(code)
    assert first[0] == 137 and re.fullmatch(NAMED.format("[23]", "was lost: .*"), first[2]), first


def test_hung_worker_is_named():
    code = """
me.from_first(me.gather(0))
for one in me._lines.values(): one.patience = 0.5
print("ready", flush=True)
time.sleep(60)
"""
    port = free_port()
    processes = [start(index, port, code) for index in range(3)]
    assert processes[0].stdout.readline() == "ready\n"
    time.sleep(0.2)
    processes[2].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    out, err = processes[0].communicate(timeout=30)
    assert re.fullmatch(NAMED.format(3, "has not answered for 0.5 s; .*"), err), err
    assert time.monotonic() - begun < 5 and processes[1].wait(10) == 137
    processes[2].kill()
    processes[2].wait()


def test_worker_that_is_ready_waits_for_the_first_one():
    """A scheduler may end a task soon after another one has ended."""
    code = """
me.gather(0)
if me.first:
    with me.time_limit(0.2, "long ago"): pass
    time.sleep(0.5)
    sys.exit(7)
"""
    assert run_all(code, 2) == [(7, "", "")] * 2


def test_what_takes_too_long_ends_all():
    code = "me.meet()\nwith me.time_limit(0.3, 'took too long'): time.sleep(60 * me.first)\ntime.sleep(60)"
    done = run_all(code, 2)
    assert [status for status, _, _ in done] == [137, 137]
    assert [errors for _, _, errors in done] == ["program.py: took too long; comfort\n", ""]


def test_signal_that_comes_to_all_is_heard_once():
    code = """
me.obey(lambda number: print("heard", number))
me.from_first(me.gather(0))
me.pass_on(15)
time.sleep(0.5)
"""
    assert [printed for _, printed, _ in run_all(code)] == ["heard 15\n", "", ""]


def test_late_worker_is_waited_for_with_a_sentence():
    port, code = free_port(), "worker.LATE = 0.3\nprint(me.gather(me.index))"
    first = start(0, port, code)
    said = first.stderr.readline()
    assert said == "program.py: waiting for workers 2, 3 of 3\n"
    others = [start(index, port, code) for index in (1, 2)]
    assert first.communicate(timeout=30) == ("[0, 1, 2]\n", "") and [one.wait(30) for one in others] == [0, 0]


@pytest.mark.slow
def test_worker_with_another_secret_is_not_let_in():
    port = free_port()
    other = start(1, port, "me.meet(2)", 2, DIFFUSION_SECRET="another secret of a job")
    first = start(0, port, "me.meet(1)", 2)
    out, err = first.communicate(timeout=30)
    assert first.returncode == 1 and "worker 2 of 2" in err and "did not know DIFFUSION_SECRET" in err
    assert other.wait(30) == 1


def test_index_that_two_workers_have_is_named():
    port = free_port()
    workers = [start(index, port, "me.meet(3)") for index in (0, 1, 1)]
    _, err = workers[0].communicate(timeout=30)
    said = r"worker.* 3 of 3 did not come within .* minutes; another process says that it is worker 2"
    assert workers[0].returncode == 1 and re.search(said, err.splitlines()[-1])
    assert all(worker.wait(30) for worker in workers)


def test_port_in_use_is_an_error_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        out, err = (first := start(0, port, "me.meet()", 2)).communicate(timeout=30)
    assert first.returncode == 1 and err.count("\n") == 1 and f"port {port}" in err and "cannot be used" in err
