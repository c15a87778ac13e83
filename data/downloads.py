"""Downloads by Keras: a progress bar on a terminal, and failures in one sentence."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence

from support import console, device
from support.lock import taking_turns

TIMEOUT = 60  # seconds; a compute node without internet would wait for minutes


@contextlib.contextmanager
def downloading(what: str, paths: Sequence[str], way_out: str) -> Iterator[None]:
    """Around a download by Keras: its bar, which would fill log files, is shown where a line can be written over.

    Args:
        what: is downloaded, such as a URL.
        paths: of the files; Keras downloads those that are missing, whose folders are made here.
        way_out: what to do if that fails.

    Raises:
        OSError: if anything inside fails.
    """
    device.start_tensorflow()
    import keras

    talkative = keras.config.is_interactive_logging_enabled()
    missing = not all(map(os.path.exists, paths))
    if not console.can_redraw():
        if missing:
            console.say(f"downloading {what}")
        keras.config.disable_interactive_logging()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        for path in paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # else Keras downloads to elsewhere
        with taking_turns(paths[0]):  # the next process finds it there
            yield
    except Exception as error:  # `get_file` raises plain Exceptions, whose text names the URL
        text = " ".join(str(error).split()).removeprefix("URL fetch failure on ").removeprefix(f"{what}: ")
        text = text.replace("None -- ", "") or type(error).__name__
        raise OSError(f"{what} could not be {'downloaded' if missing else 'read'} ({text}); {way_out}") from error
    finally:
        if talkative:
            keras.config.enable_interactive_logging()
