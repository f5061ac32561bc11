"""A name server, and a file system in which processes ask only this one."""

import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

#: resolv.conf(5) has no port.
PORT = 53
TYPE_A = 1
#: Runs its arguments, with the files of a directory in place of those of /etc.
IN_NAMESPACE = """
    mount --bind "$FILES/resolv.conf" /etc/resolv.conf
    mount --bind "$FILES/nsswitch.conf" /etc/nsswitch.conf
    exec "$@"
"""


class NameServer:
    """Knows the IPv4 addresses of some names (RFC 1035, section 4)."""

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        self.names = names
        #: Whether it drops every question.
        self.is_dead = False
        self.questions = 0
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.address = self._bind()

    def _bind(self) -> str:
        """Bind to an address that no other test uses."""
        while True:
            address = f"127.{random.randrange(1, 255)}.{random.randrange(255)}.53"
            with contextlib.suppress(OSError):
                self.socket.bind((address, PORT))
                return address

    def serve(self) -> None:
        """Respond until the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                question, client = self.socket.recvfrom(512)
                if not question:
                    return
                self.questions += 1
                if not self.is_dead:
                    self.socket.sendto(self.respond(question), client)

    def respond(self, question: bytes) -> bytes:
        labels = []
        position = 12
        while length := question[position]:
            labels.append(question[position + 1 : position + 1 + length].decode())
            position += 1 + length
        end = position + 5
        (kind,) = struct.unpack_from(">H", question, position + 1)
        known = self.names.get(".".join(labels))
        addresses = known if known and kind == TYPE_A else []
        # A response from a recursive server; NXDOMAIN for other names
        flags = 0x8180 | (0 if known else 3)
        header = question[:2] + struct.pack(">5H", flags, 1, len(addresses), 0, 0)
        # The name of the question, class IN, no time to live, four bytes
        record = struct.pack(">HHHIH", 0xC00C, TYPE_A, 1, 0, 4)
        return header + question[12:end] + b"".join(record + socket.inet_aton(a) for a in addresses)


@contextlib.contextmanager
def serving_names(names: Mapping[str, Sequence[str]]) -> Iterator[NameServer]:
    """Run a name server for the duration of the block. Skips the test unless root runs it."""
    if os.geteuid() != 0:
        pytest.skip("only root can listen on port 53, and mount files over those of /etc")
    server = NameServer(names)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", (server.address, PORT))
        thread.join()
        server.socket.close()


def asking(server: NameServer, directory: Path, commands: str = "") -> list[str]:
    """Return a command that runs its arguments in a mount namespace that asks this server.

    The shell runs `commands` before it. The process keeps its pid.
    """
    (directory / "resolv.conf").write_text(f"nameserver {server.address}\n")
    (directory / "nsswitch.conf").write_text("hosts: dns\n")
    script = f"set -e; FILES='{directory}'\n{commands}\n{IN_NAMESPACE}"
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
