"""What the tests of the example backend share: its settings, its database with one avatar, and its application."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from examples.backend.app import create_app
from examples.backend.settings import BackendSettings
from examples.backend.tables import PENDING, Avatar, Base, Content, LoraModel, OutboxEntry
from schemas.keys import Keys

_PATIENCE_S = 60.0  # a real consumer may still be starting

LORA = LoraModel(id="ann-2", trigger_word="ann woman", key="loras/ann.safetensors", scale=0.8, version="2")


def settings_for(redis_url: str, keys: Keys, database_url: str, **environment: Any) -> BackendSettings:
    values = {"REDIS_URL": redis_url, "SDXL_PREFIX": keys.prefix, "DATABASE_URL": database_url}
    return BackendSettings.model_validate({**values, "MODAL_POLL_SECONDS": 0.05, **environment})


def fill(sessions: sessionmaker[Session], lora: LoraModel = LORA) -> None:
    """The tables, and the avatars `ann`, who has a LoRA, and `tree`, which has none."""
    with sessions.begin() as session:
        Base.metadata.create_all(session.connection())
        session.merge(Avatar(id="ann", base_prompt="a portrait", lora_model=session.merge(lora)))
        session.merge(Avatar(id="tree", base_prompt="an old tree"))


def outbox(sessions: sessionmaker[Session]) -> Sequence[OutboxEntry]:
    with sessions() as session:
        return session.scalars(select(OutboxEntry).order_by(OutboxEntry.id)).all()


def contents(sessions: sessionmaker[Session]) -> Sequence[Content]:
    with sessions() as session:
        return session.scalars(select(Content).order_by(Content.id)).all()


@asynccontextmanager
async def serving(settings: BackendSettings, *, loops: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """The application at work, and whoever calls it."""
    app = create_app(settings, loops=loops)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://backend.example") as web,
    ):
        yield web


async def ordered(web: httpx.AsyncClient, prompt: str = "in the rain", **fields: Any) -> dict[str, Any]:
    answer = await web.post("/api/v1/content/generate", json={"avatar_id": "ann", "custom_prompt": prompt, **fields})
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def shown(web: httpx.AsyncClient, content_id: str, *, instead_of: str = PENDING) -> dict[str, Any]:
    """The content piece as soon as its status is another one."""
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            answer = await web.get(f"/api/v1/content/{content_id}")
            view: dict[str, Any] = answer.raise_for_status().json()
            if view["status"] != instead_of:
                return view
            await asyncio.sleep(0.02)


@contextmanager
def backend_process(environment: Mapping[str, str], folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m examples.backend`, killed at the block's end; its log goes to `folder`."""
    with (folder / "backend.log").open("ab") as log:
        command = [sys.executable, "-m", "examples.backend", *arguments]
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def logged(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(line["event"] == event for line in logs)
