"""A real browser without a window: Chromium, driven over its DevTools protocol through a pipe.

https://chromedevtools.github.io/devtools-protocol/ : JSON messages that end in a zero byte, on descriptors 3 and 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
LONGEST_S = 60.0


class Browser:
    """One browser with one page. `problems`: errors of its console, exceptions, and requests beyond local files."""

    def __init__(self, folder: Path):
        ours, theirs = os.pipe(), os.pipe()  # theirs: what we write, they read
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs[0], ours[1])]

        def arrange() -> None:
            for number, end in zip((3, 4), high, strict=True):
                os.dup2(end, number)

        words = [PROGRAM, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, preexec_fn=arrange, pass_fds=(3, 4), **quiet)
        for end in (*high, theirs[0], ours[1]):
            os.close(end)
        self._read, self._write, self._left, self._number = ours[0], theirs[1], b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        self._loads = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{part}.enable")

    def call(self, method: str, **params):
        """The result of a command; events that come before it are looked at."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._until(lambda reply: reply.get("id") == self._number, method)

    def _until(self, is_it, what: str):
        end = time.monotonic() + LONGEST_S
        while True:
            text, zero, rest = self._left.partition(b"\0")
            if zero:
                self._left = rest
                reply = json.loads(text)
                self._notice(reply)
                if is_it(reply):
                    assert "error" not in reply, (what, reply["error"])
                    return reply.get("result")
            else:
                ready = select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]
                part = os.read(self._read, 2**20) if ready else b""
                assert part, f"no answer to {what}; the browser's exit code is {self.process.poll()}"
                self._left += part

    def _notice(self, event: dict) -> None:
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Page.loadEventFired":
            self._loads += 1
        elif kind == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:2000])
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled":
            self.problems.append(json.dumps(params["args"])[:2000])
        elif kind == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.problems.append(f"it asked for {url}")

    def open(self, file: Path) -> None:
        loads = self._loads
        self.call("Page.navigate", url=file.resolve().as_uri())
        if self._loads == loads:
            self._until(lambda event: event.get("method") == "Page.loadEventFired", f"opening {file}")

    def js(self, expression: str):
        """The value of an expression of JavaScript, of a kind that JSON knows."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key of the keyboard, by its name and its virtual key code."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def show(self, width: int, height: int, dark: bool = False) -> None:
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def pdf(self, file: Path) -> None:
        done = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(done["data"]))

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            self.process.terminate()
        self.process.wait(LONGEST_S)
        for end in (self._read, self._write):
            os.close(end)
