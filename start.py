"""One command on a fresh machine: sets up, then trains and shows pictures, or runs the tests.

    python3 start.py            trains on cartoon cats (or as the options of diffusion_model.py say)
    python3 start.py test       runs the tests
    python3 start.py setup      only sets up

Packages go into the folder .venv beside this file. Needs nothing but Python; this file is written
so that older versions, too, can read it and say what is missing.
"""

import hashlib
import os
import subprocess
import sys
import webbrowser

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".venv")
PYTHON = os.path.join(VENV, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def set_up():
    """Makes .venv and installs the requirements, unless that has been done."""
    with open(os.path.join(HERE, "requirements.txt"), "rb") as requirements:
        wanted = hashlib.sha256(requirements.read()).hexdigest()
    stamp = os.path.join(VENV, "installed")
    if os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == wanted:
                return
    print("setting up .venv: some minutes, once")
    sys.stdout.flush()
    subprocess.check_call([sys.executable, "-m", "venv", VENV])
    subprocess.check_call(
        [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        + ["-r", os.path.join(HERE, "requirements.txt")]
    )
    with open(stamp, "w") as file:
        file.write(wanted)


def main():
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit("start.py: needs Python 3.11, 3.12 or 3.13, and this is %d.%d" % sys.version_info[:2])
    try:
        set_up()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit("start.py: setting up .venv failed, see above; delete .venv and try again (%s)" % error)
    if sys.argv[1:2] == ["setup"]:
        return
    if sys.argv[1:2] == ["test"]:
        command = ["-m", "pytest", HERE] + sys.argv[2:]
    else:
        command = [os.path.join(HERE, "diffusion_model.py")] + sys.argv[1:]
    try:
        status = subprocess.call([PYTHON] + command)
    except KeyboardInterrupt:  # the program has had it too, and has said what there is to say
        status = 130
    if status == 0 and not sys.argv[1:] and sys.stdout.isatty() and has_screen():
        webbrowser.open("file://" + os.path.abspath("samples.png"))
    sys.exit(status)


def has_screen():
    """Whether there is a screen to show a picture on."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    main()
