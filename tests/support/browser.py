"""A headless browser, driven over a pipe: no driver, no port, no network.

Chromium reads commands from file descriptor 3 and writes answers to 4 (`--remote-debugging-pipe`),
JSON messages that end with a zero byte. Tests that need one are skipped where none is installed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")


def found() -> str | None:
    """Path of a browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `requests`, `errors` gather what it asked of the network and complained about."""

    def __init__(self, width: int = 1280, height: int = 900, *, dark: bool = False):
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.folder = tempfile.mkdtemp(prefix="browser-")
        ours_in, theirs_out = os.pipe()  # they write, we read
        theirs_in, ours_out = os.pipe()  # we write, they read

        def place() -> None:
            ends = os.dup(theirs_in), os.dup(theirs_out)  # 3 or 4 may be one of the originals
            os.dup2(fcntl.fcntl(ends[0], fcntl.F_DUPFD, 10), 3)
            os.dup2(fcntl.fcntl(ends[1], fcntl.F_DUPFD, 10), 4)

        self.process = subprocess.Popen(
            [
                found() or "chromium", "--headless=new", "--remote-debugging-pipe", "--no-sandbox",
                "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={self.folder}", f"--window-size={width},{height}", "about:blank",
            ],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_out)
        os.close(theirs_in)
        self.read, self.write, self.buffer, self.count = ours_in, ours_out, b"", 0
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t for t in targets if t["type"] == "page")
        self.session = None
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if dark:
            feature = {"name": "prefers-color-scheme", "value": "dark"}
            self.call("Emulation.setEmulatedMedia", features=[feature])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        os.close(self.write)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- the protocol ----------------------------------------------------------------------------

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that arrive meanwhile are noted."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if getattr(self, "session", None):
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(30)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self, seconds: float) -> dict[str, Any]:
        limit = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0.0, limit - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise RuntimeError("the browser went away")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method", ""), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(found["exceptionDetails"].get("text")))
        elif method == "Runtime.consoleAPICalled" and found["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.errors.append(str([a.get("value") for a in found["args"]]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.errors.append(found["entry"]["text"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    # ---- what tests do -----------------------------------------------------------------------------

    def open(self, path: Path) -> None:
        """Load a file and wait until it is complete."""
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        limit = time.monotonic() + 30
        while not self.loaded:
            self._note(self._next(max(0.1, limit - time.monotonic())))
        self.run("new Promise(done => requestAnimationFrame(() => done(1)))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def picture(self, path: Path, top: float = 0, height: float = 900) -> None:
        """A PNG of the page from `top` on, as wide as the window."""
        clip = {"x": 0, "y": top, "width": self.run("innerWidth"), "height": height, "scale": 1}
        data = self.call(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        path.write_bytes(base64.b64decode(data["data"]))

    def pdf(self, path: Path) -> None:
        data = self.call("Page.printToPDF", printBackground=True)
        path.write_bytes(base64.b64decode(data["data"]))
