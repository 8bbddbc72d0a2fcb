"""A webhook receiver that speaks TLS, with a certificate for another name until it is mended."""

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class TlsReceiver:
    """`trusted`: a file of certificates (for SSL_CERT_FILE) with which it can be believed once it is mended."""

    folder: Path
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    @property
    def trusted(self) -> Path:
        return self.folder / "trusted.pem"

    def prepare(self) -> None:
        names = {"wrong": "DNS:elsewhere.example", "right": "IP:127.0.0.1"}
        for name, subject in names.items():
            self._make_certificate(name, subject)
        self.trusted.write_text("".join((self.folder / f"{name}.pem").read_text() for name in names))
        self._use("wrong")

    def mend(self) -> None:
        """From the next connection on its certificate is the right one."""
        self._use("right")

    def _use(self, name: str) -> None:
        self.context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")

    def _make_certificate(self, name: str, subject: str) -> None:
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("no openssl to make certificates with")
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
        what = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={subject}", "-days", "1", "-out", f"{name}.pem"]
        subprocess.run([openssl, "req", "-x509", *key, *what], cwd=self.folder, check=True, capture_output=True)


@contextmanager
def a_tls_receiver(folder: Path) -> Iterator[TlsReceiver]:
    receiver = TlsReceiver(folder)
    receiver.prepare()

    def take(request: BaseHTTPRequestHandler) -> None:
        receiver.bodies.append(request.rfile.read(int(request.headers["Content-Length"])))
        request.send_response(204)
        request.end_headers()

    def say_nothing(*_: object) -> None:
        """BaseHTTPRequestHandler would write to stderr."""

    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_POST": take, "log_message": say_nothing})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = receiver.context.wrap_socket(server.socket, server_side=True)
        receiver.url = f"https://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, name="tls receiver")
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
