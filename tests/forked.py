"""Scripts in processes forked from one that has imported TensorFlow, which saves three seconds of work in each.

Otherwise they behave like scripts started from a shell: arguments, folder, environment, output, signals and exit status
are their own. What happens before the import is tested with scripts started afresh.
"""

import multiprocessing
import os
import runpy
import sys

POSSIBLE = sys.platform.startswith("linux")  # elsewhere TensorFlow may start threads when it is imported


class Process:
    """Like `subprocess.Popen(arguments, cwd=…, env=…, stdout=PIPE, stderr=PIPE, text=True)` in what tests use of it."""

    def __init__(self, arguments, cwd, env):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tensorflow", "keras", "numpy"])
        (stdout, out), (stderr, err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(arguments, os.fspath(cwd), env, out, err))
        self._process.start()
        for written in out, err:
            written.close()
        self.args, self.pid = arguments, self._process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(read.fileno()), encoding="utf-8") for read in (stdout, stderr))
        for read in stdout, stderr:
            read.close()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self._process.kill()

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self.returncode

    @property
    def returncode(self):
        return self._process.exitcode


def _run(arguments, folder, env, out, err):
    for file, number in (out, 1), (err, 2):
        os.dup2(file.fileno(), number)
        file.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
