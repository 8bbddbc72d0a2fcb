"""What the guide shows of the example is in the example, and its receiver of webhooks runs."""

from datetime import UTC, datetime
from pathlib import Path
from types import FunctionType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from standardwebhooks import Webhook

from examples.backend.content import Tier, order
from examples.backend.settings import BackendSettings
from producer.settings import ProducerSettings
from schemas.events import Event
from tests.docs_kit import DOCS, blocks_of
from tests.event_kit import failed, started, succeeded
from tests.integration.backend_kit import contents, fill

EXAMPLE = DOCS.parent / "examples" / "backend"
BLOCKS = blocks_of(DOCS / "backend.md")
[RECEIVER] = [block for block in BLOCKS if "verify(" in block.text]
SECRET = "whsec_YSB3ZWJob29rIHNlY3JldCBvZiAzMiBieXRlcy4uLi4="


@pytest.mark.parametrize("excerpt", [block.text for block in BLOCKS if block is not RECEIVER])
def test_an_excerpt_is_in_the_example(excerpt: str) -> None:
    assert any(unindented(excerpt) in unindented(path.read_text()) for path in EXAMPLE.glob("*.py"))


def unindented(code: str) -> str:
    return "\n".join(line.strip() for line in code.splitlines())


def test_the_table_of_settings_has_what_the_example_adds_and_no_more() -> None:
    table = (EXAMPLE / "README.md").read_text().split("## Settings")[1]
    named = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    own = BackendSettings.model_fields.keys() - ProducerSettings.model_fields.keys()
    assert named == {BackendSettings.model_fields[name].alias for name in own} | {"MODAL_API_TOKEN"}


async def test_the_receiver_of_webhooks_stores_what_is_signed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/backend.db")
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)
    names: dict[str, Any] = {}
    FunctionType(RECEIVER.compiled(), names)()
    sessions = names["sessions"]
    fill(sessions)
    job_id = order(sessions, "ann", "in the rain", Tier.FREE, timeout_s=300).job_id
    app = FastAPI()
    app.include_router(names["router"])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://backend.example") as web:
        forged = await web.post("/hooks/pictures", content=succeeded(job_id).encode())
        assert (forged.status_code, [row.status for row in contents(sessions)]) == (401, ["pending"])
        for event in (started(job_id), failed(job_id), failed(job_id), succeeded(job_id, run=2), failed(job_id)):
            body, headers = signed(event)
            assert (await web.post("/hooks/pictures", content=body, headers=headers)).status_code == 204
    [row] = contents(sessions)
    assert (row.status, row.run) == ("succeeded", 2)
    sessions.kw["bind"].dispose()


def signed(event: Event) -> tuple[bytes, dict[str, str]]:
    body, now = event.encode(), datetime.now(UTC)
    signature = Webhook(SECRET).sign(event.id, now, body.decode())
    stamp = str(int(now.timestamp()))
    return body, {"webhook-id": event.id, "webhook-timestamp": stamp, "webhook-signature": signature}
