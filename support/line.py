"""A line between two workers of a job: a TCP connection whose ends know each other, with signs of life.

Before anything else each end proves that it knows the job's secret, without sending it. Only then are messages read,
which are pickled Python values. They are not encrypted.
"""

import hmac
import os
import pickle
import socket
import struct
import threading
import time
from typing import Any

BEAT = 2  # seconds between signs of life
SILENCE = 30  # seconds without any, after which the other end is hung or its machine is lost
STARTING = 300  # the same while programs start, as Python may stand still while it loads large libraries
GREETING = 10  # seconds for the other end to prove that it knows the secret
PIECE = 2**20  # bytes that are sent or received at once


class Line:
    """The end of a line. One thread receives, any thread sends.

    Args:
        connection: a connected socket.
        secret: what both ends know.
        caller: whether this end has called the other one.

    Attributes:
        patience: seconds without a sign of life after which `receive` gives up.

    Raises:
        OSError: if the other end does not prove within `GREETING` seconds that it knows the secret.
    """

    def __init__(self, connection: socket.socket, secret: str, caller: bool):
        self._connection, self._sending, self.patience = connection, threading.Lock(), STARTING
        self._prove(secret.encode(), *(b"caller", b"called")[:: 1 if caller else -1])
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._beat, daemon=True).start()

    def _prove(self, secret, own_role, other_role):
        """Each end signs both ends' random numbers and its role, so that no proof can be used again or sent back."""
        self._connection.settimeout(GREETING)
        until, mine = time.monotonic() + GREETING, os.urandom(32)

        def proof(role, first, second):
            return hmac.digest(secret, role + first + second, "sha256")

        self._connection.sendall(mine)
        theirs = self._read(32, until)
        self._connection.sendall(proof(own_role, mine, theirs))
        if not hmac.compare_digest(self._read(32, until), proof(other_role, theirs, mine)):
            raise PermissionError("the other end does not know the secret of this job")

    def send(self, message: Any) -> None:
        """Sends a value. That the other end is gone is noticed by `receive`."""
        content = pickle.dumps(message)
        self._write(struct.pack("!Q", len(content)) + content)

    def receive(self) -> Any:
        """Waits for the next value.

        Raises:
            TimeoutError: if there is no sign of life.
            OSError, EOFError: if the line is closed.
        """
        while True:
            self._connection.settimeout(self.patience)
            (size,) = struct.unpack("!Q", self._read(8))
            if size:
                return pickle.loads(self._read(size))

    def addresses(self) -> tuple[str, str]:
        """The hosts of this end and of the other one."""
        return self._connection.getsockname()[0], self._connection.getpeername()[0]

    def close(self) -> None:
        self._connection.close()

    def _beat(self):
        while self._write(bytes(8)):  # an empty message
            time.sleep(BEAT)

    def _write(self, content):
        """Whether bytes could be sent."""
        rest = memoryview(content)
        with self._sending:
            try:
                while rest:
                    rest = rest[self._connection.send(rest[:PIECE]) :]
            except OSError:
                return False
        return True

    def _read(self, size, until=float("inf")):
        content = bytearray()
        while len(content) < size:
            if time.monotonic() > until:
                raise TimeoutError("no proof in time")
            piece = self._connection.recv(min(PIECE, size - len(content)))
            if not piece:
                raise EOFError("the line is closed")
            content += piece
        return content
