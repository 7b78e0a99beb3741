"""The cluster's API server, as far as Ray's autoscaler asks it: one RayCluster and its pods.

Run as a script, by path: imports nothing but the standard library. Both lie as JSON in a folder:
`raycluster.json`, which a PATCH changes, and `pods.json`, which whoever plays the operator writes.
"""

import copy
import json
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PORT = 6443


def patched(document: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """After a JSON patch (RFC 6902) of `replace`. Raises: KeyError for what is not there."""
    changed = copy.deepcopy(document)
    for operation in operations:
        *parents, last = operation["path"].strip("/").split("/")
        place: Any = changed
        for word in parents:
            place = place[int(word) if isinstance(place, list) else word]
        if operation["op"] != "replace" or last not in place:
            raise KeyError(f"{operation['op']} {operation['path']}")
        place[last] = operation["value"]
    return changed


class Api(BaseHTTPRequestHandler):
    """GET and PATCH of the RayCluster, GET of its pods, one or all; for who has the token."""

    folder: Path
    token: str

    def do_GET(self) -> None:
        """See BaseHTTPRequestHandler."""
        *_, kind, name = ["", *urlsplit(self.path).path.split("/")]
        if not self._may_enter():
            return
        if kind == "rayclusters":
            self._answer(200, self._read("raycluster.json"))
            return
        pods = self._read("pods.json")
        if kind == "pods":
            pods = {"items": [p for p in pods["items"] if p["metadata"]["name"] == name]}
            self._answer(*((200, pods["items"][0]) if pods["items"] else (404, {})))
        elif name == "pods":
            self._answer(200, pods | {"metadata": {"resourceVersion": "1"}})
        else:
            self._answer(404, {})

    def do_PATCH(self) -> None:
        """See BaseHTTPRequestHandler."""
        if not self._may_enter():
            return
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            document = patched(self._read("raycluster.json"), wanted)
        except KeyError as error:
            self._answer(422, {"message": str(error)})
            return
        scratch = self.folder / "raycluster.tmp"
        scratch.write_text(json.dumps(document))
        scratch.replace(self.folder / "raycluster.json")
        self._answer(200, document)

    def _may_enter(self) -> bool:
        is_known = self.headers.get("Authorization") == f"Bearer {self.token}"
        if not is_known:
            self._answer(401, {})
        return is_known

    def _read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name).read_text())
        return found

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Questions every five seconds are no news."""


def main(folder: str) -> None:
    """Serve for ever, with the certificate and for the token in the folder; says `ready` then."""
    Api.folder, Api.token = Path(folder), (Path(folder) / "token").read_text()
    server = ThreadingHTTPServer(("0.0.0.0", PORT), Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(folder) / "ca.crt", Path(folder) / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
