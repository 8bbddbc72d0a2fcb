"""`lora check`: whether a LoRA file fits, before anybody asks for a picture with it."""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from botocore.exceptions import ClientError
from rich.text import Text

from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, checked_settings
from producer.lora_check import LoraReport, check_lora
from producer.storage import PresignedUrls
from schemas.errors import ErrorCode

_MAX_SKIPPED_SHOWN = 3

File = Annotated[str, typer.Argument(metavar="FILE", help="A .safetensors file, or an object key with --key.")]
IsKey = Annotated[bool, typer.Option("--key", help="FILE is an object key of the own bucket.")]


async def check(file: File, is_key: IsKey = False, as_json: AsJson = False) -> Status:
    """Say what a LoRA file is and whether it fits SDXL, as consumers would. Reads no weights, needs no torch."""
    report = await asyncio.to_thread(_check_object if is_key else _check_file, file)
    if as_json:
        output.print_json(_document(file, report))
    else:
        output.stdout().print(output.facts_grid(_facts(file, report)))
    return Status.OK if report.refusal is None else Status.FAILED


def _check_file(name: str) -> LoraReport:
    path = Path(name)
    try:
        if not path.is_file():
            raise BadUsage(f"there is no file {name}")
        return check_lora(path)
    except OSError as error:
        raise BadUsage(f"{name} cannot be read: {error.strerror}") from None


def _check_object(key: str) -> LoraReport:
    with checked_settings() as settings:
        storage = PresignedUrls.from_settings(settings)
    if storage is None:
        raise BadUsage("--key needs R2_ENDPOINT_URL, R2_BUCKET_NAME, R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        _download(storage, key, path)
        return check_lora(path)


def _download(storage: PresignedUrls, key: str, path: Path) -> None:
    client = storage.client(connect_timeout=10, read_timeout=30)
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(client.get_object(Bucket=storage.bucket, Key=key)["Body"], file)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchKey":
            raise BadUsage(f"there is no object {key}") from None
        raise
    finally:
        client.close()


def _facts(name: str, report: LoraReport) -> dict[str, object]:
    facts: dict[str, object] = {"file": name}
    if report.refusal is None:
        facts["verdict"] = Text("fits SDXL", "green")
    else:
        facts["verdict"] = Text("refused", "red").append(f"  {ErrorCode.LORA_LOAD_FAILED}", "bold")
        facts["reason"] = str(report.refusal)
    return facts | {
        "kind": ", ".join(report.kinds) or None,
        "naming": "; ".join(report.naming) or None,
        "modules": ", ".join(f"{count} in {name}" for name, count in report.modules.items()) or None,
        "skipped": _skipped(report),
        "rank": ", ".join(map(str, report.ranks)) or None,
        "alpha": ", ".join(f"{alpha:g}" for alpha in report.alphas) or None,
        "dtype": ", ".join(report.dtypes) or None,
        "size": f"{report.size_bytes / 1e6:.1f} MB" if report.size_bytes >= 1e5 else f"{report.size_bytes} bytes",
        "sha256": report.sha256,
        **report.metadata,
    }


def _skipped(report: LoraReport) -> str | None:
    names = report.planned.skipped if report.planned else ()
    if not names:
        return None
    shown = ", ".join(names[:_MAX_SKIPPED_SHOWN]) + (", …" if len(names) > _MAX_SKIPPED_SHOWN else "")
    return f"{len(names)} tensors match nothing in SDXL: {shown}"


def _document(name: str, report: LoraReport) -> dict[str, Any]:
    refusal = report.refusal
    return {
        "file": name,
        "fits": refusal is None,
        "error_code": None if refusal is None else ErrorCode.LORA_LOAD_FAILED,
        "error": None if refusal is None else str(refusal),
        "details": {} if refusal is None else refusal.details,
        "kinds": report.kinds,
        "naming": report.naming,
        "modules": report.modules,
        "skipped": list(report.planned.skipped) if report.planned else [],
        "ranks": report.ranks,
        "alphas": report.alphas,
        "dtypes": report.dtypes,
        "size_bytes": report.size_bytes,
        "sha256": report.sha256,
        "metadata": report.metadata,
    }
