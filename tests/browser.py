"""Headless Chromium over its debugging pipe: a page as people see it, what it asked for and complained of.

with Browser(folder) as browser:
    browser.open(url, width=390)
    browser.hover("li")
    assert not browser.complaints
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
PATIENCE = 60.0  # seconds for an answer on a busy machine


class Browser:
    """One page. `asked`: the addresses that it fetched; `complaints`: what a console would show."""

    def __init__(self, folder):
        self.asked, self.complaints, self._left = [], [], b""
        to_it, self._write = os.pipe()
        self._read, from_it = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4. Its sandbox does not start under root.
        command = [
            *(
                "bash",
                "-c",
                f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}',
                CHROMIUM,
                "--headless",
                "--no-sandbox",
            ),
            *("--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
            *("--hide-scrollbars", "--disable-background-networking", f"--user-data-dir={folder}"),
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(to_it, from_it), **quiet)
        os.close(to_it)
        os.close(from_it)
        self._number, self._session = 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)

    def send(self, method, **parameters):
        """Any command of the DevTools protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, url, width=1280, height=900, dark=False, touch=False):
        """Load a page in a window of this many CSS pixels, and wait until it has what it needs."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self._until(lambda found: found.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of an expression on the page; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def hover(self, selector):
        """Move the mouse to the middle of the first such element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box}.getBoundingClientRect())")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def settle(self):
        """Wait until every picture in the window has arrived and was painted; lazy ones below never do."""
        seen = "(b => b.height && b.top < innerHeight && b.bottom > 0)(image.getBoundingClientRect())"
        shown = f"[...document.images].filter(image => {seen})"
        self.run(f"Promise.all({shown}.map(image => image.decode().catch(() => 0))).then(() => 0)")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def picture(self, path, whole=False):
        """A screenshot as PNG: the window, or the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def _until(self, wanted):
        while True:
            found = self._message()
            self._note(found.get("method"), found.get("params", {}))
            if wanted(found):
                return found

    def _note(self, method, parameters):
        if method == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))

    def _message(self):
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium said nothing for {PATIENCE:.0f} s"
            said = os.read(self._read, 2**16)
            assert said, "Chromium is gone"
            self._left += said
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)
