"""`serve`: the HTTP gateway."""

import importlib.util
import ipaddress
import socket
from functools import partial
from typing import Annotated

import typer
from rich.text import Text

from producer.cli import output
from producer.cli.command import AsJson, BadUsage, Status, checked_settings
from producer.queue import connect
from producer.storage import PresignedUrls

Host = Annotated[str, typer.Option(help="Where to listen. Without MODAL_API_TOKEN only on a loopback address.")]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one.")]


async def serve(host: Host = "127.0.0.1", port: Port = 8000, as_json: AsJson = False) -> Status:
    """Serve the HTTP contract of synchronous backends, and the queue, until a signal comes."""
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise BadUsage("the gateway needs fastapi and uvicorn: pip install '.[gateway]'")
    from producer.gateway import create_app
    from producer.gateway.server import run

    with checked_settings() as settings:
        connect(settings.redis_url.get_secret_value())  # nothing connects yet: is it a URL?
    if settings.api_token is None:
        _check_loopback(host)
        output.note("MODAL_API_TOKEN is not set: everybody on this machine may call")
    if PresignedUrls.from_settings(settings) is None:
        output.note("the storage settings (R2_…) are not complete: POST /generate-image answers 503")
    listening = _listen(host, port)
    app = create_app(settings, for_everybody=settings.api_token is None)
    await run(app, listening, partial(_tell, host, listening.getsockname()[1], as_json=as_json))
    return Status.OK


def _check_loopback(host: str) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise BadUsage(f"without MODAL_API_TOKEN nobody may call from elsewhere: set it, or leave {host}")


def _listen(host: str, port: int) -> socket.socket:
    """Raises BadUsage where somebody else listens there, or nobody can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address, family=family)
    except OSError as error:
        raise BadUsage(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    # asyncio does it for sockets of its own making alone; without it many an answer waits 40 ms for an acknowledgement
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _tell(host: str, port: int, *, as_json: bool) -> None:
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if as_json:
        output.print_json({"url": url})
    else:
        output.print_line(Text(f"serving on {url}"))
