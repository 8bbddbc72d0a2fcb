"""Which URLs may be opened: allow-lists of hosts and buckets, and the policy for addresses.

A URL is read once, by a pattern so narrow that no two parsers can differ about what it lets through.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Self
from urllib.parse import unquote, urlsplit

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
HTTPS_PORT = 443

_HOST = r"\[[0-9a-f:.]+\]|[a-z0-9.-]+"
_URL = re.compile(
    rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?(?P<path>/[^?#]*)?(?:\?[^#]*)?",
    re.IGNORECASE | re.ASCII,
)
_RULE = re.compile(
    rf"(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?(?:/(?P<bucket>[a-z0-9][a-z0-9._-]*))?/?", re.IGNORECASE | re.ASCII
)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
# The last label decides, as in the WHATWG URL standard: 0x7f.1 and 2130706433 are addresses to a libc.
_NUMERIC = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")
_PRINTABLE = re.compile(r"[!-\[\]-~]+")  # ASCII without space and backslash

# https://www.iana.org/assignments/iana-ipv4-special-registry, and what clouds keep for their own services.
_NOT_PUBLIC_V4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared address space; 100.100.100.200 is a metadata service
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
# Inside global unicast: protocol assignments with Teredo, documentation, 6to4 (which carries any IPv4 address).
_NOT_PUBLIC_V6 = tuple(IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))


class ForbiddenUrl(Exception):
    """A URL, or an address behind it, that may not be opened. The text never holds the URL's query."""


@dataclass(frozen=True, slots=True)
class HostRule:
    """One entry of an allow-list. `bucket` None: everything on that host; `port` None: the scheme's own."""

    host: str
    port: int | None = None
    bucket: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `host[:port][/bucket]`.

        Raises ValueError.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise ValueError(f"not host[:port][/bucket]: {text!r}")
        try:
            return cls(_read_host(match["host"]), _read_port(match["port"]), match["bucket"])
        except ForbiddenUrl as error:
            raise ValueError(f"not host[:port][/bucket]: {text!r}: {error}") from None

    def covers_host(self, host: str) -> bool:
        return host == self.host or self._is_bucket_host(host)

    def covers_path(self, host: str, path: str) -> bool:
        """Whether `path`, as written, names an object of the rule's bucket."""
        if self.bucket is None:
            return True
        prefix = "/" if self._is_bucket_host(host) else f"/{self.bucket}/"
        return path.startswith(prefix) and len(path) > len(prefix)

    def _is_bucket_host(self, host: str) -> bool:
        return self.bucket is not None and host == f"{self.bucket.lower()}.{self.host}"


@dataclass(frozen=True, slots=True)
class HostRules:
    """An allow-list. Without rules every URL is refused.

    `allow_loopback`: listed loopback hosts may be spoken to in plain http, on any port. `any_public`: there is no list,
    https to any public host will do, on its own port.
    """

    rules: tuple[HostRule, ...] = ()
    allow_loopback: bool = False
    any_public: bool = False

    @classmethod
    def own(cls, endpoint_url: str | None, bucket: str | None, *, allow_loopback: bool = False) -> Self:
        """The project's own endpoint and bucket: what is allowed where nothing else is said.

        Raises ValueError where `endpoint_url` is not a URL.
        """
        if endpoint_url is None or bucket is None:
            return cls((), allow_loopback)
        host = urlsplit(endpoint_url).netloc.rpartition("@")[2]
        return cls((HostRule.parse(f"{host}/{bucket}"),), allow_loopback)

    @classmethod
    def parse(cls, text: str | None, *, default: "HostRules") -> "HostRules":
        """Reads `host[:port][/bucket]` separated by commas; None gives `default`, whose `allow_loopback` holds anyway.

        Raises ValueError.
        """
        if text is None:
            return default
        entries = (entry.strip() for entry in text.split(","))
        return cls(tuple(HostRule.parse(entry) for entry in entries if entry), default.allow_loopback)

    def check(self, url: str) -> None:
        """Refuses every URL that this list does not allow; what its name resolves to is checked when connecting.

        Raises ForbiddenUrl.
        """
        scheme, host, port, path = _read_url(url)
        rules = [rule for rule in self._listed(host) if rule.covers_host(host)]
        if not rules:
            raise ForbiddenUrl(f"the host {host} is not on the allow-list")
        if self.any_public or not (self.allow_loopback and host in LOOPBACK_HOSTS):
            _check_https(scheme, host)
            _check_literal_address(host)
            rules = [rule for rule in rules if port == (rule.port or HTTPS_PORT)]
            if not rules:
                raise ForbiddenUrl(f"port {port} of {host} is not allowed")
        _check_no_dot_segments(path)
        if not any(rule.covers_path(host, path) for rule in rules):
            raise ForbiddenUrl(f"the path on {host} is outside the allowed buckets")

    def _listed(self, host: str) -> tuple[HostRule, ...]:
        if self.any_public:
            return (HostRule(host),)
        if not self.rules:
            raise ForbiddenUrl("no host is allowed: the allow-list is empty")
        return self.rules


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether `address` is global unicast and carries no other address inside.

    Not `is_global`: that is True for NAT64, 6to4, IPv4-compatible, site-local and multicast addresses.
    """
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _NOT_PUBLIC_V4)
    return (
        address.scope_id is None
        and address in _GLOBAL_UNICAST_V6
        and not any(address in block for block in _NOT_PUBLIC_V6)
    )


def check_addresses(host: str, addresses: Iterable[str], *, allow_loopback: bool) -> None:
    """Refuses a host any of whose addresses is not public; a loopback host may have loopback ones where allowed.

    Raises ForbiddenUrl.
    """
    may_loop = allow_loopback and host in LOOPBACK_HOSTS
    for text in addresses:
        address = ip_address(text)
        if not (is_public(address) or (may_loop and address.is_loopback)):
            raise ForbiddenUrl(f"{host} has the address {address}, which is not public")


def _read_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path, the first two in lower case."""
    match = _URL.fullmatch(url) if _PRINTABLE.fullmatch(url) else None
    if match is None:
        raise ForbiddenUrl("not a plain https URL")
    scheme = match["scheme"].lower()
    port = _read_port(match["port"]) or (80 if scheme == "http" else HTTPS_PORT)
    if scheme not in ("http", "https"):
        raise ForbiddenUrl(f"the scheme {scheme} is not allowed")
    return scheme, _read_host(match["host"]), port, match["path"] or "/"


def _read_host(text: str) -> str:
    host = text.lower()
    try:
        if host.startswith("["):
            return str(IPv6Address(host[1:-1]))
        if _NUMERIC.fullmatch(host):
            return str(IPv4Address(host))
    except AddressValueError:
        raise ForbiddenUrl(f"the host {host} is a number, but not an address as usually written") from None
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise ForbiddenUrl(f"the host {host} is not a host name")
    return host


def _read_port(text: str | None) -> int | None:
    if text is None:
        return None
    if not 1 <= int(text) <= 65535:
        raise ForbiddenUrl(f"there is no port {text}")
    return int(text)


def _check_https(scheme: str, host: str) -> None:
    if scheme != "https":
        raise ForbiddenUrl(f"{host} may be reached by https only")


def _check_literal_address(host: str) -> None:
    try:
        address = ip_address(host)
    except ValueError:
        return
    if not is_public(address):
        raise ForbiddenUrl(f"the address {host} is not public")


def _check_no_dot_segments(path: str) -> None:
    # Decoded until nothing changes: a server, or a proxy before it, may decode more than once.
    for _ in range(4):
        if any(segment in (".", "..") for segment in re.split(r"[/\\]", path)):
            raise ForbiddenUrl("the path has dot segments")
        decoded = unquote(path)
        if decoded == path:
            return
        path = decoded
    raise ForbiddenUrl("the path is encoded too many times over")
