"""Notebooks: exercises in them, and stored outputs that belong to their code.

    with exercise(3): assert …                           in a notebook: solved, or not solved yet
    python -m support.notebook docs/lecture.ipynb        executes it and stores its outputs (needs nbclient)

A notebook is a dict, as `json` reads it. A code cell that begins with `# Exercise 3` is for the reader to complete; its
solution is the Python code in the folded text cell "Solution of exercise 3".
"""

import base64
import contextlib
import copy
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from support import console
from support.files import replacing

Notebook = dict[str, Any]
SOLUTION = re.compile(r"<summary>Solution of exercise (\d+)</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL)
WIDGET = "application/vnd.jupyter.widget-view+json"
LONGEST = 1800  # seconds that a cell may take
COLOURS = 128  # of a stored image


@contextlib.contextmanager
def exercise(number: int) -> Iterator[None]:
    """Checks an exercise: says whether it is solved, or not solved yet where its code raises NotImplementedError.

    A wrong solution fails with the assertion that it does not fulfil.
    """
    try:
        yield
    except NotImplementedError:
        console.say(f"exercise {number}: not solved yet")
    else:
        console.say(f"exercise {number}: solved")


def read(path: str | os.PathLike) -> Notebook:
    """A notebook from its file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def source(cell: dict) -> str:
    """The text of a cell, which a file may hold as lines."""
    return "".join(cell["source"])


def code_cells(notebook: Notebook) -> list[dict]:
    """The cells with code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def digest(notebook: Notebook) -> str:
    """Identifies the code of a notebook; stored with the outputs, it tells whether they belong together."""
    return hashlib.blake2b(
        json.dumps([source(cell) for cell in code_cells(notebook)]).encode(), digest_size=8
    ).hexdigest()


def solutions(notebook: Notebook) -> dict[int, str]:
    """The code of the solutions by the number of their exercise."""
    texts = [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return {int(number): code for text in texts for number, code in SOLUTION.findall(text)}


def exercise_cells(notebook: Notebook) -> dict[int, dict]:
    """The cells that the reader completes by the number of their exercise."""
    found = ((re.match(r"# Exercise (\d+)", source(cell)), cell) for cell in code_cells(notebook))
    return {int(match[1]): cell for match, cell in found if match}


def solve(notebook: Notebook, **other: str) -> Notebook:
    """A copy of a notebook with the solutions in place.

    Args:
        other: code to take instead of a solution, as `exercise3="…"`.
    """
    solved, answers = copy.deepcopy(notebook), solutions(notebook)
    for number, cell in exercise_cells(solved).items():
        cell["source"] = other.get(f"exercise{number}", answers[number])
    return solved


def images(notebook: Notebook) -> list[bytes]:
    """All PNG images among the outputs, and those that widgets hold."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    for widget in widget_states(notebook):
        outputs += widget.get("outputs", [])
    return [
        base64.b64decode(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]


def widget_states(notebook: Notebook) -> list[dict]:
    """The states of the widgets that a notebook holds."""
    stored = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    return [widget["state"] for widget in stored.get("state", {}).values()]


def execute(notebook: Notebook, folder: str | os.PathLike) -> Notebook:
    """A copy of a notebook, executed from top to bottom in a new kernel `python3` that is started in a folder.

    Raises:
        OSError: if a package is missing.
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    try:
        import ipykernel  # noqa: F401 (which nbclient does not ask for)
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        raise OSError(f"{error}; `pip install nbclient ipykernel ipywidgets` brings what executes notebooks") from error

    executed = nbformat.reads(json.dumps(notebook), as_version=4)
    resources = {"metadata": {"path": os.fspath(folder)}}
    how = {"kernel_name": "python3", "timeout": LONGEST, "record_timing": False, "store_widget_state": True}
    NotebookClient(executed, resources=resources, **how).execute()
    return json.loads(nbformat.writes(executed))


def tidy(notebook: Notebook) -> None:
    """Outputs as they are stored: the last state of a progress bar, small images, nothing of this machine."""
    for cell in code_cells(notebook):
        cell["metadata"].pop("execution", None)
        cell["outputs"] = merge_streams(cell["outputs"])
        for output in cell["outputs"]:
            shrink_image(output)
            if WIDGET in output.get("data", {}):  # what is seen where no kernel runs
                output["data"]["text/plain"] = ["run this cell to see its slider"]
    for widget in widget_states(notebook):
        for output in widget.get("outputs", []):
            shrink_image(output)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] |= {"kernelspec": kernel, "language_info": {"name": "python"}, "code": digest(notebook)}


def merge_streams(outputs: list[dict]) -> list[dict]:
    """Outputs with neighbouring pieces of text joined, and of a line that was written over only its last state."""
    merged = []
    for output in outputs:
        if output["output_type"] == "stream" and merged and merged[-1].get("name") == output["name"]:
            merged[-1]["text"] = "".join(merged[-1]["text"]) + "".join(output["text"])
        else:
            merged.append(output)
    for output in merged:
        if output["output_type"] == "stream":
            lines = "".join(output["text"]).split("\n")
            lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines]
            output["text"] = "\n".join(lines).splitlines(keepends=True)
    return merged


def shrink_image(output: dict) -> None:
    """Stores the PNG image of an output, if it has one, with a palette."""
    from PIL import Image

    data = output.get("data", {})
    if "image/png" in data:
        image, small = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))), io.BytesIO()
        image.convert("RGBA").quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            small, "PNG", optimize=True
        )
        data["image/png"] = base64.b64encode(small.getvalue()).decode() + "\n"


def write(notebook: Notebook, path: str | os.PathLike) -> None:
    """Writes a notebook as Jupyter does, completely or not at all."""
    with replacing(path) as draft, open(draft, "w", encoding="utf-8") as file:
        file.write(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def main() -> None:
    parser = console.Parser(description=__doc__)
    parser.add_argument("path", metavar="FILE.ipynb", help="the notebook to execute")
    path = parser.parse_args().path
    with console.one_line_errors("support.notebook"):
        notebook = execute(read(path), os.path.dirname(os.path.abspath(path)))
        tidy(notebook)
        write(notebook, path)
        console.say(f"{path}: {len(code_cells(notebook))} cells, {sum(map(len, images(notebook))):,} bytes of images")


if __name__ == "__main__":
    sys.exit(main())
