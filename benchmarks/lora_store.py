"""`python -m benchmarks.lora_store FOLDER --mb-per-s 100`: a folder over HTTP, no faster than a store far away is.

Each connection has the whole rate, as with S3 and R2. Files have an ETag, and are not sent to who knows it.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from demo.servers import STOP_TIMEOUT_S, wait_until_ready

_READY = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")
_CHUNK_BYTES = 1 << 18


def app(folder: Path, mb_per_s: float) -> web.Application:
    """Serves the files in `folder`; `mb_per_s` of 0 is as fast as it goes."""

    async def send(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["name"]
        if not path.is_file():
            raise web.HTTPNotFound
        status = path.stat()
        etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        response = web.StreamResponse(headers={"ETag": etag, "Content-Length": str(status.st_size)})
        await response.prepare(request)
        await _write(response, path, 1e6 * mb_per_s)
        return response

    application = web.Application()
    application.router.add_get("/{name}", send)
    return application


async def _write(response: web.StreamResponse, path: Path, bytes_per_s: float) -> None:
    began, sent = time.perf_counter(), 0
    with path.open("rb") as file:  # from the page cache: there is nothing to wait for
        while chunk := file.read(_CHUNK_BYTES):
            sent += len(chunk)
            ahead_s = sent / bytes_per_s - (time.perf_counter() - began) if bytes_per_s else 0.0
            if ahead_s > 0:
                await asyncio.sleep(ahead_s)
            await response.write(chunk)


@contextmanager
def lora_store(folder: Path, mb_per_s: float, log: Path) -> Iterator[str]:
    """The URL of such a store, in a process of its own until the block ends. Raises ServerFailed."""
    command = [sys.executable, "-m", "benchmarks.lora_store", str(folder), "--mb-per-s", str(mb_per_s)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield wait_until_ready(process, log, _READY)[1].decode()
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


async def _serve(folder: Path, mb_per_s: float) -> None:
    runner = web.AppRunner(app(folder, mb_per_s), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"Running on http://127.0.0.1:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mb-per-s", type=float, default=0.0)
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.folder, arguments.mb_per_s))


if __name__ == "__main__":
    main()
