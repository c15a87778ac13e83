"""The report of `on_gpu.py`, in JSON for the next call and in Markdown for people."""

import importlib.util
import json
import os
import sys

import common

from gpu_checks import CHECKS, PARTS
from support import files


class Report:
    """Results by check, in two files that are complete after every check."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "report.json")
        self.results = {}
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.results = json.load(file)["checks"]

    def status(self, name):
        """What became of a check so far, None if nothing."""
        return self.results.get(name, {}).get("status")

    def facts(self):
        """What `find_device` found."""
        return self.results.get("find_device", {}).get("result") or {}

    def add(self, name, status, seconds=0.0, **outcome):
        """Adds a check, with its `result`, or `why` there is none, or its `error`."""
        self.results[name] = {"part": CHECKS[name].part, "status": status, "seconds": round(seconds, 1), **outcome}
        document = {"command": " ".join(sys.argv), "machine": common.machine(*installed()), "checks": self.results}
        write(self.path, json.dumps(document, indent=1))
        write(self.path[:-5] + ".md", self.markdown(document))

    def markdown(self, document):
        """A table for each part, then whole errors."""
        lines = ["# On this GPU", "", f"`{document['command']}`", "", document["machine"], ""]
        errors = []
        for part in PARTS:
            rows = [(name, result) for name, result in self.results.items() if result["part"] == part]
            if not rows:
                continue
            lines += [f"## {part}", "", "| check | result | seconds |", "|---|---|---|"]
            for name, result in rows:
                values = result.get("result") or {}
                words = "; ".join(f"{key}: {value}" for key, value in values.items()) or result.get("why", "see below")
                cell = f"{result['status']}: {words}".replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {name.replace('_', ' ')} | {cell} | {result['seconds']} |")
                if result["status"] == "failed":
                    errors += [f"### {name}", "", "```", result["error"].strip(), "```", ""]
            lines.append("")
        return "\n".join(lines + (["## errors", "", *errors] if errors else [])) + "\n"


def write(path, text):
    with files.replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
        file.write(text)


def installed():
    return [name for name in ("tensorflow", "keras", "torch", "jax") if importlib.util.find_spec(name)]
