"""`docs/lecture.ipynb`: its code and its names, its formulas and what checks them, its outputs, exercises and mutants.

The fast tests read the notebook and run nothing. The slow ones execute it, need `requirements-optional.txt`, and copy
the files that git knows, so that what lies beside them does not help.
"""

import ast
import builtins
import copy
import json
import os
import re
import resource
import shutil
import subprocess
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, finish, save_tiny_images, start, train_here
from test_docs import check_python, faults, is_ours

from support import notebook

PATH = os.path.join(ROOT, "docs", "lecture.ipynb")
MOST_BYTES = 1_500_000  # of all images
MOST_SECONDS = 600  # on two cores
MACHINE = re.compile(r"(/(home|root|tmp|var|usr|opt|Users|content|mnt)/|[A-Z]:\\)\S*")
LECTURE = notebook.read(PATH)


# What is wrong with a notebook, in sentences


def texts(lecture):
    return [notebook.source(cell) for cell in lecture["cells"] if cell["cell_type"] == "markdown"]


def code(lecture):
    return "\n".join(notebook.source(cell) for cell in notebook.code_cells(lecture))


def check_code(lecture):
    """Every cell compiles; names are defined in it or before; what is ours exists."""
    wrong, known = [], set(dir(builtins))
    for number, cell in enumerate(notebook.code_cells(lecture), 1):
        try:
            nodes = list(ast.walk(ast.parse(notebook.source(cell))))
        except SyntaxError as error:
            return [f"code cell {number}: {error}"]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        imported = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        known |= {alias.asname or alias.name.split(".")[0] for alias in imported}
        wrong += [f"code cell {number}: {node.id} is not defined" for node in names if node.id not in known]
    return wrong + check_python(code(lecture))


def imported_from_us(lecture):
    """Names of modules and functions of ours, as the notebook calls them."""
    names = set()
    for node in ast.walk(ast.parse(code(lecture))):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module):
            names |= {alias.asname or alias.name for alias in node.names}
    return names - {"exercise"}


def check_formulas(lecture):
    """After every displayed formula a cell checks a function of ours against NumPy."""
    wrong, ours = [], imported_from_us(lecture)
    for cell, after in zip(lecture["cells"], [*lecture["cells"][1:], None], strict=True):
        if cell["cell_type"] != "markdown" or "$$" not in notebook.source(cell):
            continue
        nodes = []
        if after and after["cell_type"] == "code":
            nodes = list(ast.walk(ast.parse(notebook.source(after))))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        asserted = any(isinstance(node, ast.Assert) for node in nodes)
        asserted |= any(isinstance(node, ast.Attribute) and node.attr.startswith("assert_") for node in nodes)
        if not (asserted and names & ours and "np" in names):
            wrong.append(f"a formula is not checked: {notebook.source(cell).split('$$')[1].strip()[:60]}")
        if notebook.source(cell).count("$$") % 2:
            wrong.append("a formula has no end")
    return wrong


def check_outputs(lecture):
    """They are those of this code, run from top to bottom, without errors, warnings, or traces of a machine."""
    wrong, cells = [], notebook.code_cells(lecture)
    if lecture["metadata"].get("code") != notebook.digest(lecture):
        wrong.append("the outputs belong to other code; run python -m support.notebook docs/lecture.ipynb")
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        wrong.append("the cells were not executed once from top to bottom")
    outputs = [output for cell in cells for output in cell["outputs"]]
    wrong += [f"an output is an error: {output['ename']}" for output in outputs if output["output_type"] == "error"]
    wrong += [f"a cell warns: {''.join(output['text'])}" for output in outputs if output.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    allowed = {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"}
    wrong += [f"an output is {kind}" for kind in sorted(kinds - allowed)]
    without_images = copy.deepcopy([*outputs, *notebook.widget_states(lecture)])
    for output in [*without_images, *(inner for state in without_images for inner in state.get("outputs", []))]:
        output.get("data", {}).pop("image/png", None)
    wrong += [f"an output names a place: {found[0]}" for found in MACHINE.finditer(str(without_images))]
    if any("\r" in "".join(output.get("text", "")) for output in outputs):
        wrong.append("a progress bar is stored with all its states")
    size = sum(map(len, notebook.images(lecture)))
    if not 0 < size < MOST_BYTES:
        wrong.append(f"the images have {size:,} bytes")
    return wrong


def check_exercises(lecture):
    """Each has a cell to complete, then one that checks it, then a solution that defines the same."""
    stubs, answers, wrong = notebook.exercise_cells(lecture), notebook.solutions(lecture), []
    if list(stubs) != list(range(1, 11)) or list(answers) != list(stubs):
        wrong.append(f"the exercises are {list(stubs)}, their solutions {list(answers)}")
    cells = lecture["cells"]
    for number in stubs.keys() & answers.keys():
        place = cells.index(stubs[number])
        signatures = [
            ast.unparse(ast.parse(text).body[0].args) for text in (notebook.source(stubs[number]), answers[number])
        ]
        if signatures[0] != signatures[1]:
            wrong.append(f"the solution of exercise {number} takes other arguments")
        if f"**Exercise {number}.**" not in notebook.source(cells[place - 1]):
            wrong.append(f"exercise {number} is not explained")
        if not notebook.source(cells[place + 1]).startswith(f"with exercise({number}):"):
            wrong.append(f"exercise {number} is not checked")
        if not re.search(f"<details><summary>Solution of exercise {number}<", notebook.source(cells[place + 2])):
            wrong.append(f"the solution of exercise {number} does not follow")
    # Cells after an exercise must not depend on whether it is solved.
    checks = [cell for cell in notebook.code_cells(lecture) if notebook.source(cell).startswith("with exercise")]
    others = [cell for cell in notebook.code_cells(lecture) if cell not in checks]
    both = set.union(*map(stored_names, checks)) & set.union(*map(stored_names, others))
    wrong += [f"an exercise changes {name}" for name in sorted(both)]
    # An exercise may be solved after all cells have run.
    for check in checks:
        later = [cell for cell in cells[cells.index(check) + 1 :] if cell in others]
        changed_later = (variables(check, ast.Load) - stored_names(check)) & set().union(*map(stored_names, later))
        wrong += [f"an exercise uses {name}, which a later cell changes" for name in sorted(changed_later)]
    return wrong


def variables(cell, context):
    """The variables that a cell uses, `ast.Load`, or changes, `ast.Store`."""
    nodes = ast.walk(ast.parse(notebook.source(cell)))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def stored_names(cell):
    return variables(cell, ast.Store)


def check_page(lecture):
    """Commands, options and links in the text; the kernel's name; no version of somebody's Python."""
    wrong = [sentence for text in texts(lecture) if "<summary>" not in text for sentence in page_faults(text)]
    if lecture["metadata"]["kernelspec"]["name"] != "python3":
        wrong.append("the kernel is not python3")
    if set(lecture["metadata"]["language_info"]) != {"name"}:
        wrong.append("the metadata name a version")
    return wrong


def page_faults(text):
    """What is wrong with a text; names of the notebook itself, such as `rng.standard_normal`, are not looked up."""
    local = set(re.findall(r"there is no ((?:rng|toy|samplers)\.\w+)", " ".join(found := faults(text, "docs"))))
    return [sentence for sentence in found if not any(name in sentence for name in local)]


CHECKS = check_code, check_formulas, check_outputs, check_exercises, check_page


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_lecture_is_in_order(check):
    assert check(LECTURE) == []


def changed(old, new, kind="code"):
    """The lecture with a text changed once."""
    lecture = copy.deepcopy(LECTURE)
    for cell in lecture["cells"]:
        if cell["cell_type"] == kind and old in notebook.source(cell):
            cell["source"] = notebook.source(cell).replace(old, new, 1)
            return lecture
    raise AssertionError(f"the lecture has no {old}")


def with_output(output):
    lecture = copy.deepcopy(LECTURE)
    notebook.code_cells(lecture)[5]["outputs"] = [output]
    return lecture


def without_cell_after(text):
    lecture = copy.deepcopy(LECTURE)
    place = next(k for k, cell in enumerate(lecture["cells"]) if text in notebook.source(cell))
    del lecture["cells"][place + 1]
    return lecture


def not_executed_last():
    lecture = copy.deepcopy(LECTURE)
    notebook.code_cells(lecture)[-1]["execution_count"] = 3
    return lecture


SPOILED = {
    "a slip of typing": (check_code, lambda: changed("rng = np.random", "rng == np..random")),
    "a name": (check_code, lambda: changed("rng = np.random", "other = np.random")),
    "a function": (check_code, lambda: changed("ddpm.q_sample(", "ddpm.q_samples(")),
    "an argument": (check_code, lambda: changed("image_size=32", "size=32")),
    "no check": (check_formulas, lambda: without_cell_after("$$x_t = \\sqrt{1 - \\beta_t}")),
    "no function": (check_formulas, lambda: changed("ddpm.q_mean(", "np.add(")),
    "a new formula": (check_formulas, lambda: changed("## 10.", "$$E = m c^2$$\n## 10.", "markdown")),
    "other code": (check_outputs, lambda: changed("T + 1", "T + 2")),
    "another order": (check_outputs, not_executed_last),
    "an error": (check_outputs, lambda: with_output({"output_type": "error", "ename": "NameError"})),
    "a warning": (check_outputs, lambda: with_output({"output_type": "stream", "name": "stderr", "text": "beware"})),
    "a place": (check_outputs, lambda: with_output({"output_type": "stream", "name": "stdout", "text": "/home/me/x"})),
    "a vector image": (check_outputs, lambda: with_output({"output_type": "display_data", "data": {"image/svg": ""}})),
    "a bar": (check_outputs, lambda: with_output({"output_type": "stream", "name": "stdout", "text": "\rt = 1\r"})),
    "no exercise": (check_exercises, lambda: changed("# Exercise 4", "# Exercise")),
    "a solution": (check_exercises, lambda: changed("simulate(x_0, beta, rng)", "simulate(x, rng)", "markdown")),
    "a changed variable": (check_exercises, lambda: changed("simulated = ", "x_t = simulated = ")),
    "a variable that changes": (check_exercises, lambda: changed("beta[1:301]", "beta[1 : t + 1]")),
    "a link": (check_page, lambda: changed("(slides.md)", "(slide.md)", "markdown")),
    "a command": (check_page, lambda: changed("--n-sample 64", "--n-samples 64", "markdown")),
}


@pytest.mark.parametrize("check, spoil", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_lecture_is_noticed(check, spoil):
    assert check(spoil()) != []


def test_too_many_bytes_of_images_are_noticed(monkeypatch):
    monkeypatch.setattr(notebook, "images", lambda lecture: [b"x" * MOST_BYTES])
    assert check_outputs(LECTURE) == ["the images have 1,500,000 bytes"]


def test_an_exercise_says_how_far_it_is(capsys):
    with notebook.exercise(3):
        raise NotImplementedError
    with notebook.exercise(4):
        pass
    assert capsys.readouterr().out == "exercise 3: not solved yet\nexercise 4: solved\n"
    with pytest.raises(AssertionError, match="not right"), notebook.exercise(5):
        raise AssertionError("not right")


def test_of_a_bar_only_the_last_state_is_stored():
    stream = {"output_type": "stream", "name": "stdout"}
    pieces = [stream | {"text": text} for text in ("\rt = 9 ━┄  ", "\rt = 5", ["\rt = 0 ━━ \n", "done\n"], "tail\r")]
    assert notebook.merge_streams(pieces) == [stream | {"text": ["t = 0 ━━\n", "done\n", "tail"]}]
    errors = [{"output_type": "stream", "name": name, "text": name} for name in ("stdout", "stderr", "stdout")]
    assert [output["text"] for output in notebook.merge_streams(errors)] == [["stdout"], ["stderr"], ["stdout"]]


# Executed, which takes minutes


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git and a clone")
    folder = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.stdout.split("\0")):
        if os.path.exists(os.path.join(ROOT, name)):
            os.makedirs(folder / os.path.dirname(name), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), folder / name)
    return folder


# In the place of `sitecustomize`, which Python imports as it starts: only this machine can be reached.
NO_NETWORK = """
import socket
connect = socket.socket.connect
def only_here(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(f"the notebook uses the network: {address}")
    return connect(self, address)
socket.socket.connect = only_here
"""


@pytest.mark.slow
@pytest.mark.parametrize("place, solved", [("docs", False), (".", True)])
def test_it_runs_in_a_bare_clone_without_network(clone, place, solved, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # of the tests; the kernel has its own
    lecture = notebook.read(clone / "docs" / "lecture.ipynb")
    before, used = list_files(clone), resource.getrusage(resource.RUSAGE_CHILDREN)
    executed = notebook.execute(notebook.solve(lecture) if solved else lecture, clone / place)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / 2  # of two cores, whatever else they did
    print(f"{seconds:.0f} s of two cores")
    assert seconds < MOST_SECONDS
    assert list_files(clone) == before
    notebook.tidy(executed)
    said = "".join(str(cell["outputs"]) for cell in notebook.code_cells(executed))
    state = "solved" if solved else "not solved yet"
    assert all(f"exercise {number}: {state}" in said for number in range(1, 11))
    assert check_outputs(executed) == []


def list_files(folder):
    return sorted(
        os.path.join(path, name)
        for path, _, names in os.walk(folder)
        for name in names
        if "__pycache__" not in path and ".ipynb_checkpoints" not in path
    )


# Runs the cells that are not slow, and exercises with wrong solutions, whose checks must fail.
RUN_CELLS = """
import json, os, sys
import matplotlib
matplotlib.use("agg")
from support import notebook
lecture, wrong = notebook.read("docs/lecture.ipynb"), json.loads(sys.argv[1])
answers, space = notebook.solutions(lecture), {"__name__": "__main__"}
stubs = {notebook.source(cell): number for number, cell in notebook.exercise_cells(lecture).items()}
os.chdir("docs")
for cell in notebook.code_cells(lecture):
    text = notebook.source(cell)
    if "slow" in cell["metadata"].get("tags", []):
        continue
    number = stubs.get(text)
    if number:
        text, attempt = answers[number], wrong.get(str(number))
        before = text if attempt is None else attempt
        exec(before, space)
        continue
    if text.startswith("with exercise(") and attempt is not None:
        try:
            exec(text, space)
        except (AssertionError, ValueError):
            print("noticed", flush=True)
        exec(answers[max(int(n) for n in answers if f"exercise({n})" in text)], space)
    try:
        exec(text, space)
    except AssertionError as error:
        print(f"FAILED: {text.splitlines()[0]}", str(error).strip().splitlines()[:4], flush=True)
        sys.exit(3)
"""


def run_cells(folder, wrong="{}"):
    """Runs the quick cells of the notebook in a folder."""
    return finish(start(folder, "-c", RUN_CELLS, wrong, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1"))


WRONG_SOLUTIONS = {
    1: """
def simulate(x_0, beta, rng):
    x, eps = x_0, rng.standard_normal(x_0.shape)  # the same noise in every step, as a slide says
    for b in beta:
        x = np.sqrt(1 - b) * x + np.sqrt(b) * eps
    return x
""",
    2: "find_last_beta = lambda T, most=0.01: 0.5",
    3: "cosine = lambda T: np.cos(np.pi / 2 * np.arange(T + 1) / T) ** 2",
    4: "combine = lambda m1, v1, m2, v2: ((v1 * m1 + v2 * m2) / (v1 + v2), v1 * v2 / (v1 + v2))",
    5: "image_from_score = lambda x_t, score, alphabar_t: x_t + (1 - alphabar_t) * score",
    6: """
def divergence_by_drawing(m1, v1, m2, v2, rng, count=1_000_000):
    x = m2 + np.sqrt(v2) * rng.standard_normal(count)
    return np.mean(np.log(normal(x, m1, v1)) - np.log(normal(x, m2, v2)))
""",
    7: """
def training_pair(x_0, t, eps, sched):
    a, b = (sched[name][t][:, None, None, None] for name in ("sqrtab", "sqrtmab"))
    return a * x_0 + b * eps, t[:, None] / ddpm.n_steps(sched), b * eps - a * x_0
""",
    8: "ddim_step = lambda x_t, eps, alphabar_t, alphabar_s: np.sqrt(alphabar_s / alphabar_t) * x_t",
    9: "guided = lambda eps_without, eps_with, g, t, first, last: eps_without + g * (eps_with - eps_without)",
    10: """
def falling(sched, times, variance, eta):
    _, posterior = samplers.step_variances(sched, times)
    return samplers.step_rows(sched, times, posterior, posterior)
""",
}


@pytest.mark.slow
def test_solutions_pass_and_wrong_solutions_fail(clone):
    process = run_cells(clone, json.dumps(WRONG_SOLUTIONS))
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("noticed") == 10
    assert all(f"exercise {number}: solved" in process.stdout for number in range(1, 11))


# Wrong functions, some of them as they stand in public notebooks: file, what is right, what is wrong.
DDPM, SAMPLERS, TARGETS, DENOISER = "ddpm.py", "diffusion/samplers.py", "diffusion/targets.py", "diffusion/denoiser.py"
POSTERIOR = "beta_t * (1 - previous) / mab_safe,"
MUTANTS = {
    "a missing root, 1 / √α": (DDPM, "1 / np.sqrt(np.where(alpha_t", "1 / (np.where(alpha_t"),
    "a missing root, √(1 - ᾱ)": (DDPM, "beta_t / np.sqrt(mab_safe)", "beta_t / mab_safe"),
    "the variance upside down": (DDPM, POSTERIOR, "beta_t * mab_safe / np.maximum(1 - previous, 1e-9),"),
    "the variance of a slide": (DDPM, POSTERIOR, "beta_t,"),
    "σ of the wrong index": (
        DDPM,
        'np.sqrt(sched["posterior_variance"]), t,',
        'np.sqrt(sched["beta_t"]), np.add(t, -1),',
    ),
    "a stride hidden by a clamp": (SAMPLERS, "times[1:]]\n    beta", "times[:-1] - 1]\n    beta"),
    "a noise that nothing makes room for": (SAMPLERS, "1 - ab_s - taken, 0)", "1 - ab_s, 0)"),
    "η not squared": (SAMPLERS, "times, eta**2 * posterior", "times, eta * posterior"),
    "other times": (SAMPLERS, "return left * T\n", "return left * (T - 1)\n"),
    "β off by one index": (DDPM, "np.linspace(beta1, beta2, T,", "np.linspace(0, beta2, T,"),
    "image and noise exchanged": (DDPM, 'sched["sqrtab"], t, x_0) * x_0', 'sched["sqrtmab"], t, x_0) * x_0'),
    "coefficients of μ exchanged": (DDPM, '"posterior_mean_coef1": coef1', '"posterior_mean_coef1": coef2'),
    "not clipped": (DDPM, "predict_x0(x_t, t, eps, sched), -1, 1)", "predict_x0(x_t, t, eps, sched), -99, 99)"),
    "a sign in L_T": (DDPM, "variance - 1 - np.log", "variance - 1 + np.log"),
    "no half in the divergence": (DDPM, "return 0.5 * (squared_distance", "return 1.0 * (squared_distance"),
    "wide bins of pixels": (DDPM, "(x + 1 / levels - mean)", "(x + 2 / levels - mean)"),
    "a sign in v": (TARGETS, "(a * x_t - b * v, b", "(a * x_t + b * v, b"),
    "a sign in u": (TARGETS, "b: eps - x_0", "b: x_0 - eps"),
    "a score without root": (DENOISER, "(t, x_t, sched)[1]\n", "(t, x_t, sched)[1] ** 2\n"),
    "guidance from the wrong end": (DENOISER, "(a + g * (b - a)", "(b + g * (b - a)"),
    "t / T one step off": (DDPM, "[:, None] / n_steps(sched)", "[:, None] / (2 + n_steps(sched))"),
    "a wide layer": ("unet.py", "up2 = UnetUpLayer(n_feat)", "up2 = UnetUpLayer(2 * n_feat)"),
    "no warm-up of EMA weights": (
        "training/train_step.py",
        "tf.minimum(most, (1 + done)",
        "tf.minimum(most, (10 + done)",
    ),
    "another mean of pixels": ("diffusion/measurement.py", "blocks, axis=(2, 4)", "blocks, axis=(2, 3)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_notebook_notices_a_wrong_function(clone, tmp_path, name):
    path, right, wrong = MUTANTS[name]
    folder = tmp_path / "mutant"
    shutil.copytree(clone, folder)
    text = (folder / path).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (folder / path).write_text(text.replace(right, wrong), encoding="utf-8")
    process = run_cells(folder)
    print(process.stdout[-500:])
    assert process.returncode == 3 and "FAILED: " in process.stdout, process.stdout + process.stderr


@pytest.mark.slow
def test_the_visible_loop_trains_as_the_script_does(tiny_networks, tmp_path, monkeypatch):
    from training import checkpoint, settings
    from training.preparation import prepare

    monkeypatch.chdir(tmp_path)
    save_tiny_images()
    words = [*TINY, "--batch-size", "16", "--n-epochs", "3"]
    train_here([*words, "--model", "script.keras"])
    trained, images, _ = prepare(settings.parse_options("", words), "loop.keras")
    space = {}
    exec(find_cell("import tensorflow as tf"), space)
    exec(find_cell("def train("), space)
    for n_epochs in 1, 3:
        space["train"](trained, images, n_epochs)
    expected = checkpoint.open_for_training("script.keras").network.get_weights()
    for one, other in zip(trained.network.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def find_cell(text):
    return next(notebook.source(cell) for cell in notebook.code_cells(LECTURE) if text in notebook.source(cell))


# A kernel as a student uses it: one line of progress, and a stop button that leaves everything usable


class Kernel:
    """A Jupyter kernel started in docs/, whose cells can be interrupted."""

    def __init__(self, folder):
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def run(self, text, stop_at=None):
        """Runs a cell, and presses the stop button once it has printed some text; what it prints, and its error."""
        asked, printed, error = self.client.execute(text), [], None
        while True:
            message = self.client.get_iopub_msg(timeout=300)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != asked:
                continue
            if kind == "stream":
                printed.append({"output_type": "stream", "name": content["name"], "text": content["text"]})
                if stop_at and stop_at in content["text"]:
                    stop_at = None
                    self.manager.interrupt_kernel()
            elif kind == "error":
                error = content["ename"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, error

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(clone):
    pytest.importorskip("ipykernel")
    pytest.importorskip("jupyter_client")
    one = Kernel(clone / "docs")
    for cell in notebook.code_cells(LECTURE)[:3]:
        assert one.run(notebook.source(cell)) == ([], None)
    yield one
    one.close()


@pytest.mark.slow
def test_sampling_in_a_kernel_shows_one_line_and_can_be_stopped(kernel):
    long = "a = rd.my_sample(n_sample=16, model='drawings', sampler='ddpm', seed=0)"
    printed, error = kernel.run(long, stop_at="t = ")
    assert error == "KeyboardInterrupt"
    started = time.monotonic()
    printed, error = kernel.run("a = rd.my_sample(model='drawings', seed=0); print(a.shape)")
    assert error is None and {piece["name"] for piece in printed} == {"stdout"}
    assert len(printed) <= 10 * (time.monotonic() - started) + 10  # ten states a second at most
    lines = "".join(notebook.merge_streams(printed)[0]["text"]).splitlines()
    assert len(lines) == 2 and lines[0].startswith("t = 0 ") and lines[1] == "(1, 32, 32, 3)"


@pytest.mark.slow
def test_training_in_a_kernel_can_be_stopped_and_goes_on(kernel):
    options = "{'preset': 'first', 'target': 'v', 'weighting': 'none', 'classes': True, 'n_epochs': 16}"
    prepare = f"path = os.path.join(tempfile.mkdtemp(), 'm.keras'); trained, images, _ = prepare({options}, path)"
    few = "images.images, images.labels = images.images[:640], images.labels[:640]"
    for text in find_cell("def train("), prepare, few:
        assert kernel.run(text)[1] is None
    printed, error = kernel.run("train(trained, images, 40)", stop_at="Epoch :0")
    assert error == "KeyboardInterrupt"
    counts = "done = trained.metadata['progress']['step'], int(trained.network.optimizer.iterations); print(*done)"
    (said,), error = kernel.run(counts)
    counted, taken = map(int, said["text"].split())
    assert error is None and taken >= 40 and taken - counted in (0, 1)  # the step that was stopped
    epoch = counted // 40
    printed, error = kernel.run(f"train(trained, images, {epoch + 1}); checkpoint.save(trained.network, path)")
    assert error is None and [piece["text"].split()[1] for piece in printed] == [f":{epoch}"]
    printed, error = kernel.run(
        "a = rd.my_sample(n_sample=2, model=path, seed=0, label='white', verbose=0); print(a.shape)"
    )
    assert error is None and printed[0]["text"] == "(2, 32, 32, 3)\n"
