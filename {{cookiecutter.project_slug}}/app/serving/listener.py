"""Closes a listening socket without losing requests.

Closing resets the connections that the kernel has accepted since the last accept(), although their
clients are already connected. Under load, one in a few closes falls into these microseconds.
"""

import contextlib
import ctypes
import socket
import struct
import sys

_SO_ATTACH_FILTER = 26  # Linux: include/uapi/asm-generic/socket.h

# Instructions of a Berkeley packet filter. Linux: include/uapi/linux/bpf_common.h
_LOAD_BYTE = 0x30
_AND = 0x54
_JUMP_IF_EQUAL = 0x15
_RETURN = 0x06

# The TCP header: RFC 9293, section 3.1
_FLAGS_OFFSET = 13  # bytes
_SYN = 0x02
_ACK = 0x10

_DROP = 0
_PASS = 0xFFFFFFFF


def _instruction(code: int, operand: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    """Return one instruction: Linux's `struct sock_filter`."""
    return struct.pack("HBBI", code, skip_if_true, skip_if_false, operand)


#: Drops packets that have SYN, but not ACK, among their flags: the first of a new connection.
_DROP_SYN = (
    _instruction(_LOAD_BYTE, _FLAGS_OFFSET),
    _instruction(_AND, _SYN | _ACK),
    _instruction(_JUMP_IF_EQUAL, _SYN, skip_if_false=1),
    _instruction(_RETURN, _DROP),
    _instruction(_RETURN, _PASS),
)


def stop_accepting(listener: socket.socket) -> None:
    """Have the kernel begin no new connection here; those already begun still arrive.

    This holds for every process that shares the socket, and as long as the socket exists: only for
    sockets that this service has opened itself. A client that tries to connect repeats its
    SYN a second later, and is refused then if the socket is closed. Only Linux can do this;
    elsewhere the function does nothing.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(b"".join(_DROP_SYN))
    option = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
