"""`GET /health`, for load balancers and people. It needs fastapi, which the extra `modal` brings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError

from producer.backlog import read_backlog
from producer.queue import connect
from producer.settings import ProducerSettings
from schemas.keys import Keys


def create_app(settings: ProducerSettings) -> FastAPI:
    """The web application. It connects when it starts, not here."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.redis = connect(settings.redis_url.get_secret_value())
        yield
        await app.state.redis.aclose()

    app = FastAPI(title="modal-sdxl-lora", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        """200 with the backlog; 503 while Redis is out of reach. No consumer is no fault: they come with the work."""
        try:
            backlog = await read_backlog(request.app.state.redis, Keys(settings.prefix))
        except RedisError as error:
            return JSONResponse({"status": "unavailable", "error": type(error).__name__}, 503)
        return JSONResponse({"status": "ok", **backlog._asdict()})

    return app
