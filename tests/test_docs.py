"""The documents: commands parse, links lead somewhere, and the modules, functions, files and options named exist.

Nothing is run and TensorFlow is not imported: commands go through the scripts' own parsers, names are looked up in the
source.
"""

import ast
import contextlib
import functools
import glob
import io
import itertools
import os
import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(os.path.join("docs", name) for name in glob.glob("*.md", root_dir=os.path.join(ROOT, "docs")))
PACKAGES = sorted(
    name for name in os.listdir(ROOT) if os.path.exists(os.path.join(ROOT, name, "__init__.py")) and name != "tests"
)
LONGEST = 150  # lines of the README
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOREIGN = {"--logdir", "--help", "--nodes", "--ntasks-per-node", "--gres", "--mem", "--wait"}  # of others
NOT_OURS = {"keras", "model", "km", "rd"}  # modules of others, and variables, before a dot
WRITTEN = ("csv", "keras", "npy", "npz", "png", "json", "zip")  # endings of files that users have, not modules


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def spans(text):
    """What stands in single backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


# Commands


def commands(text):
    """Lines of fenced blocks, and spans, that a user may type into a shell or, after an !, into a notebook."""
    blocks = [body for language, body in FENCE.findall(text) if language != "python"]
    lines = [line.strip().lstrip("!") for line in "\n".join(blocks).splitlines()] + spans(text)
    return [line for line in lines if re.match(r"(python3?|pip|sbatch) ", line)]


def parsers():
    """The parser of each script, a function of a list of arguments."""
    import data.__main__
    import evaluate
    import figures
    from diffusion import command_line
    from training import settings

    return {
        "diffusion_model.py": lambda arguments: settings.parse_options("", arguments),
        "reverse_diffusion.py": lambda arguments: command_line.parse_sampling_options(None, arguments),
        "evaluate.py": evaluate.parse_options,
        "figures.py": figures.parse_options,
        "data": data.__main__.parse_options,
    }


def words(command):
    """The words of a command, without its comment and where its output goes."""
    found = shlex.split(command, comments=True)
    return found[: found.index(">")] if ">" in found else found


def check_command(command):
    """Sentences on what is wrong with a command."""
    program, *arguments = words(command)
    if program == "pip":
        files = [file for option, file in zip(arguments, arguments[1:], strict=False) if option == "-r"]
        return [f"there is no {file}" for file in files if not exists(file)]
    if program == "sbatch":
        script, *arguments = itertools.dropwhile(lambda word: word.startswith("--"), arguments)  # options of sbatch
        return [] if exists(script) and not parse("diffusion_model.py", arguments) else [f"{command}: not accepted"]
    if arguments[0] == "-m":
        module, *arguments = arguments[1:]
        if module == "pytest":
            return [f"there is no {word}" for word in arguments if word.endswith(".py") and not exists(word)]
        if module == "data":
            return parse(module, arguments)
        return [] if resolves(module) or module in ("pip", "ruff", "venv") else [f"there is no module {module}"]
    script, *arguments = arguments
    if script == "start.py":
        return [] if arguments[:1] in (["test"], ["setup"], ["notebook"]) else parse("diffusion_model.py", arguments)
    if script.startswith("benchmarks/"):
        if not exists(script):
            return [f"there is no {script}"]
        options = [word for word in arguments if word.startswith("--")]
        return [f"{script} has no {option}" for option in options if f'"{option}"' not in read(script)]
    return parse(script, arguments) if script in parsers() else [f"there is no program {script}"]


def parse(script, arguments):
    """What a script says to its arguments."""
    said = io.StringIO()
    arguments = [__file__ if word == "FILE" else word for word in arguments]  # some options want one that exists
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            parsers()[script](arguments)
        except SystemExit as end:
            return [said.getvalue().strip()] if end.code else []
        except ValueError as error:
            return [str(error)]
    return []


@functools.cache
def options():
    """All options of all programs, from their help and from the source of the benchmarks."""
    said = io.StringIO()
    for script in parsers():
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            parsers()[script](["cats", "--help"] if script == "data" else ["--help"])
    texts = [said.getvalue(), *(read(path) for path in glob.glob("benchmarks/*.py", root_dir=ROOT))]
    return FOREIGN | set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", "\n".join(texts)))


def check_options(span):
    """Sentences on options in a span, not a command, that no program has."""
    named = [] if commands(f"`{span}`") else re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span)
    return [f"no program has {option}" for option in named if option not in options()]


# Names


def exists(path, folder=""):
    return os.path.exists(os.path.join(ROOT, folder, path))


@functools.cache
def module_path(module):
    """The file of a module or package of ours, or None."""
    path = module.replace(".", "/")
    return next((file for file in (path + ".py", path + "/__init__.py") if exists(file)), None)


@functools.cache
def definitions(module):
    """What a module defines or imports, by name; of classes, their attributes as Class.name."""
    found = {}

    def collect(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node
                if isinstance(node, ast.ClassDef):
                    collect(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found.update({prefix + (alias.asname or alias.name): node for alias in node.names})
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                found.update({prefix + name.id: node for name in names})

    collect(ast.parse(read(module_path(module))).body, "")
    return found


def is_ours(dotted):
    return dotted.split(".")[0] in PACKAGES or module_path(dotted.split(".")[0]) is not None


def resolves(dotted):
    """What a dotted name of ours stands for, a path or a syntax tree; None if there is no such thing."""
    parts = dotted.split(".")
    for k in range(len(parts), 0, -1):
        if module_path(".".join(parts[:k])):
            rest = ".".join(parts[k:])
            return definitions(".".join(parts[:k])).get(rest) if rest else module_path(dotted)
    return None


def check_name(span):
    """Sentences on a file, module or function of ours in a span that does not exist."""
    span = re.sub(r"\(.*", "", span)
    if re.fullmatch(r"[\w./-]+\.(py|md|toml|slurm)|[a-z]\w*(/\w+)*/", span):
        return [] if exists(span) else [f"there is no {span}"]
    if not re.fullmatch(r"[a-z]\w*(\.[A-Za-z_]\w*)+", span) or span.split(".")[-1] in WRITTEN:
        return []
    return [] if span.split(".")[0] in NOT_OURS or resolves(span) else [f"there is no {span}"]


def check_python(code):
    """Sentences on imports, attributes and arguments of ours in Python code that do not exist."""
    nodes, ours, wrong = list(ast.walk(ast.parse(code))), {}, []
    for node in nodes:
        if isinstance(node, ast.Import):
            ours |= {alias.asname or alias.name: alias.name for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module):
            ours |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def target(node):
        text = ast.unparse(node)
        first, dot, rest = text.partition(".")
        return ours[first] + dot + rest if first in ours and re.fullmatch(r"[\w.]+", text) else None

    wrong += [f"there is no {name}" for name in ours.values() if not resolves(name)]
    for node in nodes:
        if isinstance(node, ast.Attribute) and (name := target(node)) and not resolves(name):
            value = isinstance(resolves(name.rpartition(".")[0]), ast.Assign)  # whose attributes are not ours
            wrong += [] if value else [f"there is no {name}"]
        if isinstance(node, ast.Call) and (name := target(node.func)) and isinstance(resolves(name), ast.FunctionDef):
            arguments = resolves(name).args
            known = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
            unknown = [] if arguments.kwarg else [word.arg for word in node.keywords if word.arg not in {None, *known}]
            wrong += [f"{name} has no argument {word}" for word in unknown]
    return wrong


# Links


def anchors(text):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)) if "://" not in target]


def check_link(target, text, folder):
    """Sentences on a link, relative to a folder, that leads nowhere."""
    path, _, anchor = target.partition("#")
    if path and not exists(path, folder):
        return [f"the link {target} leads nowhere"]
    if anchor and anchor not in anchors(read(folder, path) if path else text):
        return [f"{path} has no heading {anchor}"]
    return []


def faults(text, folder=""):
    """Everything that is wrong with a page."""
    found = [sentence for command in commands(text) for sentence in check_command(command)]
    found += [sentence for span in spans(text) for sentence in (*check_options(span), *check_name(span))]
    found += [
        sentence for language, code in FENCE.findall(text) if language == "python" for sentence in check_python(code)
    ]
    return found + [sentence for target in links(text) for sentence in check_link(target, text, folder)]


@pytest.mark.parametrize("page", PAGES)
def test_names_on_a_page_exist(page):
    text = read(page)
    assert faults(text, os.path.dirname(page)) == []
    assert text.count("```") % 2 == 0 and len(FENCE.findall(text)) == text.count("```") // 2


WRONG = {
    "a link": "See [training](docs/trainning.md).",
    "an image": "![cats](docs/no-cats.png)",
    "a heading": "[below](#nowhere)",
    "an option": "```sh\npython diffusion_model.py --n-feet 16\n```",
    "a value": "```sh\npython evaluate.py --data FOLDER --only bitz\n```",
    "a notebook's option": "```\n!python reverse_diffusion.py --n-samples 4\n```",
    "an option of start.py": "```sh\npython3 start.py --preset second\n```",
    "an option of a job": "```sh\nsbatch cluster/train.slurm --presets slides\n```",
    "an option of a benchmark": "`python benchmarks/growth.py --output docs/growth.png`",
    "a benchmark": "`python benchmarks/no_such.py`",
    "a script": "```sh\npython train.py\n```",
    "a data set": "```sh\npython -m data dogs\n```",
    "requirements": "```sh\npip install -r requirement.txt\n```",
    "an option in prose": "`--sample-evry 10`",
    "a file": "`support/executor.py`",
    "a module": "`dppm.q_sample`",
    "a module of a package": "`support.executor.split`",
    "a folder": "`evaluations/`",
    "a function": "`ddpm.q_samples`",
    "a method": "`training.saving.Checkpoints.saves`",
    "an import": "```python\nfrom data import load_image\n```",
    "an attribute": "```python\nimport reverse_diffusion as rd\na = rd.sample()\n```",
    "an argument": "```python\nimport reverse_diffusion as rd\na = rd.my_sample(n_samples=4)\n```",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_wrong_page_is_noticed(text):
    assert len(faults(text)) == 1


def test_the_readme_is_short_and_leads_everywhere():
    text = read("README.md")
    assert len(text.splitlines()) <= LONGEST
    linked = {os.path.normpath(target.partition("#")[0]) for target in links(text)}
    assert linked >= {page for page in PAGES if page != "README.md"}
    tree = next(body for _, body in FENCE.findall(text) if "ddpm.py" in body)
    listed = {name.rstrip("/") for line in tree.splitlines() for name in line.split("  ")[0].split()}
    assert {name for name in listed if not exists(name)} == set()
    assert listed >= {"ddpm.py", "unet.py", *SCRIPTS, *PACKAGES}
