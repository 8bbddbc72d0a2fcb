"""A TCP proxy on loopback that delays, drops, resets, slices and swallows what passes between client and server."""

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

# reset: the request is not forwarded, and the connection is reset. swallow: it is forwarded, and the connection reset
# when the reply comes. hang: it is forwarded, and nothing comes back, nor is anything closed. answer: `reply` comes
# back in the server's place, once for each command of the protocol of Redis.
Action = Literal["reset", "swallow", "hang", "answer"]

_COMMAND = re.compile(rb"(?:^|\r\n)\*[0-9]+(?=\r\n\$)")


@dataclass
class Rule:
    """What happens to requests that contain `needle`, the next `times` times."""

    needle: bytes
    action: Action
    times: int = 1
    reply: bytes = b""
    met: int = 0


@dataclass
class Proxy:
    """Everything may be changed at any time, from any thread: what passes next is treated so."""

    server_port: int
    port: int = 0
    is_down: bool = False
    is_frozen: bool = False
    delay_s: float = 0.0
    slice_replies: bool = False
    rules: list[Rule] = field(default_factory=list)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop | None = None

    def add(self, needle: bytes, action: Action, times: int = 1, reply: bytes = b"") -> Rule:
        rule = Rule(needle, action, times, reply)
        self.rules.append(rule)
        return rule

    def disconnect_all(self) -> None:
        """Ends every connection there is."""
        assert self._loop is not None
        for connection in list(self._connections):
            self._loop.call_soon_threadsafe(connection.cancel)

    @property
    def is_connected(self) -> bool:
        return bool(self._connections)

    def heal(self) -> None:
        self.is_down = self.is_frozen = self.slice_replies = False
        self.delay_s = 0.0
        self.rules.clear()
        self.disconnect_all()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if not self.is_down:
                await _Connection(self, reader, writer).run()
        except (OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(task)
            _reset(writer)

    def rule_for(self, request: bytes) -> Rule | None:
        for rule in self.rules:
            if rule.met < rule.times and rule.needle in request:
                rule.met += 1
                return rule
        return None


class _Connection:
    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._is_muted = False
        self._resets_at_reply = False

    async def run(self) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._proxy.server_port)
        ways = [
            asyncio.ensure_future(self._requests(server_writer)),
            asyncio.ensure_future(self._replies(server_reader)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            server_writer.close()

    async def _requests(self, server: asyncio.StreamWriter) -> None:
        while request := await self._reader.read(1 << 20):
            await self._pass_time()
            rule = self._proxy.rule_for(request)
            if rule is not None and rule.action == "reset":
                return
            if rule is not None and rule.action == "answer":
                self._writer.write(rule.reply * max(1, len(_COMMAND.findall(request))))
                continue
            if rule is not None:
                self._is_muted = True
                self._resets_at_reply = rule.action == "swallow"
            server.write(request)
            await server.drain()

    async def _replies(self, server: asyncio.StreamReader) -> None:
        while reply := await server.read(1 << 20):
            await self._pass_time()
            if self._resets_at_reply:
                return
            if self._is_muted:
                continue
            pieces = [reply[i : i + 1] for i in range(len(reply))] if self._proxy.slice_replies else [reply]
            for piece in pieces:
                self._writer.write(piece)
                await self._writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0)

    async def _pass_time(self) -> None:
        if self._proxy.delay_s:
            await asyncio.sleep(self._proxy.delay_s)
        while self._proxy.is_frozen:
            await asyncio.sleep(0.05)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST, as a host that has lost the connection does."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def running_proxy(server_port: int) -> AsyncIterator[Proxy]:
    """A proxy in front of `server_port`, on a port of its own."""
    proxy = Proxy(server_port, _loop=asyncio.get_running_loop())
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.disconnect_all()
        while proxy.is_connected:
            await asyncio.sleep(0.01)
