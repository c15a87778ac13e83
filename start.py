"""Installs what is needed, then trains a first model and shows its images, or runs the tests.

    python3 start.py               trains on cartoon cats, 2 to 7 minutes on 2 CPU cores
    python3 start.py OPTIONS       trains with options of diffusion_model.py, such as --data FOLDER
    python3 start.py test          runs the tests; further arguments go to pytest
    python3 start.py setup         only installs
    python3 start.py notebook      opens the lecture, docs/lecture.ipynb, in JupyterLab

The first call installs TensorFlow and other packages into the folder .venv beside this file, which takes
some minutes. It needs Python 3.11, 3.12 or 3.13 and an internet connection. Training writes
model.keras and samples.png here; Ctrl-C saves and stops, and the same command resumes.
All options are in docs/options.md. The notebook also needs JupyterLab, which is installed when it
is first asked for; Ctrl-C ends it, and further arguments go to it.
"""

# Older versions of Python must be able to read this file, so that they can say what is missing.

import hashlib
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import time
import webbrowser

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
VERSIONS = (3, 11), (3, 13)  # the first and the last that all packages exist for
PROCESSORS = {
    "linux": ("x86_64", "aarch64"),
    "darwin": ("arm64",),
    "win32": ("amd64", "x86_64"),
}  # that TensorFlow has wheels for


def set_up():
    """Makes .venv and installs the requirements, unless that has been done already."""
    with open(os.path.join(HERE, "requirements.txt"), "rb") as requirements:
        wanted = requirements.read()
    works = venv_works()
    if works and is_stamped("installed", wanted):
        return
    problem = check_platform()
    if problem:
        sys.exit("start.py: " + problem)
    say("setting up .venv: some minutes, once")
    install([sys.executable, "-m", "venv", VENV] + ([] if works else ["--clear"]), "making .venv")
    pip_install(["-r", os.path.join(HERE, "requirements.txt")], "installing TensorFlow and other packages")
    write_stamp("installed", wanted)


def set_up_notebook():
    """Installs what the notebook needs besides, unless that has been done already."""
    with open(os.path.join(HERE, "requirements-optional.txt")) as requirements:
        wanted = [line.split("#")[0].strip() for line in requirements if "docs/lecture.ipynb" in line]
    stamp = " ".join(wanted).encode()
    if not is_stamped("installed-notebook", stamp):
        pip_install(wanted, "installing JupyterLab")
        write_stamp("installed-notebook", stamp)


def pip_install(arguments, what):
    """Installs packages into .venv."""
    install([PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"] + arguments, what)


def is_stamped(name, wanted):
    """Whether these requirements have been installed, as a file in .venv says."""
    stamp = os.path.join(VENV, name)
    if not os.path.exists(stamp):
        return False
    with open(stamp, "rb") as file:
        return file.read() == hashlib.sha256(wanted).hexdigest().encode()


def write_stamp(name, wanted):
    """Notes that these requirements have been installed."""
    with open(os.path.join(VENV, name), "wb") as file:
        file.write(hashlib.sha256(wanted).hexdigest().encode())


def venv_works():
    """Whether .venv has a Python of a supported version that runs and finds the packages of .venv.

    It stops working when the Python that it was made with is removed or replaced by another version.
    """
    check = (
        "import os, site, sys; found = any(map(os.path.isdir, site.getsitepackages())); "
        "sys.exit(not (found and %r <= sys.version_info[:2] <= %r))" % VERSIONS
    )
    try:
        with open(os.devnull, "w") as nowhere:
            return subprocess.call([PYTHON, "-c", check], stdout=nowhere, stderr=nowhere) == 0
    except OSError:
        return False


def check_platform():
    """Returns why TensorFlow cannot be installed for this Python, and what to do, in a sentence; None if it can."""
    system, processor = sys.platform, platform.machine().lower()
    colab = "or a free cloud notebook such as https://colab.research.google.com"
    python = "install the usual 64-bit Python from https://www.python.org"
    if sys.maxsize < 2**32:
        return "there is no TensorFlow for a 32-bit Python; %s, %s" % (python, colab)
    if platform.python_implementation() != "CPython" or "free-threading" in sys.version:
        return "there is no TensorFlow for this kind of Python; " + python
    if system == "darwin" and processor == "x86_64":
        return (
            "TensorFlow no longer supports Macs with Intel processors, nor Pythons made for them; "
            "use a Mac with Apple silicon and a Python for it, a Linux computer, " + colab
        )
    if processor not in PROCESSORS.get(system, ()) and sysconfig.get_platform() != "win-amd64":
        return "there is no TensorFlow for %s on %s; use Linux on x86_64, %s" % (system, processor, colab)
    if system == "linux" and "musl" in (sysconfig.get_config_var("SOABI") or ""):
        return "there is no TensorFlow for Linux with musl, as Alpine is; use one with glibc, as Debian is, " + colab
    return None


def install(command, what):
    """Runs a step of the set-up and shows how long it takes; ends it if this program is asked to stop.

    Ctrl-C in the terminal does not reach the step, which would answer with a traceback.
    """
    terminal, start = sys.stdout and sys.stdout.isatty(), time.time()
    say(what + " ...", end="" if terminal else "\n")
    process = subprocess.Popen(
        command, start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    )
    try:
        status = None
        while status is None:
            time.sleep(0.1)
            status = process.poll()
            if terminal:
                say("\r%s ... %d s" % (what, time.time() - start), end="" if status is None else "\n")
    except BaseException:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        process.wait()
        raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def handle(names, handler):
    """Sets the handler of signals, unless they are ignored (as SIGHUP is under nohup) or unknown to this system."""
    for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def run(command):
    """Runs a program and waits for its end, also while it saves after a signal. Returns its exit status.

    Ctrl-C in a terminal reaches the program as well as this one; what `kill` sends to this one is passed on.
    """
    processes, early = [], []

    def pass_on(number, frame):
        if processes:
            processes[0].send_signal(number)
        else:
            early.append(number)

    handle(["SIGINT"], lambda number, frame: None)  # a handler is not inherited; SIG_IGN would be
    handle(["SIGTERM", "SIGHUP", "SIGUSR1"], pass_on)
    processes.append(subprocess.Popen(command))
    for number in early:
        processes[0].send_signal(number)
    status = processes[0].wait()
    return status if status >= 0 else 128 - status


def say(line, stream=sys.stdout, end="\n"):
    """Prints a line; a closed terminal or pipe is no error."""
    try:
        stream.write(line + end)
        stream.flush()
    except Exception:
        pass


def leave(number, frame):
    sys.exit(128 + number)


def main():
    if not VERSIONS[0] <= sys.version_info[:2] <= VERSIONS[1]:
        sys.exit("start.py: needs Python 3.11, 3.12 or 3.13, but this is %d.%d" % sys.version_info[:2])
    word = (sys.argv[1:] or [""])[0]
    if word in ("-h", "--help"):
        say(
            (__doc__ or "usage: python3 start.py [setup | test | notebook | options of diffusion_model.py]").strip()
        )  # without under -OO
        return
    if word and word not in ("setup", "test", "notebook") and not word.startswith("-"):
        say(
            "start.py: unknown command %s; use setup, test, notebook or options of diffusion_model.py" % word,
            sys.stderr,
        )
        sys.exit(2)
    handle(["SIGTERM", "SIGHUP"], leave)
    try:
        set_up()
        if word == "notebook":
            set_up_notebook()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit("start.py: setting up .venv failed, see above; fix the cause and start it again (%s)" % error)
    except KeyboardInterrupt:
        say("start.py: interrupted; start it again to finish setting up", sys.stderr)
        sys.exit(130)
    if word == "setup":
        say("ready. Next: python3 start.py trains and shows images, python3 start.py test runs the tests")
        return
    if word == "test":
        command = ["-m", "pytest", HERE] + sys.argv[2:]
    elif word == "notebook":
        # With the folder of the project as its root, so that other pages can be opened beside the notebook.
        command = [
            "-m",
            "jupyterlab",
            os.path.join(HERE, "docs", "lecture.ipynb"),
            "--ServerApp.root_dir=" + HERE,
        ] + sys.argv[2:]
    else:
        command = [os.path.join(HERE, "diffusion_model.py")] + sys.argv[1:]
    status = run([PYTHON] + command)
    if status == 0 and not sys.argv[1:]:
        script = os.path.join(os.path.relpath(HERE), "reverse_diffusion.py")
        script = os.path.normpath(script)  # of the current folder without ./
        say("look at samples.png. Next: %s && python %s --n-sample 64 --out more.png" % (activation(), script))
        if sys.stdout and sys.stdout.isatty() and has_screen():
            webbrowser.open("file://" + os.path.abspath("samples.png"))
    sys.exit(status)


def activation():
    """The command that activates .venv in a shell."""
    folder = os.path.relpath(os.path.dirname(PYTHON))
    return os.path.join(folder, "activate") if os.name == "nt" else "source " + os.path.join(folder, "activate")


def has_screen():
    """Whether there is a screen to show an image on."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    main()
