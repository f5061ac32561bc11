"""A real browser without a window, driven over the protocol of Chrome's developer tools."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from tests.service_process import eventually

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: No sandbox: containers lack the namespaces for it. No request but to the page.
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


class Browser:
    """One page of the browser."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.number = 0

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; return its result. Events are passed over."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.connection.send(json.dumps(message))
        while True:
            received = json.loads(self.connection.recv(30))
            if received.get("id") == self.number:
                assert "error" not in received, received
                result: dict[str, Any] = received["result"]
                return result

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, width: int = 1280, height: int = 720) -> None:
        """Load a page, in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url=url)
        eventually(lambda: self.evaluate("document.readyState") == "complete")

    def text(self, selector: str) -> str:
        """Return the text of an element, as it is shown."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self, path: Path) -> None:
        """Write a picture of the window."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def used_bytes(self) -> int:
        """Return the memory of the page's objects, without garbage."""
        self.send("HeapProfiler.collectGarbage")
        return int(self.send("Runtime.getHeapUsage")["usedSize"])


def _find_program() -> str:
    """Skip without a browser. GitHub's machines have one; GitLab's images of Python do not."""
    found = [path for name in PROGRAMS if (path := shutil.which(name))]
    if found:
        return found[0]
    if os.environ.get("CI") == "true" and "GITLAB_CI" not in os.environ:
        pytest.fail(f"no browser on PATH: install one of {', '.join(PROGRAMS)}")
    return str(pytest.skip("no browser on PATH, such as chromium"))


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """Run a browser during the block, with a profile of its own."""
    program = _find_program()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            env=os.environ | {"HOME": profile},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile, "DevToolsActivePort")
            eventually(lambda: port_file.exists() and port_file.read_text().count("\n"))
            port = port_file.read_text().split()[0]
            request = Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
            with urlopen(request, timeout=30) as response:
                url = json.load(response)["webSocketDebuggerUrl"]
            with connect(url, max_size=None) as connection:
                browser = Browser(connection)
                browser.send("Page.enable")
                yield browser
        finally:
            process.terminate()
            process.wait(30)
