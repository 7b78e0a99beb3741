"""The cluster's name server: answers A queries from a JSON file, over UDP on port 53.

Run as a script, by path: imports nothing but the standard library. Knows nothing of services.
"""

import json
import socket
import struct
import sys
from pathlib import Path

_A, _NO_SUCH_NAME = 1, 3


def answer(query: bytes, names: dict[str, str]) -> bytes:
    """The response to a query of one question (RFC 1035, section 4)."""
    words, at = [], 12
    while length := query[at]:
        words.append(query[at + 1 : at + 1 + length].decode().lower())
        at += 1 + length
    end = at + 5  # the name's last, empty label; type and class
    kind = struct.unpack(">H", query[at + 1 : at + 3])[0]
    address = names.get(".".join(words))
    record = b""
    if address is not None and kind == _A:
        record = struct.pack(">HHHIH", 0xC00C, _A, 1, 0, 4) + socket.inet_aton(address)
    flags = 0x8580 | (_NO_SUCH_NAME if address is None else 0)
    header = query[:2] + struct.pack(">HHHHH", flags, 1, bool(record), 0, 0)
    return header + query[12:end] + record


def main(file: str) -> None:
    """Serve for ever; the file is read anew for each query."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 53))
        while True:
            query, client = server.recvfrom(4096)
            server.sendto(answer(query, json.loads(Path(file).read_text())), client)


if __name__ == "__main__":
    main(sys.argv[1])
