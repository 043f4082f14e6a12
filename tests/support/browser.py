"""A headless Chromium, driven through its DevTools protocol."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 120
"""Seconds until what is waited for counts as never to come."""


class Browser:
    """A browser with one tab; a context manager.

    Attributes:
        complaints: What was thrown or refused in the tab so far.
        asked_for: Addresses that the tab has asked for.
    """

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        self.complaints: list[str] = []
        self.asked_for: list[str] = []
        self._command = [BROWSER, *QUIET, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        self._profile, self._calls = profile, 0

    def __enter__(self) -> Browser:
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [*self._command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._loop.run_until_complete(self._connect())
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.kill()
        self._process.wait()

    def open(self, address: str, ready: str) -> None:
        """Load a page and wait for an expression to be true in it."""
        self._run("Page.navigate", url="about:blank")  # a fragment alone would load nothing
        self._run("Page.navigate", url=address)
        self.until(ready)

    def until(self, condition: str) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + PATIENCE
        while not self.value(f"document.readyState === 'complete' && Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: never. {self.complaints}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """The value of an expression; a promise is waited for."""
        done = self._run(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def _connect(self) -> None:
        port, end = self._profile / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (port.exists() and port.read_text().strip()):
            assert time.monotonic() < end, "the browser does not start"
            await asyncio.sleep(0.05)
        self._session = aiohttp.ClientSession()
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
        async with self._session.get(address) as answer:
            tab = next(one for one in await answer.json() if one["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable")

    def _run(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(self._call(method, **arguments))

    async def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": arguments})
        while True:
            said = await asyncio.wait_for(self._socket.receive_json(), PATIENCE)
            if said.get("id") == self._calls:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(said["params"]["exceptionDetails"]))
            elif said.get("method") == "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            elif said.get("method") == "Network.requestWillBeSent":
                self.asked_for.append(said["params"]["request"]["url"])
