"""The place of this process among the workers of a job, as our launcher, SLURM's `srun` or `TF_CONFIG` tell it.

Only the first worker's address must be known: the others come to it (`support/worker.py`).
"""

import dataclasses
import ipaddress
import itertools
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence

LAUNCHED = "DIFFUSION_WORKER"  # index, count, port and secret, set by `support/launcher.py`
SECRET = "DIFFUSION_SECRET"  # set by the user: what only the processes of a job know
SHORTEST_SECRET = 16
PORTS = range(15000, 30000)  # Linux takes others for outgoing connections


@dataclasses.dataclass(frozen=True)
class Place:
    """Place `index` among `count` workers; a process alone has the first of one.

    Attributes:
        host, port: where the first worker listens.
        secret: what only the workers of this job know.
        local: place among the workers of the same machine.
        node: name of this machine, as in `nodes`.
        nodes: names of all machines, if they are known.
        launched: whether `support/launcher.py` has started the workers, all on this machine.
    """

    index: int = 0
    count: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    secret: str = ""
    local: int = 0
    node: str = dataclasses.field(default_factory=socket.gethostname)
    nodes: tuple[str, ...] = ()
    launched: bool = False


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process.

    Raises:
        ValueError: if `TF_CONFIG` is invalid, or there is no secret.
    """
    if LAUNCHED in environ:
        index, count, port, secret = environ[LAUNCHED].split()
        index = int(index)
        return Place(index, int(count), port=int(port), secret=secret, local=index, launched=True)
    place = _in_tf_config(environ.get("TF_CONFIG", ""))
    if place.count == 1:
        place = _in_slurm(environ)
    if place.count == 1:
        return place
    if len(environ.get(SECRET, "")) < SHORTEST_SECRET:
        raise ValueError(
            f"{place.count} tasks know each other by a secret of {SHORTEST_SECRET} characters or more, the same for "
            f"all; before they start: export {SECRET}=$(openssl rand -hex 16); for a run alone: srun --ntasks=1"
        )
    return dataclasses.replace(place, secret=environ[SECRET])


def _in_slurm(environ):
    """A task of `srun`; a batch script, which has tasks but is none, runs alone."""
    count = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1:
        return Place()
    nodes, node = expand_nodes(environ["SLURM_STEP_NODELIST"]), environ.get("SLURMD_NODENAME", socket.gethostname())
    port = choose_port(int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"]))
    local = int(environ.get("SLURM_LOCALID", 0))
    return Place(int(environ["SLURM_PROCID"]), count, nodes[0], port, local=local, node=node, nodes=tuple(nodes))


def _in_tf_config(text):
    """A worker, or the chief, of TensorFlow's description of a cluster."""
    if not text.strip():
        return Place()
    try:
        config = json.loads(text)
        if not config.get("cluster"):  # as some cloud services set it for one machine
            return Place()
        addresses = {kind: config["cluster"].get(kind, []) for kind in ("chief", "worker")}
        kind, index = config["task"]["type"], int(config["task"]["index"])
        before, everyone = addresses["chief"][: kind == "worker"], [*addresses["chief"], *addresses["worker"]]
        hosts, ports = zip(*(address.rsplit(":", 1) for address in everyone), strict=True)
        index, local = len(before) + index, hosts[: len(before) + index].count(hosts[len(before) + index])
        if not 0 <= index < len(before) + len(addresses[kind]):
            raise ValueError(f"index {index}")
        nodes = tuple(dict.fromkeys(hosts))
        return Place(index, len(everyone), hosts[0], int(ports[0]), local=local, node=hosts[index], nodes=nodes)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"TF_CONFIG does not say which worker this is ({type(error).__name__}: {error}); it should be like "
            '{"cluster": {"worker": ["host1:15000", "host2:15000"]}, "task": {"type": "worker", "index": 0}}'
        ) from None


def choose_port(job: int, step: int = 0) -> int:
    """A port for a job: jobs that run at the same time, and steps of a job, have different ones."""
    return PORTS[(job + 1000 * step) % len(PORTS)]


def choose_hosts(callers: Sequence[str], called: Sequence[str]) -> list[str]:
    """The host of the first worker, and those of the others, as all of them reach it.

    Args:
        callers, called: the hosts of both ends of the lines to the others; who has called this machine's own address
            (loopback) is on the first worker's machine.
    """
    first = next((host for host in called if not ipaddress.ip_address(host).is_loopback), "127.0.0.1")
    return [first, *(first if ipaddress.ip_address(host).is_loopback else host for host in callers)]


def expand_nodes(text: str) -> list[str]:
    """Names that SLURM abbreviates: `node[01-02,07],login` is node01, node02, node07 and login."""
    names = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        literal_and_ranges = re.split(r"\[([^\]]*)\]", word)
        parts = [_expand_ranges(part) if k % 2 else [part] for k, part in enumerate(literal_and_ranges)]
        names += map("".join, itertools.product(*parts))
    return names


def _expand_ranges(text):
    numbers = []
    for item in text.split(","):
        low, _, high = item.partition("-")
        numbers += [f"{number:0{len(low)}}" for number in range(int(low), int(high or low) + 1)]
    return numbers
