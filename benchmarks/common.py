"""Contenders side by side: each in a process of its own, in turn, round after round; medians and ratios.

Every benchmark here prints one table, with the machine and the versions above it. Ratios hold better than times.
"""

import multiprocessing
import os
import platform
import statistics
import sys
import time
from importlib import metadata

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def machine(*packages):
    """One line: processor, cores, and the versions of Python and the packages."""
    from support import device  # found through the line above

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        names = {name.strip(): value.strip() for name, value in lines.items()}
        flags = names.get("flags", "").split()
        vectors = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
        processor = f"{names.get('model name', processor)} ({vectors})"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"{processor}, {device.cores()} cores; Python {platform.python_version()}, {versions}"


class Contender:
    """A function measured in a process of its own, so that none has another's threads or settings.

    Args:
        prepare: a module-level function that returns a function doing the work once.
        arguments: of `prepare`.
        environment: variables to set in that process.
    """

    def __init__(self, prepare, *arguments, **environment):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        os.environ |= environment
        self.process = context.Process(target=_work, args=(end, prepare, arguments), daemon=True)
        self.process.start()
        for variable in environment:
            del os.environ[variable]
        end.close()
        self.ready = self.pipe.recv()  # what `prepare` has warmed up

    def measure(self, count):
        """Seconds of each of `count` times."""
        self.pipe.send(count)
        return self.pipe.recv()

    def stop(self):
        self.pipe.send(None)
        self.process.join()


def _work(pipe, prepare, arguments):
    function = prepare(*arguments)
    for _ in range(3):
        function()
    pipe.send(True)
    while (count := pipe.recv()) is not None:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        pipe.send(seconds)


def race(contenders, rounds, seconds_a_turn=1.0):
    """Median seconds of each contender, measured in turn: whatever the machine does, it does to all.

    Args:
        contenders: a dict of name → `Contender`; they are stopped at the end.
    """
    counts = {name: max(3, round(seconds_a_turn / min(c.measure(3)))) for name, c in contenders.items()}
    medians = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            medians[name].append(statistics.median(contender.measure(counts[name])))
    for contender in contenders.values():
        contender.stop()
    return {name: statistics.median(values) for name, values in medians.items()}


def operations(n_feat, size, batch):
    """Floating-point operations of a training step: 2 for each weight and place of a convolution, 3 times."""
    n, full = n_feat, size * size
    one = 9 * (3 * n + n * n) * full  # the first Conv3Layer
    one += 9 * 2 * n * n * full + 9 * (2 * n * n + 4 * n * n) * full / 4 + 9 * 2 * 4 * n * n * full / 16  # down
    one += (2 * n) * (2 * n) * full / 64  # 4×4 transposed, one weight for each place it makes
    for place, width_in, width in ((full / 16, 4 * n, 2 * n), (full / 4, 4 * n, n), (full, 2 * n, n)):
        one += (width_in * width + 9 * 4 * width * width) * place  # 2×2 transposed, then four 3×3
    one += 9 * 2 * n * 3 * full  # the last
    return 3 * 2 * one * batch


def table(title, rows):
    """Prints rows in columns as Markdown, for docs/performance.md; the first row is the heading."""
    print(f"\n{title}\n")
    widths = [max(len(str(row[k])) for row in rows) for k in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()
