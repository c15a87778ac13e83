"""Is a model file always complete? Kills training with SIGKILL at random moments, and checks the file each time.

    python benchmarks/fault_run.py --kills 50

After each kill the model file must load, its step must not be lower than before, and no more training may be lost than
between two saves. Every second run saves after every step, so that many kills interrupt a save. Prints a line for each
kill and a summary; exit status 1 if more was lost. About 15 s a kill on 2 cores.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SAVE_EVERY = 1.0  # seconds, in the runs that do not save after every step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times of the kills (0)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [kill_once(folder, number, chance) for number in range(options.kills)]
        resumed = subprocess.Popen(training(0.5), cwd=folder, stdout=subprocess.PIPE, text=True)
        alive = any("ms a step" in line for line in resumed.stdout)
        resumed.send_signal(signal.SIGTERM)
        resumed.communicate()
    in_save = sum(outcome["in_save"] for outcome in outcomes)
    lost = max(outcome["seconds_lost"] for outcome in outcomes)
    bad = [outcome for outcome in outcomes if outcome["bad"]]
    print(
        f"{len(outcomes)} kills, {in_save} of them during a save; at most {lost:.2f} s of training lost; {len(bad)} bad"
    )
    print("and training resumes" if alive and resumed.returncode == 143 else "but training does not resume")
    sys.exit(bool(bad) or not alive)


def training(save_every):
    script = os.path.join(ROOT, "diffusion_model.py")
    options = ["--n-feat", "8", "--n-epochs", "100000", "--sample-every", "0"]
    schedule = ["--T", "20", "--beta2", "0.5"]
    return [sys.executable, script, *options, *schedule, "--save-every", str(save_every / 60)]


def kill_once(folder, number, chance):
    """Resumes the training in `folder` for a moment, kills it, and checks its model file."""
    before = step_in(folder)
    save_every = 0 if number % 2 else SAVE_EVERY
    process = subprocess.Popen(training(save_every), cwd=folder, stdout=subprocess.PIPE, text=True)
    any("ms a step" in line for line in process.stdout)  # reads up to that line
    time.sleep(chance.uniform(0, 3))
    process.kill()
    killed = time.time()
    process.communicate()
    path = os.path.join(folder, "model.keras")
    in_save = any(name.startswith(".model.keras.saving") for name in os.listdir(folder))
    seconds_lost = killed - os.stat(path).st_mtime if os.path.exists(path) else 0.0
    after = step_in(folder)
    # A save that was under way is lost with the time it took, and so are the steps before it was due.
    bad = after is None or (before or 0) > after or seconds_lost > save_every + 2
    print(
        f"kill {number + 1:3}: step {before} -> {after}, {seconds_lost:5.2f} s lost"
        f"{', during a save' if in_save else ''}{', BAD' if bad else ''}",
        flush=True,
    )
    return {"in_save": in_save, "seconds_lost": seconds_lost, "bad": bad}


CHECK = """
import warnings
warnings.simplefilter("error")
from training import checkpoint
print("step", checkpoint.open_for_training("model.keras").metadata["progress"]["step"])
"""


def step_in(folder):
    """The step that the model file in `folder` has reached, 0 if there is none, None if it does not load."""
    if not os.path.exists(os.path.join(folder, "model.keras")):
        return 0
    env = {**os.environ, "PYTHONPATH": ROOT}
    check = subprocess.run([sys.executable, "-c", CHECK], cwd=folder, env=env, capture_output=True, text=True)
    found = re.search(r"^step (\d+)$", check.stdout, re.MULTILINE)
    return int(found[1]) if found else None


if __name__ == "__main__":
    main()
