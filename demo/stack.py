"""Everything that the demo runs on, as child processes of its own: a Redis, an S3, and one consumer."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from demo.servers import S3Server, ServerFailed, redis_server, s3_server, shell_environment, tail
from producer.settings import ProducerSettings
from producer.storage import PresignedUrls

BUCKET = "pictures"
DATABASE = "listener.db"
CONSUMER_LOG = "consumer.log"

_MODEL = "tiny-sdxl"
_LORAS = "loras"
_DEVICE = "cpu"
_MATERIALS_LOG = "materials.log"
_ROOT = Path(__file__).resolve().parents[1]
_MATERIALS_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 10.0
_LOOK_S = 0.1


class Interrupted(Exception):
    """Somebody wants the demo to end."""


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs. `settings` and `urls` are the backend's. `stop`: set by whoever wants the demo to end."""

    settings: ProducerSettings
    urls: PresignedUrls
    s3: S3Server
    consumer: subprocess.Popen[bytes]
    consumer_log: Path
    stop: Event

    @property
    def credentials(self) -> tuple[str, str]:
        """What signs the URLs, and must be found nowhere."""
        return self.s3.access_key, self.s3.secret_key

    def check(self) -> None:
        """Raises Interrupted, and ServerFailed, with the tail of its log, if the consumer has ended."""
        _check_stop(self.stop)
        if self.consumer.poll() is not None:
            raise ServerFailed(f"the consumer ended with status {self.consumer.returncode}:\n{tail(self.consumer_log)}")


@contextmanager
def open_stack(out: Path, say: Callable[[str], None], stop: Event) -> Iterator[Stack]:
    """Starts everything, with its files in the empty folder `out`; `say` gets a line for each thing that is ready.

    All of it is gone when the block ends. Raises ServerFailed, and Interrupted when `stop` is set.
    """
    with ExitStack() as running:
        writer = running.enter_context(
            _child(["demo.materials", str(out / _MODEL), str(out / _LORAS)], out / _MATERIALS_LOG)
        )
        redis = running.enter_context(redis_server(out))
        say(f"Redis       {redis.url}")
        s3 = running.enter_context(s3_server(out))
        s3.create_bucket(BUCKET)
        say(f"S3          {s3.url}, bucket {BUCKET}")
        _wait_for_materials(writer, out / _MATERIALS_LOG, stop)
        say("model       SDXL's architecture, tiny, random weights")
        say(f"LoRAs       {', '.join(_upload_loras(s3, out / _LORAS))}")
        environment = _environment(out, redis.url, s3)
        consumer_log = out / CONSUMER_LOG
        consumer = running.enter_context(_child(["consumer"], consumer_log, environment))
        say(f"consumer    python -m consumer, process {consumer.pid}, loads the model onto the CPU")
        urls = PresignedUrls(
            endpoint_url=s3.url, bucket=BUCKET, access_key_id=s3.access_key, secret_access_key=s3.secret_key
        )
        # validated, not constructed: then nothing is read from this process's environment
        settings = ProducerSettings.model_validate(environment)
        yield Stack(settings, urls, s3, consumer, consumer_log, stop)


def _environment(out: Path, redis_url: str, s3: S3Server) -> dict[str, str]:
    """The contract's variables for both sides."""
    return {
        "REDIS_URL": redis_url,
        "DATABASE_URL": f"sqlite:///{out / DATABASE}",
        "SDXL_MODEL": str(out / _MODEL),
        "SDXL_DEVICE": _DEVICE,
        "SDXL_DTYPE": "float32",
        "LORA_ALLOW_LOOPBACK": "true",
        "LORA_CACHE_DIR": str(out / "lora-cache"),
        "R2_ACCESS_KEY_ID": s3.access_key,
        "R2_SECRET_ACCESS_KEY": s3.secret_key,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ENDPOINT_URL": s3.url,
        "R2_PUBLIC_URL": f"{s3.url}/{BUCKET}",
        "HF_HUB_OFFLINE": "1",
    }


def _upload_loras(s3: S3Server, folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    client = s3.client()
    try:
        for file in files:
            client.put_object(Bucket=BUCKET, Key=f"loras/{file.name}", Body=file.read_bytes())
    finally:
        client.close()
    return [file.name for file in files]


def _wait_for_materials(writer: subprocess.Popen[bytes], log: Path, stop: Event) -> None:
    deadline = time.monotonic() + _MATERIALS_TIMEOUT_S
    while (status := writer.poll()) is None:
        _check_stop(stop)
        if time.monotonic() > deadline:
            raise ServerFailed(f"the model was not written after {_MATERIALS_TIMEOUT_S:g} s")
        time.sleep(_LOOK_S)
    if status != 0:
        raise ServerFailed(f"the model could not be written, status {status}:\n{tail(log)}")


def _check_stop(stop: Event) -> None:
    if stop.is_set():
        raise Interrupted


@contextmanager
def _child(
    module_and_arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        # in a group of its own: Ctrl-C is for the demo, which ends its children in its own time
        process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=_ROOT,
            env={**shell_environment(), **(environment or {})},
            process_group=0,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
