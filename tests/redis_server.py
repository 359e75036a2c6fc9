"""A real Redis for tests, Debian's `redis-server`, on a socket of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import redis


class RedisServer:
    """Keeps every write in its log, and can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("no redis-server: apt-get install redis-server")
        self.folder = folder
        self.url = f"unix://{folder / 'socket'}"
        self._command = [binary, "--port", "0", "--unixsocket", str(folder / "socket")]
        self._command += ["--dir", str(folder), "--appendonly", "yes", "--save", ""]
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        client = redis.Redis.from_url(self.url, retry=None)
        deadline = time.monotonic() + 30
        while True:
            try:
                client.ping()
                break
            except redis.RedisError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        client.close()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
