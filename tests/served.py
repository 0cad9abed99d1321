"""The real server, as a stranger starts it: `python -m service serve`, until the block ends. And servers of others."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(
    at: int | None = None, log: Path | None = None, **settings: object
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Yield base URL (on port `at` or a free one) and process once it is ready; stop it with SIGTERM afterwards.

    What it writes goes to the file `log`.

    Raises:
        RuntimeError: it ended or was not ready within two minutes; the message holds its log.
        AssertionError: it ended with a failure, and not because the block killed it.
    """
    port = at or free_port()
    with log.open("w+b") if log else tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "service", "serve", "--port", str(port)]
        env = {**os.environ, **{f"LIMPID_{name.upper()}": str(value) for name, value in settings.items()}}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        try:
            _wait(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}", process
        except RuntimeError as error:
            output.seek(0)
            raise RuntimeError(f"{error}: {output.read().decode()}") from error
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        assert process.returncode in (0, -signal.SIGKILL), process.returncode


class Quiet(http.server.BaseHTTPRequestHandler):
    """To be given methods; writes no log."""

    def log_message(self, *_: object) -> None: ...


@contextmanager
def answering(handler: type[Quiet]) -> Iterator[str]:
    """Yield the URL of a server of another, a camera say, whose requests `handler` answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(base: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/readyz"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready")
