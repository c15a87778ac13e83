"""`start.py`: signals, the environment that it makes, and computers that TensorFlow does not support.

In place of diffusion_model.py and of pip there are small stand-ins, so that nothing is downloaded.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import venv

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and shell scripts")

SAVES_SLOWLY = """
import signal, sys, time
heard = []
def stop(number, frame):
    heard.append(number)
for name in "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1":
    signal.signal(getattr(signal, name), stop)
print("ready", flush=True)
while not heard or heard[-1] == signal.SIGUSR1:
    time.sleep(0.01)
first = heard[-1]
end = time.monotonic() + 0.6
while time.monotonic() < end:
    time.sleep(0.01)
open("saved", "w").write(" ".join(str(int(number)) for number in heard))
sys.exit(128 + first)
"""
# Instead of the Python that `-m venv` and `-m pip` are run with: makes a link to itself, or waits.
INSTALLER = """#!/bin/sh
case "$2" in
venv) mkdir -p {folder}/.venv/bin; ln -sf "$0" {folder}/.venv/bin/python; echo "$@" >> {folder}/log;;
pip) echo pip >> {folder}/log; echo downloading; {pip};;
*) exec {python} "$@";;
esac
"""


@pytest.fixture
def folder(tmp_path):
    """A copy of start.py with a stand-in for the training script, and with nothing set up."""
    for name in "start.py", "requirements.txt", "requirements-optional.txt":
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    (tmp_path / "diffusion_model.py").write_text(SAVES_SLOWLY)
    return tmp_path


@pytest.fixture
def ready(folder):
    """The same, set up."""
    venv.create(folder / ".venv", with_pip=False, symlinks=True)
    stamp(folder)
    return folder


def stamp(folder):
    digest = hashlib.sha256((folder / "requirements.txt").read_bytes()).hexdigest()
    (folder / ".venv" / "installed").write_text(digest)


def installer(folder, pip="true"):
    script = folder / "installer"
    script.write_text(INSTALLER.format(folder=folder, pip=pip, python=sys.executable))
    script.chmod(0o755)
    return script


class Terminal:
    """start.py in a pseudo-terminal of its own."""

    def __init__(self, folder, executable=None, ignored=(), words=("--x",)):
        import fcntl
        import pty
        import termios

        def before():
            os.setsid()
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        code = (
            f"import runpy, sys; sys.argv = ['start.py', *{words!r}]"
            f"; sys.executable = {str(executable or sys.executable)!r}"
        )
        code += f"; runpy.run_path({str(folder / 'start.py')!r}, run_name='__main__')"
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, stdin=slave, stdout=slave, stderr=slave, preexec_fn=before
        )
        os.close(slave)
        self.text = ""

    def read_until(self, word):
        while word not in self.text:
            self.text += os.read(self.master, 1000).decode()

    def press_ctrl_c(self):
        os.write(self.master, b"\x03")

    def finish(self):
        status = self.process.wait(timeout=20)
        try:
            while more := os.read(self.master, 1000):
                self.text += more.decode()
        except OSError:  # nobody has it open any more
            pass
        return status


def test_ctrl_c_leaves_the_program_time_to_save(ready):
    terminal = Terminal(ready)
    terminal.read_until("ready\r\n")
    terminal.press_ctrl_c()
    time.sleep(0.3)
    terminal.press_ctrl_c()  # a second one reaches the program too
    assert terminal.finish() == 130
    assert (ready / "saved").read_text() == "2 2"
    assert "Traceback" not in terminal.text and "start.py" not in terminal.text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_to_start_py_alone_are_passed_on(ready, name):
    number = getattr(signal, name)
    terminal = Terminal(ready)
    terminal.read_until("ready\r\n")
    terminal.process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    assert terminal.process.poll() is None
    terminal.process.send_signal(number)
    assert terminal.finish() == 128 + number
    assert (ready / "saved").read_text() == f"{int(signal.SIGUSR1)} {int(number)}"


def test_a_closed_terminal_leaves_the_program_time_to_save(ready):
    terminal = Terminal(ready)
    terminal.read_until("ready\r\n")
    os.close(terminal.master)
    assert terminal.process.wait(timeout=20) == 128 + signal.SIGHUP
    assert (ready / "saved").exists()


def test_a_hang_up_is_not_passed_on_under_nohup(ready):
    (ready / "diffusion_model.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(0.5)\nexit(3)")
    terminal = Terminal(ready, ignored=[signal.SIGHUP])
    terminal.read_until("ready\r\n")
    terminal.process.send_signal(signal.SIGHUP)
    assert terminal.finish() == 3


def test_the_status_of_a_killed_program_is_that_of_a_shell(ready):
    (ready / "diffusion_model.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert Terminal(ready).finish() == 128 + signal.SIGKILL


@pytest.mark.parametrize("how, status", [("ctrl-c", 130), (signal.SIGTERM, 143)])
def test_an_interrupted_set_up_is_finished_by_the_next_run(folder, how, status):
    (folder / "diffusion_model.py").write_text("print('trained')")
    terminal = Terminal(folder, installer(folder, pip="sleep 20; echo too late"))
    terminal.read_until("downloading")
    time.sleep(0.3)  # until it sleeps
    if how == "ctrl-c":
        terminal.press_ctrl_c()
    else:
        terminal.process.send_signal(how)
    assert terminal.finish() == status
    assert "installing TensorFlow" in terminal.text and "too late" not in terminal.text
    assert "Traceback" not in terminal.text
    if how == "ctrl-c":
        last = terminal.text.splitlines()[-1]
        assert last.endswith("start.py: interrupted; start it again to finish setting up")

    terminal = Terminal(folder, installer(folder))
    assert terminal.finish() == 0 and terminal.text.splitlines()[-1] == "trained"
    digest = hashlib.sha256((folder / "requirements.txt").read_bytes()).hexdigest()
    assert (folder / ".venv" / "installed").read_text() == digest


def test_a_failed_set_up_is_one_sentence(folder):
    terminal = Terminal(folder, installer(folder, pip="echo no network; exit 1"))
    assert terminal.finish() == 1
    *_, last = terminal.text.splitlines()
    assert "no network" in terminal.text and last.startswith("start.py: setting up .venv failed, see above")


def dangling(python):
    python.unlink()
    python.symlink_to("/nowhere/python3")


def broken(python):
    python.unlink()
    python.write_text("#!/bin/sh\nexit 127\n")
    python.chmod(0o755)


def not_executable(python):
    python.unlink()
    python.write_text("")


def another_version(python):
    """As when /usr/bin/python3 has become another one: it runs, but looks for packages in another folder."""
    lib = python.parent.parent / "lib"
    (lib / f"python{sys.version_info[0]}.{sys.version_info[1]}").rename(lib / "python3.5")


@pytest.mark.parametrize("spoil", [dangling, broken, not_executable, another_version])
def test_a_venv_whose_python_is_gone_is_made_anew(ready, spoil):
    (ready / "diffusion_model.py").write_text("print('trained')")
    spoil(ready / ".venv" / "bin" / "python")
    terminal = Terminal(ready, installer(ready))
    assert terminal.finish() == 0 and terminal.text.splitlines()[-1] == "trained"
    assert (ready / "log").read_text().splitlines() == [f"-m venv {ready}/.venv --clear", "pip"]


def test_a_venv_that_works_is_never_cleared(ready):
    """It may be the user's own, with more in it."""
    (ready / "diffusion_model.py").write_text("print('trained')")
    (ready / ".venv" / "installed").write_bytes(b"\xff other requirements")
    terminal = Terminal(ready, installer(ready))
    assert terminal.finish() == 0
    assert (ready / "log").read_text().splitlines() == [f"-m venv {ready}/.venv", "pip"]


# Instead of JupyterLab: says with what it was started, and waits for Ctrl-C.
JUPYTERLAB = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))
print("jupyterlab", *sys.argv[1:], flush=True)
print("waiting", flush=True)
time.sleep(20)
"""


@pytest.fixture
def with_jupyterlab(ready, monkeypatch):
    """The same, with a stand-in for JupyterLab; `installer` takes the place of the Python of .venv."""
    (ready / "jupyterlab.py").write_text(JUPYTERLAB)
    python = ready / ".venv" / "bin" / "python"
    script = installer(ready, pip=f'shift 2; echo "$@" > {ready}/installed')
    python.unlink()
    python.symlink_to(script)
    return ready


def open_notebook(folder):
    terminal = Terminal(folder, folder / "installer", words=("notebook", "--no-browser"))
    terminal.read_until("waiting")  # a terminal may hand over a line in two pieces, with ^C between them
    terminal.press_ctrl_c()
    assert terminal.finish() == 0
    return terminal.text


def test_the_notebook_installs_jupyterlab_once_and_opens_it(with_jupyterlab):
    text = open_notebook(with_jupyterlab)
    assert "installing JupyterLab" in text and "installing TensorFlow" not in text and "Traceback" not in text
    words = next(line for line in text.splitlines() if line.startswith("jupyterlab ")).split()
    lecture = str(with_jupyterlab / "docs" / "lecture.ipynb")
    assert words[1:] == [lecture, f"--ServerApp.root_dir={with_jupyterlab}", "--no-browser"]
    installed = (with_jupyterlab / "installed").read_text().split()
    assert any(word.startswith("jupyterlab>=") for word in installed)
    assert any(word.startswith("ipywidgets>=") for word in installed) and not any("torch" in word for word in installed)

    assert "installing" not in open_notebook(with_jupyterlab)
    optional = with_jupyterlab / "requirements-optional.txt"
    optional.write_text(optional.read_text().replace("jupyterlab>=4", "jupyterlab>=5"))
    assert "installing JupyterLab" in open_notebook(with_jupyterlab)


def test_a_failed_set_up_of_the_notebook_is_one_sentence(with_jupyterlab):
    installer(with_jupyterlab, pip="echo no network; exit 1")
    terminal = Terminal(with_jupyterlab, with_jupyterlab / "installer", words=("notebook",))
    assert terminal.finish() == 1
    *_, last = terminal.text.splitlines()
    assert "no network" in terminal.text and last.startswith("start.py: setting up .venv failed, see above")
    assert "Traceback" not in terminal.text


@pytest.mark.parametrize(
    "patches, words",
    [
        ("sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'", ("Intel", "Linux", "colab")),
        ("sys.platform = 'win32'; platform.machine = lambda: 'ARM64'", ("arm64", "colab")),
        ("platform.machine = lambda: 'riscv64'", ("riscv64", "colab")),
        ("sys.maxsize = 2**31 - 1", ("32-bit", "64-bit Python")),
        ("platform.python_implementation = lambda: 'PyPy'", ("python.org",)),
        ("sysconfig.get_config_var = {'SOABI': 'cpython-312-x86_64-linux-musl'}.get", ("musl", "glibc", "colab")),
    ],
)
def test_a_computer_that_tensorflow_does_not_support_is_told_so(folder, patches, words):
    imports = "platform, runpy, shutil, subprocess, sys, sysconfig, webbrowser"  # which look at the platform too
    code = f"import {imports}; {patches}; runpy.run_path('start.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == "" and not (folder / ".venv").exists()
    assert done.stderr.startswith("start.py: ") and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize(
    "platform, machine", [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]
)
def test_computers_that_tensorflow_supports_are_accepted(monkeypatch, platform, machine):
    import start

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert start.check_platform() is None


@pytest.mark.parametrize(
    "words, status, said",
    [(["--help"], 0, "start.py setup         only installs"), (["tset"], 2, "unknown command tset")],
)
def test_help_and_slips_of_typing_install_nothing(folder, words, status, said):
    process = subprocess.run(
        [sys.executable, "start.py", *words], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == status and said in process.stdout + process.stderr
    assert not (folder / ".venv").exists()
