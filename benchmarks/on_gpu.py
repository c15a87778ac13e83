"""Everything about this project that only a GPU can show, in order of value and within a given time.

    python benchmarks/on_gpu.py --minutes 25 --out on-gpu          everything
    python benchmarks/on_gpu.py --only runs,speed --out on-gpu     some parts
    python benchmarks/on_gpu.py --tiny --out tiny                  the same checks in small, on any computer

    runs     does it run at all: precisions, XLA, determinism, out of memory, exact resume, SIGTERM
    speed    training and reverse steps, beside the matrix rate of the card and beside PyTorch
    time     where the time of a step goes: kernels, and waiting for the host
    right    losses in three precisions side by side; gradients on the card against the CPU
    devices  several cards: the same losses, speed, resuming on fewer, a killed process
    limits   largest batches, memory of a step
    good     models trained for the minutes that are left: FID of CIFAR-10, if it is there, and KID of drawings

Every check runs in a process of its own. Its result, or its whole error, is written to DIR/report.json and
DIR/report.md at once, so that an interruption loses nothing; the same command again continues with what is missing.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import common  # noqa: F401  puts the project's folder into the path
from gpu_checks import CHECKS, FULL, PARTS, TINY, Size
from gpu_checks.report import Report

from data import keras_sets
from data.cache import cache_folder

for part in PARTS:  # each registers its checks, which run in this order
    importlib.import_module(f"gpu_checks.{part}")


def missing(needs, facts, tiny=False):
    """Why a check cannot run here, or None. In small, several processes on a CPU stand for several GPUs."""
    for need in needs:
        if need == "gpu":
            if not facts.get("gpus"):
                return "needs a GPU"
        elif need == "gpus":
            if facts.get("gpus", 0) < 2 and not (tiny and not facts.get("gpus")):
                return "needs several GPUs"
        elif need == "cifar10":
            if not os.path.exists(os.path.join(cache_folder(), *keras_sets.SETS[need].files)):
                return f"needs CIFAR-10 in {cache_folder()}"
        elif importlib.util.find_spec(need) is None:
            return f"needs the package {need}"
    return None


def full_size(facts):
    """`FULL`, with as many images in a batch as fit on the card in float32, see docs/performance.md."""
    memory = re.search(r", (\d+) MiB", facts.get("driver, memory", ""))
    mib = int(memory[1]) if memory else 80_000
    return dataclasses.replace(FULL, batch=64 if mib > 27_000 else 32 if mib > 15_000 else 8)


def run_check(name, options, facts, seconds):
    """Runs one check in a process of its own; returns its status and its entry in the report."""
    command = [sys.executable, os.path.abspath(__file__), "--check", name]
    size = TINY if options.tiny else full_size(facts)
    env = {**os.environ, "ON_GPU_OUT": os.path.abspath(options.out), "ON_GPU_SECONDS": str(seconds)}
    env["ON_GPU_SIZE"] = json.dumps(dataclasses.asdict(size))
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time", {"why": f"not done within {seconds:.0f} s"}
        printed.seek(0)
        text = printed.read()
    line = re.search(r"^RESULT (.*)$", text, re.MULTILINE)
    if status == 0 and line:
        return "ok", {"result": json.loads(line[1])}
    return "failed", {"error": text[-20000:] or f"exit status {status}"}


def find_the_device(report, options):
    """Begins or continues a report, which belongs to one device.

    Raises:
        SystemExit: if the device is not found, differs from the report's, or is no GPU although the sizes need one.
    """
    before = report.facts().get("name")
    began = time.monotonic()
    status, outcome = run_check("find_device", options, {}, 300)
    if status != "ok":
        sys.exit(f"find_device: {status}\n{outcome.get('error') or outcome['why']}")
    facts = outcome["result"]
    print(f"find_device: ok {facts}", flush=True)
    if before and facts["name"] != before:
        sys.exit(f"{options.out} is the report of {before}, and this is {facts['name']}; choose another --out")
    if not options.tiny and not facts["gpus"]:
        sys.exit("TensorFlow sees no GPU here, and these sizes are for one; --tiny does the same in small")
    report.add("find_device", status, time.monotonic() - began, **outcome)


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="minutes for all checks (25)")
    parser.add_argument(
        "--out", default="on-gpu", metavar="DIR", help="folder of the report; an existing one is continued (on-gpu)"
    )
    parser.add_argument("--only", metavar="PARTS", help=f"parts to run, of {','.join(PARTS)}, or names of checks (all)")
    parser.add_argument("--again", action="store_true", help="also repeat checks that failed before")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a computer without a GPU")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else PARTS
    for name in chosen:
        if name not in PARTS and name not in CHECKS:
            parser.error(f"--only takes some of {','.join(PARTS)}, or names of checks, got {name}")
    options.names = [name for name, (part, *_) in CHECKS.items() if part in chosen or name in chosen]
    return options


def main():
    options = parse_options()
    if options.check:
        result = CHECKS[options.check].function(Size(**json.loads(os.environ["ON_GPU_SIZE"])))
        print("\nRESULT " + json.dumps(result))
        return
    until = time.monotonic() + 60 * options.minutes
    os.makedirs(options.out, exist_ok=True)
    report = Report(options.out)
    find_the_device(report, options)
    names = [name for name in options.names if name != "find_device"]
    for name in names:
        if why := missing(CHECKS[name].needs, report.facts(), options.tiny):
            print(f"will be skipped: {name}, {why}", flush=True)
    names.sort(key=lambda name: (CHECKS[name].part == "good", report.status(name) == "out of time"))  # others first
    for name in names:
        part, expected, needs, _ = CHECKS[name]
        if report.status(name) == "ok" or (report.status(name) == "failed" and not options.again):
            continue
        left = until - time.monotonic()
        if why := missing(needs, report.facts(), options.tiny):
            report.add(name, "skipped", why=why)
        elif left < (5 if options.tiny else min(expected, 60)):
            report.add(name, "not reached", why="the time was over; the same command continues")
        else:
            began = time.monotonic()
            limit = left if part == "good" else min(left, 4 * expected)
            status, outcome = run_check(name, options, report.facts(), limit)
            report.add(name, status, time.monotonic() - began, **outcome)
        entry = report.results[name]
        print(f"{name}: {entry['status']} {entry.get('why') or entry.get('result') or ''}", flush=True)
    print(f"{os.path.join(options.out, 'report.md')}, {os.path.join(options.out, 'report.json')}")


if __name__ == "__main__":
    main()
