"""The shape of the project: imports go one way, nothing heavy is imported early, options are documented."""

import ast
import glob
import graphlib
import os
import platform
import re
import subprocess

import pytest
from conftest import ROOT, SCRIPTS

from training import settings

PACKAGES = ("data", "diffusion", "evaluation", "support", "training")
# What the modules of a package, or a module at the top level, may import of ours.
ALLOWED = {
    "ddpm": ("support.checks",),
    "unet": ("diffusion.layers",),
    "data": (
        "data",
        *("support.console", "support.device", "support.files", "support.grids", "support.lock", "support.scale"),
    ),
    "diffusion": ("ddpm", "unet", "diffusion", "support"),
    "evaluation": ("ddpm", "data", "diffusion", "evaluation", "support"),
    "support": ("support",),
    "training": ("ddpm", "unet", "data", "diffusion", "support", "training"),
}
LIGHT = ("support.checks", "support.console", "support.device", "support.files")  # what everything may build on


BESIDE_LAYERS = {"diffusion.layers": ("diffusion.dropout",), "diffusion.dropout": ()}  # what files of models need


def modules():
    """All modules but the tests and benchmarks, with the paths of their files."""
    found = {name[:-3]: os.path.join(ROOT, name) for name in os.listdir(ROOT) if name.endswith(".py")}
    for package in PACKAGES:
        for name in os.listdir(os.path.join(ROOT, package)):
            if name.endswith(".py"):
                module = package if name == "__init__.py" else f"{package}.{name[:-3]}"
                found[module] = os.path.join(ROOT, package, name)
    return found


MODULES = modules()


def imports(module, anywhere):
    """Modules of ours that a module imports, at its top level or anywhere."""
    with open(MODULES[module], encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {name[:-3] for name in SCRIPTS}))
def test_imports_go_one_way(module):
    owner = module.split(".")[0]
    allowed = () if module in PACKAGES and module != "data" else ALLOWED[owner]
    allowed = LIGHT if module in LIGHT else BESIDE_LAYERS.get(module, allowed)
    for imported in imports(module, anywhere=True):
        assert imported in allowed or imported.split(".")[0] in allowed, imported


def test_scripts_are_imported_by_nothing_of_ours():
    scripts = {name[:-3] for name in SCRIPTS}
    for module in MODULES:
        assert not imports(module, anywhere=True) & scripts


def test_any_module_can_be_imported_first():
    """Imports at the top level form no circle."""
    graphlib.TopologicalSorter({module: imports(module, anywhere=False) for module in MODULES}).prepare()


def public_functions(module):
    """Functions and methods of a module that others may call."""
    with open(MODULES[module], encoding="utf-8") as file:
        tree = ast.parse(file.read())
    bodies = [("", tree.body), *((node.name + ".", node.body) for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner, body in bodies:
        for node in body:
            if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
                yield owner + node.name, node


@pytest.mark.parametrize("module", sorted(module for module in MODULES if module.split(".")[0] in PACKAGES))
def test_public_functions_carry_type_hints(module):
    """Except for the layers, which are written as on the slides."""
    if module == "diffusion.layers":
        return
    for name, node in public_functions(module):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare and (node.returns is not None or name.endswith("__init__")), f"{name}: {bare or 'its result'}"


def test_help_and_imports_of_the_scripts_are_light(run):
    code = (
        "import contextlib, io, os, runpy, sys\n"
        f"for script in {SCRIPTS!r}[:-1]:\n"
        "    sys.argv = [script, '--help']\n"
        f"    path = os.path.join({ROOT!r}, script)\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(path, run_name='__main__')\n"
        "    assert out.getvalue().startswith('usage: ' + script), script\n"
        "assert not {'tensorflow', 'keras', 'matplotlib'} & sys.modules.keys()\n"
        "import reverse_diffusion, diffusion_model, evaluate, figures\n"
        "assert not {'tensorflow', 'keras', 'matplotlib'} & sys.modules.keys()\n"
        "from support import device; device.start_tensorflow()\n"
        "print(os.environ.get('TF_ENABLE_ONEDNN_OPTS'))"
    )
    process = run("-c", code)
    assert process.returncode == 0, process.stderr
    if platform.machine() == "x86_64":
        assert process.stdout == "1\n"


def test_help_needs_no_docstrings_and_no_folder_in_the_path(run):
    """As `python -OO` and `python -P` start the scripts; each finds our modules by itself."""
    code = (
        "import contextlib, io, os, runpy, sys\n"
        "def usage(run, name):\n"
        "    sys.argv = [name, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        run(name, run_name='__main__')\n"
        "    print(out.getvalue().split()[0])\n"
        "path = list(sys.path)\n"
        f"for script in {SCRIPTS!r}:\n"
        f"    usage(runpy.run_path, os.path.join({ROOT!r}, script))\n"
        "    sys.path[:] = path\n"
        f"    for name in [name for name in sys.modules if name.split('.')[0] in {PACKAGES!r}]:\n"
        "        del sys.modules[name]\n"
        f"sys.path.insert(0, {ROOT!r})\n"
        "for module in 'data', 'training.publish':\n"
        "    usage(runpy.run_module, module)\n"
    )
    process = run("-OO", "-P", "-c", code, PYTHONPATH="")
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert process.stdout.lower() == "usage:\n" * (len(SCRIPTS) + 2)


@pytest.mark.parametrize("script", ["diffusion_model.py", "reverse_diffusion.py", "evaluate.py", "figures.py"])
def test_a_python_without_packages_is_said_in_a_sentence(run, script):
    process = run("-S", os.path.join(ROOT, script), "--help")  # as when `.venv` is not activated
    assert process.returncode == 2 and process.stdout == "" and len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith(f"{script}: this Python, ") and "lacks numpy, PIL," in process.stderr


def test_the_page_of_options_is_fresh():
    with open(os.path.join(ROOT, "docs", "options.md"), encoding="utf-8") as file:
        assert file.read() == settings.options_page(), "run python -m training.settings > docs/options.md"


def test_no_file_of_the_project_is_ignored_by_git():
    """`.gitignore` leaves out what users make, and must not leave out fixtures."""
    tracked = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert tracked.returncode != 0 or tracked.stdout == ""


def test_no_source_file_is_long():
    paths = [*MODULES.values(), *glob.glob(os.path.join(ROOT, "benchmarks", "**", "*.py"), recursive=True)]
    lengths = {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            lengths[os.path.relpath(path, ROOT)] = len(file.readlines())
    assert {name: length for name, length in lengths.items() if length > 330} == {} and lengths["ddpm.py"] <= 300
    assert lengths["reverse_diffusion.py"] <= 250


def test_names_of_tests_are_short_and_formatting_is_automatic():
    """At most 60 characters, few directives for the formatter, and few names that begin with "of"."""
    paths = [*MODULES.values()]
    for folder in "benchmarks", "tests":
        paths += glob.glob(os.path.join(ROOT, folder, "**", "*.py"), recursive=True)
    text = ""
    for path in paths:
        with open(path, encoding="utf-8") as file:
            text += file.read()
    assert [name for name in re.findall(r"^ *def (test_\w+)", text, re.MULTILINE) if len(name) > 60] == []
    assert len(re.findall(r"# fmt: (?:off|skip)", text)) <= 5
    assert len(re.findall(r"\bof_\w+", text)) <= 10
