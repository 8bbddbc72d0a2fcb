"""URLs that must not be opened, each with the outcome of a job that names it as its LoRA's."""

import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from schemas.net.urls import HostRules
from tests.unit.bad_inputs.kit import CANARY, FORBIDDEN, NOW, REFUSED, Outcome

HOST = "account.r2.example"
# valid when it is looked at: nothing but where it leads is wrong with such a URL
SIGNATURE = f"?X-Amz-Date={NOW:%Y%m%dT%H%M%SZ}&X-Amz-Expires=300&X-Amz-Signature={CANARY}"
OWN = HostRules.own(f"https://{HOST}", "loras")

_ADDRESSES = """
    2130706433 0x7f.1 0177.0.0.1 127.1 [::1] [::ffff:127.0.0.1] [64:ff9b::a9fe:a9fe] [2002:7f00:1::]
    [::127.0.0.1] [fec0::1] [fe80::1] [ff02::1] 169.254.169.254 100.100.100.200 168.63.129.16 224.0.0.1
    0.0.0.0
"""
_MORE_ADDRESSES = """
    127.0.0.1 0x7f000001 017700000001 10.0.0.1 172.16.0.1 192.168.0.1 255.255.255.255 [::]
    [0:0:0:0:0:ffff:7f00:1] [::ffff:a9fe:a9fe] [64:ff9b:1::1] [2001::1] [fd00:ec2::254]
"""
ADDRESSES = _ADDRESSES.split()
MORE_ADDRESSES = _MORE_ADDRESSES.split()
NUMBERS_THAT_NO_LIST_CAN_NAME = {"2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0x7f000001", "017700000001"}

CATALOGUE: dict[str, tuple[str, Outcome]] = {
    "file": (f"file:///etc/passwd{SIGNATURE}", FORBIDDEN),
    "ftp": (f"ftp://{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "gopher": (f"gopher://{HOST}:70/loras/a{SIGNATURE}", FORBIDDEN),
    "data": (f"data:application/octet-stream;base64,AAAA{SIGNATURE}", FORBIDDEN),
    "javascript": (f"javascript:alert(1){SIGNATURE}", FORBIDDEN),
    "http": (f"http://{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "userinfo": (f"https://user:password@{HOST}/loras/a{SIGNATURE}", REFUSED),
    "port 22": (f"https://{HOST}:22/loras/a{SIGNATURE}", FORBIDDEN),
    "a backslash before an at sign": (f"https://evil.example\\@{HOST}/loras/a{SIGNATURE}", REFUSED),
    "a hash before an at sign": (f"https://evil.example#@{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "the host as a prefix": (f"https://{HOST}.evil.example/loras/a{SIGNATURE}", FORBIDDEN),
    "the host in the query": (f"https://evil.example/{SIGNATURE}&https://{HOST}/loras/a", FORBIDDEN),
    "a trailing dot": (f"https://{HOST}./loras/a{SIGNATURE}", FORBIDDEN),
    "another host in upper case": (f"HTTPS://EVIL.EXAMPLE/loras/a{SIGNATURE}", FORBIDDEN),
    "an escaped slash in the host": (f"https://evil.example%2f{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "other digits": (f"https://\uff11\uff12\uff17.0.0.1/loras/a{SIGNATURE}", REFUSED),
    "a homoglyph": (f"https://\u0430ccount.r2.example/loras/a{SIGNATURE}", REFUSED),
    **{f"the host {host}": (f"https://{host}/loras/a{SIGNATURE}", FORBIDDEN) for host in ADDRESSES},
    "another bucket": (f"https://{HOST}/other/a{SIGNATURE}", FORBIDDEN),
}
MORE: dict[str, tuple[str, Outcome]] = {
    **{f"the host {host}": (f"https://{host}/loras/a{SIGNATURE}", FORBIDDEN) for host in MORE_ADDRESSES},
    "a zone": (f"https://[fe80::1%25eth0]/loras/a{SIGNATURE}", FORBIDDEN),
    "a scheme in upper case": (f"FILE:///etc/passwd{SIGNATURE}", FORBIDDEN),
    "blob": (f"blob:https://{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "websocket": (f"wss://{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "s3": (f"s3://loras/a{SIGNATURE}", FORBIDDEN),
    "http on the port of https": (f"http://{HOST}:443/loras/a{SIGNATURE}", FORBIDDEN),
    "port 80": (f"https://{HOST}:80/loras/a{SIGNATURE}", FORBIDDEN),
    "port 0": (f"https://{HOST}:0/loras/a{SIGNATURE}", FORBIDDEN),
    "port 65536": (f"https://{HOST}:65536/loras/a{SIGNATURE}", REFUSED),
    "a hash after the host": (f"https://{HOST}#@evil.example/loras/a{SIGNATURE}", FORBIDDEN),
    "a fragment": (f"https://{HOST}/loras/a{SIGNATURE}#fragment", FORBIDDEN),
    "two at signs": (f"https://evil.example@{HOST}@evil.example/loras/a{SIGNATURE}", REFUSED),
    "an escaped at sign": (f"https://evil.example%40{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "the host as a suffix": (f"https://evil{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "a subdomain": (f"https://evil.{HOST}/loras/a{SIGNATURE}", FORBIDDEN),
    "a parent domain": (f"https://r2.example/loras/a{SIGNATURE}", FORBIDDEN),
    "localhost": (f"https://localhost/loras/a{SIGNATURE}", FORBIDDEN),
    "a wide full stop": (f"https://account\u3002r2\u3002example/loras/a{SIGNATURE}", REFUSED),
    "punycode": (f"https://xn--ccount-8nf.r2.example/loras/a{SIGNATURE}", FORBIDDEN),
    "two slashes too many": (f"https:////{HOST}/loras/a{SIGNATURE}", REFUSED),
    "no host": (f"https:///loras/a{SIGNATURE}", REFUSED),
    "an address that is not closed": (f"https://[::1/loras/a{SIGNATURE}", REFUSED),
    "a space": (f"https://{HOST}/loras/a b{SIGNATURE}", REFUSED),
    "a tab in the scheme": (f"ht\ttps://{HOST}/loras/a{SIGNATURE}", REFUSED),
    "a newline": (f"https://{HOST}/loras/a\n{SIGNATURE}", REFUSED),
    "a NUL": (f"https://{HOST}/loras/a\0{SIGNATURE}", REFUSED),
    "an empty URL": ("", REFUSED),
    "a path": ("/loras/a", REFUSED),
    "climbing out of the bucket": (f"https://{HOST}/loras/../other/a{SIGNATURE}", FORBIDDEN),
    "climbing out, escaped": (f"https://{HOST}/loras/%2e%2e/other/a{SIGNATURE}", FORBIDDEN),
    "climbing out, escaped twice": (f"https://{HOST}/loras/%252e%252e/other/a{SIGNATURE}", FORBIDDEN),
    "an escaped bucket": (f"https://{HOST}/%6coras/a{SIGNATURE}", FORBIDDEN),
    "the bucket in upper case": (f"https://{HOST}/LORAS/a{SIGNATURE}", FORBIDDEN),
    "a bucket that begins alike": (f"https://{HOST}/loras-of-others/a{SIGNATURE}", FORBIDDEN),
    "no object": (f"https://{HOST}/loras/{SIGNATURE}", FORBIDDEN),
}
URLS = CATALOGUE | MORE


class NoNames(AbstractResolver):
    """Knows no name, and notes which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def close(self) -> None:
        return
