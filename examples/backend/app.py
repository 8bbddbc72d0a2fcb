"""The web application."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session, sessionmaker

from examples.backend.content import Tier, UnknownAvatar, order
from examples.backend.loops import running
from examples.backend.settings import BackendSettings
from examples.backend.tables import Content, open_sessions
from producer.storage import PresignedUrls
from schemas.fields import Text


class Order(BaseModel):
    """What a user asks for."""

    model_config = ConfigDict(extra="forbid")

    avatar_id: Annotated[Text, Field(max_length=64)]
    custom_prompt: Annotated[Text, Field(min_length=1, max_length=2000)]
    tier: Tier = Tier.STANDARD


class Ordered(BaseModel):
    content_id: str
    job_id: str
    status: str


class ContentView(Ordered):
    """How a content piece stands. With `failed`, `retry_after` says when another try can succeed; null: never."""

    avatar_id: str
    image_url: str | None
    image_sha256: str | None
    seed: int | None
    timings: dict[str, Any] | None
    error_code: str | None
    error: str | None
    retry_after: int | None


@dataclass(slots=True)
class Backend:
    """What the routes work with. `committed` tells the relay that there is something in the outbox."""

    settings: BackendSettings
    sessions: sessionmaker[Session]
    storage: PresignedUrls | None
    committed: asyncio.Event = field(default_factory=asyncio.Event)
    loops: list[asyncio.Task[None]] = field(default_factory=list)


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


Here = Annotated[Backend, Depends(_backend)]
router = APIRouter()


@router.post("/api/v1/content/generate", status_code=202)
async def generate(body: Order, here: Here) -> Ordered:
    """Answers as soon as the order is stored, whether or not the queue can be reached."""
    try:
        content = await asyncio.to_thread(
            order, here.sessions, body.avatar_id, body.custom_prompt, body.tier, timeout_s=here.settings.timeout_s
        )
    except UnknownAvatar:
        raise HTTPException(404, "no such avatar") from None
    here.committed.set()
    return Ordered(content_id=content.id, job_id=content.job_id, status=content.status)


@router.get("/api/v1/content/{content_id}")
async def show(content_id: Text, here: Here) -> ContentView:
    """The picture's URL is the public one where the bucket has one, else it is signed now, for an hour."""
    content = await asyncio.to_thread(_find, here.sessions, content_id)
    if content is None:
        raise HTTPException(404, "no such content")
    image_url = content.image_url
    if image_url is None and content.image_key is not None and here.storage is not None:
        image_url = here.storage.lora_url(content.image_key)
    return ContentView.model_validate({**vars(content), "content_id": content.id, "image_url": image_url})


@router.get("/health")
async def health(here: Here, response: Response) -> dict[str, bool]:
    """503 when a loop has ended, which only a defect does: let the platform start this process again."""
    works = not any(loop.done() for loop in here.loops)
    response.status_code = 200 if works else 503
    return {"works": works}


def create_app(settings: BackendSettings | None = None, *, loops: bool = True) -> FastAPI:
    """The application; without `loops`, relay and listener run elsewhere. Nothing connects before it starts."""
    settings = settings or BackendSettings()
    sessions = open_sessions(settings.database_url.get_secret_value())
    backend = Backend(settings, sessions, PresignedUrls.from_settings(settings))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            if loops:
                async with running(settings, sessions, backend.committed) as backend.loops:
                    yield
            else:
                yield
        finally:
            sessions.kw["bind"].dispose()

    app = FastAPI(title="Pictures of avatars", lifespan=lifespan)
    app.state.backend = backend
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _refused)
    return app


async def _refused(_: Request, error: Exception) -> Response:
    """FastAPI's own answer repeats the input, which not every text survives."""
    reports = error.errors() if isinstance(error, RequestValidationError) else []
    problems = [{"loc": report["loc"], "msg": report["msg"]} for report in reports]
    return Response(json.dumps({"detail": problems}), 422, media_type="application/json")


def _find(sessions: sessionmaker[Session], content_id: str) -> Content | None:
    with sessions() as session:
        return session.get(Content, content_id)
