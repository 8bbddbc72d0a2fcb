"""What a client keeps of a Redis that fails under it."""

import pytest
from redis.exceptions import RedisError

from demo.servers import RedisServer
from schemas.keys import Keys
from tests.chaos.proxy import running_proxy
from tests.integration.client_kit import a_client

REPETITIONS = 4  # the first time, and those of redis-py


async def test_a_submission_that_fails_gives_its_connection_back(redis_at: RedisServer, keys: Keys) -> None:
    """Guards `async with` in ProducerQueue.submit: each failure while the script is looked up kept a connection."""
    async with running_proxy(redis_at.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0?max_connections=1&timeout=1"
        async with a_client(url, keys) as client:
            lost = proxy.add(b"SCRIPT", "reset", times=REPETITIONS)
            with pytest.raises(RedisError):
                await client.submit(job_id="job-1", prompt="a red fox")
            assert lost.met == REPETITIONS
            assert not (await client.submit(job_id="job-1", prompt="a red fox")).duplicate
