"""`GET /health`, for load balancers and people."""

import asyncio
from typing import Any

import structlog
from fastapi import APIRouter, Response
from redis.exceptions import RedisError

from producer.backlog import read_backlog
from producer.gateway.answers import ErrorAnswer, Health
from producer.gateway.errors import RETRY_UNAVAILABLE_S, GatewayError, GatewayErrorCode
from producer.gateway.state import TheGateway

_LOOK_S = 5.0

log = structlog.get_logger(__name__)
router = APIRouter()


_STUCK = {"status": "unavailable", "backlog": 3, "live_consumers": 0, "oldest_waiting_seconds": 171.5}
_UNAVAILABLE: dict[str, Any] = {
    "model": Health | ErrorAnswer,
    "description": "Nothing can be served",
    "content": {"application/json": {"example": _STUCK}},
}


@router.get("/health", responses={503: _UNAVAILABLE})
async def health(gateway: TheGateway, response: Response) -> Health:
    """How much waits, and who is there for it.

    503 while Redis is out of reach, or while something has waited for longer than any call lasts and no consumer lives.
    An empty queue without consumers is healthy: they come with the work.
    """
    try:
        async with asyncio.timeout(_LOOK_S):
            found = await read_backlog(gateway.redis, gateway.keys)
    except (RedisError, TimeoutError) as error:
        log.warning("redis_out_of_reach", error=type(error).__name__)
        raise GatewayError(
            GatewayErrorCode.UNAVAILABLE, "Redis is out of reach", retry_after=RETRY_UNAVAILABLE_S
        ) from None
    stuck = found.live_consumers == 0 and found.oldest_waiting_s > gateway.limit_s
    if stuck:
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
    return Health(
        status="unavailable" if stuck else "ok",
        backlog=found.waiting,
        live_consumers=found.live_consumers,
        oldest_waiting_seconds=round(found.oldest_waiting_s, 3),
    )
