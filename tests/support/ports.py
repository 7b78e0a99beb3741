"""Ports of 127.0.0.1 for servers that have to be told theirs."""

import contextlib
import socket


def free_ports(count: int) -> list[int]:
    """Of the kernel's choice, which nobody listens on; above those Ray gives its workers."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
