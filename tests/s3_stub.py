"""A small S3 on loopback, in the test's own event loop, for what moto does not do.

It checks SigV4 and expiry, answers HEAD on a presigned GET with 403 as R2 does, and plays any reply that a test scripts
for a path: statuses, redirects, bodies that are slow, endless or cut short.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, quote, urlencode

from aiohttp import web
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

ACCESS_KEY = "stub-access-key"
SECRET_KEY = "stub-secret-key"
REGION = "auto"
STAMP = "%Y%m%dT%H%M%SZ"

Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Seen:
    """A request as it came in; `path` is decoded, `query` is not."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class StoredObject:
    """`metadata`: the headers `x-amz-meta-*`, as they came."""

    body: bytes
    content_type: str = "application/octet-stream"
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.body, usedforsecurity=False).hexdigest()}"'


@dataclass
class S3Stub:
    """`url` has no path; `objects` are keyed by path (`/bucket/key`); `seen` is every request in order, `signatures`
    those of all URLs that were signed here.

    `trouble`: what every request gets while it is set, whatever its path.
    """

    url: str = ""
    objects: dict[str, StoredObject] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    signatures: set[str] = field(default_factory=set)
    trouble: Reply | None = None
    _scripts: dict[str, deque[Reply]] = field(default_factory=dict)

    def put(self, path: str, body: bytes) -> None:
        self.objects[path] = StoredObject(body)

    def answer(self, path: str, *replies: Reply) -> None:
        """Scripts the replies to requests for `path`, in order; the last one stays."""
        self._scripts[path] = deque(replies)

    def presign(self, method: str, path: str, *, expires_s: int = 300, at: datetime | None = None) -> str:
        """A SigV4 URL as boto3 makes it, signed at any time."""
        stamp = (at or datetime.now(UTC)).strftime(STAMP)
        query = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{ACCESS_KEY}/{stamp[:8]}/{REGION}/s3/aws4_request",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(expires_s),
            "X-Amz-SignedHeaders": "host",
        }
        url = f"{self.url}{quote(path)}?{urlencode(query)}"
        signature = _signature(method, url, stamp, {})
        self.signatures.add(signature)
        return f"{url}&X-Amz-Signature={signature}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        path, query = request.path, request.raw_path.partition("?")[2]
        self.seen.append(Seen(request.method, path, query, dict(request.headers), body))
        if script := self._scripts.get(path):
            reply = script.popleft() if len(script) > 1 else script[0]
            return await reply(request)
        if self.trouble is not None:
            return await self.trouble(request)
        return await self.obey(request)

    async def obey(self, request: web.Request) -> web.Response:
        """What an S3 does."""
        body = await request.read()
        refusal = _refusal(request)
        if refusal is not None:
            return web.Response(status=403, text=f"<Error><Code>{refusal}</Code></Error>")
        if request.method == "PUT":
            return self._store(request, body)
        return self._load(request)

    def _store(self, request: web.Request, body: bytes) -> web.Response:
        there = self.objects.get(request.path)
        if request.headers.get("If-None-Match") == "*" and there is not None:
            return web.Response(status=412)
        wanted = request.headers.get("If-Match")
        if wanted is not None and (there is None or there.etag.strip('"') != wanted.strip('"')):
            return web.Response(status=412)
        metadata = {name: value for name, value in request.headers.items() if name.lower().startswith("x-amz-meta-")}
        stored = StoredObject(body, request.content_type, metadata)
        self.objects[request.path] = stored
        return web.Response(headers={"ETag": stored.etag})

    def _load(self, request: web.Request) -> web.Response:
        stored = self.objects.get(request.path)
        if stored is None:
            return web.Response(status=404)
        if request.headers.get("If-None-Match") == stored.etag:
            return web.Response(status=304, headers={"ETag": stored.etag})
        return web.Response(body=stored.body, headers={"ETag": stored.etag, **stored.metadata})


@asynccontextmanager
async def running_stub() -> AsyncIterator[S3Stub]:
    """A stub that listens on a port of its own."""
    stub = S3Stub()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", stub.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield stub
    finally:
        await runner.cleanup()


def status(code: int, **headers: str) -> Reply:
    """An empty answer; underscores in the headers' names stand for dashes."""

    async def reply(request: web.Request) -> web.Response:
        return web.Response(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return reply


def content(body: bytes, **headers: str) -> Reply:
    """200 with `body`, whoever asks, and whether it is known already."""

    async def reply(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return reply


def truncated(body: bytes, sent: int) -> Reply:
    """Promises the whole body, sends its first `sent` bytes, and hangs up."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body)), "ETag": '"t"'})
        await response.prepare(request)
        await response.write(body[:sent])
        hang_up(request)
        return response

    return reply


def slow(pause_s: float) -> Reply:
    """One byte after every pause, for as long as somebody listens."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(pause_s)

    return reply


def endless() -> Reply:
    """Zeros without an end, and without a length."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))
            await asyncio.sleep(0)

    return reply


def silence() -> Reply:
    """No answer at all, for as long as somebody waits."""

    async def reply(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    return reply


def reset() -> Reply:
    """Hangs up instead of answering."""

    async def reply(request: web.Request) -> web.StreamResponse:
        hang_up(request)
        return web.Response()

    return reply


def hang_up(request: web.Request) -> None:
    """Resets the connection, whatever was sent."""
    if request.transport is not None:
        request.transport.abort()


def _refusal(request: web.Request) -> str | None:
    """S3's error code for a request that is not signed, by its query or by a header, or no longer."""
    if "Authorization" in request.headers:
        return _header_refusal(request)
    query = dict(parse_qsl(request.query_string))
    given = query.pop("X-Amz-Signature", None)
    if given is None:
        return "AccessDenied"
    url = f"http://{request.host}{request.rel_url.raw_path}?{urlencode(query)}"
    headers = {name: request.headers.get(name, "") for name in query["X-Amz-SignedHeaders"].split(";")}
    if _signature(request.method, url, query["X-Amz-Date"], headers) != given:
        return "SignatureDoesNotMatch"
    signed = datetime.strptime(query["X-Amz-Date"], STAMP).replace(tzinfo=UTC)
    if datetime.now(UTC) > signed + timedelta(seconds=int(query["X-Amz-Expires"])):
        return "AccessDenied"
    return None


def _header_refusal(request: web.Request) -> str | None:
    """A client with credentials signs the headers that it names, the body's digest among them."""
    parts = dict(part.strip().split("=", 1) for part in request.headers["Authorization"].split(" ", 1)[1].split(","))
    headers = {name: request.headers.get(name, "") for name in parts["SignedHeaders"].split(";")}
    auth = S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION)
    signed = AWSRequest(method=request.method, url=f"http://{request.host}{request.raw_path}", headers=headers)
    signed.context["timestamp"] = request.headers["X-Amz-Date"]
    signed.context["payload_signing_enabled"] = True
    digest = request.headers["X-Amz-Content-SHA256"]
    canonical = auth.canonical_request(signed).rsplit("\n", 1)[0] + "\n" + digest
    expected = auth.signature(auth.string_to_sign(signed, canonical), signed)
    return None if expected == parts["Signature"] else "SignatureDoesNotMatch"


def _signature(method: str, url: str, stamp: str, headers: dict[str, str]) -> str:
    auth = S3SigV4QueryAuth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", REGION)
    request = AWSRequest(method=method, url=url, headers=headers)
    request.context["timestamp"] = stamp
    signature: str = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    return signature
