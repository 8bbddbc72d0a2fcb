"""The web application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response

from producer.gateway import errors, generate, health, jobs, openapi
from producer.gateway.access import Access
from producer.gateway.state import open_gateway
from producer.settings import ProducerSettings
from producer.waking import Wake

LIMIT_S = 140.0  # platforms cut HTTP calls at 150 s
_ABOUT = "Pictures by SDXL with LoRAs: a synchronous call over a queue, and the queue itself."


def create_app(
    settings: ProducerSettings, *, for_everybody: bool = False, limit_s: float = LIMIT_S, wake: Wake | None = None
) -> FastAPI:
    """The web application. It connects when it is used, not here.

    Without `settings.api_token` every call but `GET /health` is refused, unless it is `for_everybody`. A synchronous
    call lasts `limit_s` seconds at most. `wake` is called after a submission that leaves a job queued.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_gateway(settings, limit_s=limit_s, wake=wake) as app.state.gateway:
            yield

    app = FastAPI(
        title="modal-sdxl-lora",
        version="1",
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    guarded = [Depends(Access(settings.api_token, everybody=for_everybody))]
    app.include_router(health.router)
    app.include_router(generate.router, dependencies=guarded)
    app.include_router(jobs.router, dependencies=guarded)
    app.add_exception_handler(jobs.NothingMore, _nothing_more)
    errors.install(app)
    openapi.install(app)
    return app


async def _nothing_more(_request: Request, _error: Exception) -> Response:
    return Response(status_code=204)  # an EventSource stops at it
