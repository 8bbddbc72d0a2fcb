"""How busy one consumer keeps its GPU, and the usual way beside it: `python -m benchmarks.worker --model FOLDER`.

The real `python -m consumer` on a real Redis and a real S3 on loopback; LoRAs come from a store that sends each at
`--mb-per-s`. Beside it the same jobs done in the usual way, one after another, from the same stores. One JSON object a
line, for each of the two.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.consumer_run import RAMP_UP, run_consumer
from benchmarks.lora_files import LoraWriter, attention_layers
from benchmarks.lora_store import lora_store
from benchmarks.record import command_line, record
from benchmarks.spread import spread
from demo.servers import S3Server, redis_server, s3_server
from schemas.requests import GenerationRequest

BUCKET = "pictures"
PREFIX = "bench"
WORKLOADS = ("all-different", "one-in-three-without", "mixed-ranks", "same")
MIXED = (0.25, 0.5, 1, 2, 4)  # of the rank: 8 to 128 where it is 32
_PROMPT = "a portrait of a woman by a window, soft light, 85 mm, film grain"


@dataclass(frozen=True, slots=True)
class Stores:
    """Where everything is, on loopback."""

    redis_url: str
    s3: S3Server
    lora_url: str
    folder: Path


def ranks_of(workload: str, jobs: int, rank: int) -> list[int | None]:
    """The rank of each job's LoRA, None for a job without one. In `same`, all jobs share the first one's file."""
    if workload == "one-in-three-without":
        return [None if number % 3 == 2 else rank for number in range(jobs)]
    if workload == "mixed-ranks":
        return [int(rank * MIXED[number % len(MIXED)]) for number in range(jobs)]
    return [rank] * jobs


def requests_of(options: argparse.Namespace, lora_url: str, files: Sequence[Path | None]) -> list[GenerationRequest]:
    """One request for each of `files`, which `lora_url` serves."""
    width, height = map(int, options.size.split("x"))
    return [
        GenerationRequest(
            job_id=f"{options.workload}-{number:04d}",
            prompt=_PROMPT,
            width=width,
            height=height,
            steps=options.steps,
            lora_url=None if file is None else f"{lora_url}/{file.name}",
            lora_scale=0.8,
            timeout=300,
        )
        for number, file in enumerate(files)
    ]


def write_files(options: argparse.Namespace, folder: Path) -> list[Path | None]:
    """Writes what the workload needs; returns each job's file."""
    folder.mkdir()
    writer = LoraWriter(attention_layers(options.model))
    files: list[Path | None] = []
    for number, rank in enumerate(ranks_of(options.workload, max(options.jobs, options.serial_jobs), options.rank)):
        if rank is None:
            files.append(None)
        elif options.workload == "same" and files:
            files.append(files[0])
        else:
            files.append(writer.write(folder / f"{number:04d}-rank{rank}.safetensors", rank=rank, seed=number))
    return files


def settings_of(options: argparse.Namespace, stores: Stores) -> dict[str, str]:
    """The consumer's environment."""
    return {
        "REDIS_URL": stores.redis_url,
        "SDXL_PREFIX": PREFIX,
        "SDXL_MODEL": str(options.model),
        "SDXL_DEVICE": options.device,
        "SDXL_DTYPE": options.dtype,
        "SDXL_SPEED": options.speed,
        "SDXL_PREFETCH": str(options.prefetch),
        "LORA_ALLOWED_HOSTS": "127.0.0.1",
        "LORA_ALLOW_LOOPBACK": "true",
        "LORA_CACHE_DIR": str(stores.folder / "cache"),
        "R2_ENDPOINT_URL": stores.s3.url,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ACCESS_KEY_ID": stores.s3.access_key,
        "R2_SECRET_ACCESS_KEY": stores.s3.secret_key,
        "HF_HUB_OFFLINE": "1",
    }


def serial(options: argparse.Namespace, stores: Stores, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """The usual way's figures for `requests`, in the same terms as the consumer's."""
    from benchmarks.usual import UsualPipeline, serve  # torch and diffusers, which the consumer does not wait for

    began = time.perf_counter()
    pipeline = UsualPipeline(options.model, options.device, options.dtype)
    start_s = time.perf_counter() - began
    client = stores.s3.client()
    took: list[float] = []
    parts: list[Mapping[str, float]] = []
    for request in requests:
        began = time.perf_counter()
        parts.append(
            serve(
                pipeline, request, stores.folder, lambda key, png: client.put_object(Bucket=BUCKET, Key=key, Body=png)
            )
        )
        took.append(time.perf_counter() - began)
    client.close()
    first = min(RAMP_UP, len(requests) // 3)  # kernels are chosen and memory is taken in the first
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        "jobs": len(requests),
        "start_s": round(start_s, 3),
        "images_per_s": round(len(took[first:]) / sum(took[first:]), 4),
        "job_to_job_s": spread(took[first:]),
        "latency_s": {name: spread([part[name] for part in parts[first:] if name in part]) for name in names},
    }


def benchmark(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The consumer's line, then the usual way's. Raises ServerFailed and RunFailed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="worker-", ignore_cleanup_errors=True)))
        files = write_files(options, folder / "loras")
        redis = stack.enter_context(redis_server(folder))
        s3 = stack.enter_context(s3_server(folder))
        s3.create_bucket(BUCKET)
        lora_url = stack.enter_context(lora_store(folder / "loras", options.mb_per_s, folder / "lora-store.log"))
        stores = Stores(redis.url, s3, lora_url, folder)
        requests = requests_of(options, lora_url, files)
        lora_mb = spread([file.stat().st_size / 1e6 for file in files if file is not None], digits=1)
        if options.jobs:
            module = ["consumer"] if options.simulate is None else ["benchmarks.simulated", str(options.simulate)]
            settings, log = settings_of(options, stores), folder / "consumer.log"
            run = run_consumer(settings, requests[: options.jobs], log, module)
            yield {"way": "consumer", "simulated_s": options.simulate, "lora_mb": lora_mb, **run.summary()}
        if options.serial_jobs:
            # keys of their own: what the consumer has stored stays
            others = [one.model_copy(update={"job_id": f"serial-{one.job_id}"}) for one in requests]
            yield {"way": "serial", "lora_mb": lora_mb, **serial(options, stores, others[: options.serial_jobs])}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--jobs", type=int, default=60, help="for the consumer; 0 leaves it out")
    parser.add_argument("--serial-jobs", type=int, default=20, help="done the usual way; 0 leaves it out")
    parser.add_argument("--workload", choices=WORKLOADS, default=WORKLOADS[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--mb-per-s", type=float, default=100.0, help="of each connection to the LoRAs' store")
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--simulate", type=float, help="seconds a picture, of a GPU that is not there", metavar="S")
    parser.add_argument("--speed", choices=("auto", "stock", "fast"), default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--out", type=Path, help="a file to which the lines are added")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    record("worker", command_line("benchmarks.worker", words), options.workload, benchmark(options), options.out)


if __name__ == "__main__":
    main()
