"""The OpenAPI document is valid, has examples, and says exactly what is served: schemathesis finds nothing."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV30SpecValidator
from redis.asyncio import Redis

from producer.gateway import create_app
from producer.gateway.tasks import stop
from producer.requests import make_request
from producer.settings import ProducerSettings
from schemas.keys import Keys
from tests.integration.gateway_kit import BUCKET, PNG, TOKEN, Painter, serving
from tests.integration.queue_kit import job

# A job that was cancelled by DELETE is still there to be looked at: one check expects it to be gone.
CANCELLING_IS_NO_REMOVAL = "use_after_free"
OPTIONS = ["--seed", "1", "--max-examples", "8", "--exclude-checks", CANCELLING_IS_NO_REMOVAL, "--no-color"]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(ProducerSettings()).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert [error.message for error in OpenAPIV30SpecValidator(document).iter_errors()] == []


def test_every_route_of_the_contract_is_in_it_and_all_but_health_name_the_token(document: dict[str, Any]) -> None:
    guarded = {name: bool(operation.get("security")) for name, operation in operations(document)}
    assert guarded == {
        "GET /health": False,
        "POST /generate-image": True,
        "POST /v1/jobs": True,
        "GET /v1/jobs/{job_id}": True,
        "DELETE /v1/jobs/{job_id}": True,
        "GET /v1/jobs/{job_id}/events": True,
    }


def test_every_answer_has_an_example_with_all_that_is_required(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name, operation in operations(document):
        for status, answer in operation["responses"].items():
            for kind, content in answer.get("content", {}).items():
                schema = schemas.get(content.get("schema", {}).get("$ref", "").rpartition("/")[2], {})
                example = content.get("example", schema.get("example"))
                assert example, (name, status)
                assert kind == "text/event-stream" or set(schema.get("required", ())) <= set(example), (name, status)


def test_every_body_has_examples_that_are_taken(document: dict[str, Any]) -> None:
    bodies = {name: operation["requestBody"] for name, operation in operations(document) if "requestBody" in operation}
    assert list(bodies) == ["POST /generate-image", "POST /v1/jobs"]
    for body in bodies.values():
        examples = body["content"]["application/json"]["examples"]
        assert len(examples) == 2
        for example in examples.values():
            assert make_request(example["value"]).prompt


class QuickPainter(Painter):
    """Ends every job with the same stored picture."""

    async def paint_all(self) -> None:
        while True:
            await self.intake.ensure_groups()
            for delivery in await self.intake.read(block_ms=20):
                lease, begun = await self.begin(delivery)
                if begun.verdict == "ok":
                    run = int((await job(self.redis, self.keys, lease.job_id))["run"])
                    await self.end_with_stored_picture(lease, delivery, "one.png", run)


async def test_schemathesis_finds_nothing(
    gateway_env: ProducerSettings, painter: Painter, redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    quick = QuickPainter(redis, keys, "quick")
    client = painter.s3.client()
    await asyncio.to_thread(client.put_object, Bucket=BUCKET, Key="one.png", Body=PNG)
    client.close()
    painting = asyncio.create_task(quick.paint_all())
    async with serving(create_app(gateway_env)) as url:
        command = ["-m", "schemathesis.cli", "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, *OPTIONS, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
    assert not painting.done()
    await stop(painting)
    assert process.returncode == 0, said.decode()
    assert "No issues found" in said.decode()
