"""Browser: a headless Chromium that tests look at pages with, over its own debugging pipe.

Knows nothing of reports. Invariant: nothing is fetched, and what the page complains of is kept.
"""

import base64
import functools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT_S = 60.0
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--autoplay-policy=no-user-gesture-required",
    "--mute-audio",
)

_CHECKS = dict(
    part.split("\n", 1)
    for part in Path(__file__).with_name("browser.js").read_text().split("\n//// ")[1:]
)
CUT_OFF, FAINT, NAMELESS = (_CHECKS[name] for name in ("CUT_OFF", "FAINT", "NAMELESS"))
"""JavaScript expressions: the elements that are cut off, hardly visible, or without a name."""


@functools.cache
def chromium() -> str:
    """The browser there is; without one the test is skipped, or fails where one has to be."""
    found = next((path for path in map(shutil.which, _NAMES) if path), None)
    if found:
        return found
    if os.environ.get("DICCAE_REQUIRE_BROWSER") == "1":
        pytest.fail("DICCAE_REQUIRE_BROWSER=1 and no chromium or google-chrome on PATH")
    pytest.skip("no chromium or google-chrome on PATH")


class Browser:
    """One tab. Messages are JSON between zero bytes, on descriptors 3 and 4 of the child."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """Errors of scripts, and what the console or the page's own policy complained of."""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The child expects 3 and 4, which may be taken here: a shell moves them.
        redirect = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._child = subprocess.Popen(
            ["bash", "-c", redirect, chromium(), *_FLAGS, f"--user-data-dir={self._profile.name}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._session = ""
        self._last = 0
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Performance", "Accessibility"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its result."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> float:
        """Show a page at a width; returns seconds until it was drawn and answered."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        began = time.monotonic()
        self.call("Page.navigate", url=page.as_uri())
        self._wait_for("Page.loadEventFired")
        # Two frames: one to draw, one to know that it was shown.
        shown = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.eval(f"{shown}.then(() => 1)")
        return time.monotonic() - began

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for.

        Raises: RuntimeError for what it throws.
        """
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"].get("exception", found)))
        return found["result"].get("value")

    def press(self, key: str, times: int = 1, text: str = "") -> None:
        """A key of the keyboard, by its DOM name (Tab, Enter, ArrowDown, +)."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38}
        codes |= {"ArrowRight": 39, "ArrowDown": 40}
        text = text or {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                more = {"text": text} if text and kind == "keyDown" else {}
                code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind, key=key, windowsVirtualKeyCode=code, **more,
                )  # fmt: skip

    def screenshot(self, path: Path, selector: str = "", *, whole: bool = False) -> Path:
        """The window, the whole page, or one element of it, as a PNG."""
        clip = {}
        if selector:
            box = self.eval(
                f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
                ".getBoundingClientRect(); return {x: b.x + scrollX, y: b.y + scrollY, "
                "width: b.width, height: b.height}; })()"
            )
            clip = {"clip": box | {"scale": 1}, "captureBeyondViewport": True}
        elif whole:
            box = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": box | {"scale": 1}, "captureBeyondViewport": True}
        shot = self.call("Page.captureScreenshot", format="png", **clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _wait_for(self, event: str) -> None:
        while not any(e["method"] == event for e in self._events):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], _TIMEOUT_S)
            piece = os.read(self._in, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError(f"Chromium is gone or silent (exit code {self._child.poll()})")
            self._buffer += piece
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self._note(message)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        params = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", str(details)))
        elif event["method"] == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "assert",
        ):
            self.problems.append(str(params["args"]))
