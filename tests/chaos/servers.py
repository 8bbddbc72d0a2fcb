"""The servers that a test plays itself, in a thread with an event loop of their own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from tests.chaos.proxy import Proxy, running_proxy
from tests.s3_stub import S3Stub, running_stub

_PATIENCE_S = 60.0


@contextmanager
def servers_in_a_thread(redis_port: int) -> Iterator[tuple[S3Stub, Proxy]]:
    """The servers that this process plays, in an event loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="servers")
    thread.start()
    servers = AsyncExitStack()

    async def start() -> tuple[S3Stub, Proxy]:
        store = await servers.enter_async_context(running_stub())
        return store, await servers.enter_async_context(running_proxy(redis_port))

    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result(_PATIENCE_S)
    finally:
        asyncio.run_coroutine_threadsafe(servers.aclose(), loop).result(_PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
