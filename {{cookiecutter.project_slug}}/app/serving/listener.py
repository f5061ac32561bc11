"""A listening socket that is about to close.

Closing resets what the kernel has accepted since the last accept(), and so loses requests of clients who were told that
they are connected: under load one in a few closes meets somebody in these microseconds.
"""

import contextlib
import ctypes
import socket
import struct
import sys

_SO_ATTACH_FILTER = 26  # Linux: include/uapi/asm-generic/socket.h
#: Berkeley packet filter on the TCP header: what has SYN, and not ACK, among the flags in byte 13 is dropped.
_DROP_SYN = (
    *(
        struct.pack("HBBI", 0x30, 0, 0, 13),
        struct.pack("HBBI", 0x54, 0, 0, 0x12),
    ),  # load the flags; mask SYN and ACK
    *(
        struct.pack("HBBI", 0x15, 0, 1, 0x02),
        struct.pack("HBBI", 0x06, 0, 0, 0),
    ),  # if SYN alone: drop
    struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF),  # pass
)


def stop_accepting(listener: socket.socket) -> None:
    """Have the kernel begin no new connection here, in no process that shares the socket; those begun still arrive.

    Who tries asks again a second later, and is refused then, if it is closed. Elsewhere than on Linux it does nothing.
    """
    program = ctypes.create_string_buffer(b"".join(_DROP_SYN))
    option = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
