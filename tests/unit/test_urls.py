"""Allow-lists of hosts and buckets, the policy for addresses, and what a presigned URL says about its lifetime."""

import re
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from consumer.presigned import Lifetime, read_lifetime
from schemas.net.urls import ForbiddenUrl, HostRule, HostRules, check_addresses, is_public

HOST = "acc.r2.example.com"
OWN = HostRules.own(f"https://{HOST}", "loras")
LOOPBACK = HostRules.own("http://127.0.0.1:9000", "loras", allow_loopback=True)


def refusal(rules: HostRules, url: str) -> str:
    with pytest.raises(ForbiddenUrl) as caught:
        rules.check(url)
    return str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"https://{HOST}/loras/a.safetensors?X-Amz-Signature=s3cr3t",
        f"https://{HOST}:443/loras/a.safetensors",
        f"HTTPS://{HOST.upper()}/loras/a.safetensors",
        f"https://loras.{HOST}/a.safetensors",
        f"https://{HOST}/loras/deep/a%20b%2Fc.safetensors",
        f"https://{HOST}/loras//two-slashes.safetensors",
        f"https://{HOST}/loras/100%25.safetensors",
        f"https://{HOST}/loras/a..b.safetensors",
        f"https://{HOST}/loras/user@place.safetensors",
    ],
)
def test_urls_of_the_own_bucket_are_allowed(url: str) -> None:
    OWN.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        f"ftp://{HOST}/loras/a",
        f"gopher://{HOST}:70/loras/a",
        "data:text/plain,hello",
        "javascript:alert(1)",
        f"http://{HOST}/loras/a",
        f"https://user:password@{HOST}/loras/a",
        f"https://{HOST}:22/loras/a",
        f"https://{HOST}:0/loras/a",
        f"https://{HOST}:99999/loras/a",
        f"https://{HOST}:/loras/a",
        f"https://evil.example\\@{HOST}/loras/a",
        f"https://evil.example#@{HOST}/loras/a",
        f"https://{HOST}#@evil.example/loras/a",
        f"https://{HOST}/loras/a#fragment",
        f"https://{HOST}.evil.example/loras/a",
        f"https://evil{HOST}/loras/a",
        f"https://evil.example/?{HOST}/loras/a",
        f"https://{HOST}./loras/a",
        f"https://{HOST}%2f.evil.example/loras/a",
        "https://acc.r2.example%2ecom/loras/a",
        "https://acc.r２.example.com/loras/a",
        "https://аcc.r2.example.com/loras/a",
        "https://acc。r2。example。com/loras/a",
        f"https://{HOST}/loras/a b",
        f"https://{HOST}/loras/a\n",
        f"https:/{HOST}/loras/a",
        f"//{HOST}/loras/a",
        f"https:{HOST}/loras/a",
        "https://[::1/loras/a",
        "https:///loras/a",
        "",
    ],
)
def test_urls_of_a_forbidden_scheme_host_port_or_shape_are_refused(url: str) -> None:
    refusal(OWN, url)


@pytest.mark.parametrize(
    "path",
    [
        "/other/a",
        "/loras-of-others/a",
        "/LORAS/a",
        "/loras",
        "/loras/",
        "/",
        "",
        "//loras/a",
        "//other/loras/a",
        "/other%2f../loras/a",
        "/other/../loras/a",
        "/loras/../other/a",
        "/loras/./a",
        "/loras/..",
        "/loras/%2e%2e/other/a",
        "/loras/%2E./other/a",
        "/loras/..%2fother/a",
        "/loras/..%5cother/a",
        "/loras/%252e%252e/other/a",
        "/loras/%25252e%25252e%25252f/other/a",
        "/loras%2fa",
        "/l%6fras/a",
        "/%6coras/a",
        "/?/loras/a",
    ],
)
def test_paths_outside_the_bucket_are_refused(path: str) -> None:
    refusal(OWN, f"https://{HOST}{path}")


@pytest.mark.parametrize("path", ["/../a", "/%2e%2e/other/a", "/", ""])
def test_a_virtual_hosted_bucket_takes_keys_only(path: str) -> None:
    refusal(OWN, f"https://loras.{HOST}{path}")


LITERAL_ADDRESSES = """
    2130706433 0x7f.1 0x7f000001 0177.0.0.1 127.1 127.0.0.1 0.0.0.0 169.254.169.254 100.100.100.200
    168.63.129.16 224.0.0.1 8.8.8.8 [::1] [::ffff:127.0.0.1] [64:ff9b::a9fe:a9fe] [2002:7f00:1::]
    [::127.0.0.1] [fec0::1] [fe80::1] [fe80::1%25eth0] [ff02::1] [2606:4700::1111]
"""


@pytest.mark.parametrize("host", LITERAL_ADDRESSES.split())
def test_addresses_are_no_hosts_unless_they_are_listed(host: str) -> None:
    refusal(OWN, f"https://{host}/loras/a")


def test_a_listed_public_address_is_allowed_and_a_listed_private_one_is_not() -> None:
    rules = HostRules.parse("8.8.8.8, 10.0.0.5, 127.0.0.1, [2606:4700::1111]:8443, [::1]", default=HostRules())
    rules.check("https://8.8.8.8/a")
    rules.check("https://[2606:4700:0::1111]:8443/a")
    assert "not public" in refusal(rules, "https://10.0.0.5/a")
    assert "not public" in refusal(rules, "https://127.0.0.1/a")
    assert "not public" in refusal(rules, "https://[::1]/a")


NOT_PUBLIC = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.9.9.9 168.63.129.16 169.254.169.254
    172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1
    203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:8.8.8.8
    ::ffff:127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::808:808 64:ff9b:1::1 100::1 2001::1 2001:2::1 2001:db8::1
    2002:7f00:1:: 2002:808:808::1 3fff::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700::1%eth0 fec0::1
    ff02::1 5f00::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_an_address_that_is_not_global_unicast_or_carries_another_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "100.63.0.1", "172.32.0.1", "168.63.129.17", "2606:4700::1111", "2a00:1450::1"]
)
def test_an_ordinary_address_is_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_one_private_address_among_public_ones_refuses_the_host() -> None:
    check_addresses(HOST, ["8.8.8.8", "2606:4700::1111"], allow_loopback=False)
    with pytest.raises(ForbiddenUrl, match=r"169\.254\.169\.254, which is not public"):
        check_addresses(HOST, ["8.8.8.8", "169.254.169.254"], allow_loopback=False)


def test_loopback_addresses_are_for_loopback_hosts_alone_and_only_where_allowed() -> None:
    check_addresses("localhost", ["127.0.0.1", "::1"], allow_loopback=True)
    for host, addresses, allowed in [
        ("localhost", ["127.0.0.1"], False),
        (HOST, ["127.0.0.1"], True),
        ("localhost", ["127.0.0.1", "10.0.0.1"], True),
    ]:
        with pytest.raises(ForbiddenUrl):
            check_addresses(host, addresses, allow_loopback=allowed)


@pytest.mark.parametrize("port", [80, 9000, 41234])
def test_a_listed_loopback_host_may_be_spoken_to_in_plain_http_on_any_port(port: int) -> None:
    LOOPBACK.check(f"http://127.0.0.1:{port}/loras/a")


@pytest.mark.parametrize(
    "url", ["http://localhost/loras/a", "http://[::1]/loras/a", "http://127.0.0.2/loras/a", "http://127.0.0.1/other/a"]
)
def test_loopback_means_the_listed_host_and_bucket_only(url: str) -> None:
    refusal(LOOPBACK, url)


def test_loopback_is_refused_without_the_flag_though_it_be_the_own_endpoint() -> None:
    rules = HostRules.own("http://127.0.0.1:9000", "loras")
    assert "https only" in refusal(rules, "http://127.0.0.1:9000/loras/a")


def test_plain_http_stays_forbidden_for_other_hosts_where_loopback_is_allowed() -> None:
    rules = HostRules.parse(f"{HOST},127.0.0.1", default=LOOPBACK)
    assert "https only" in refusal(rules, f"http://{HOST}/a")
    rules.check("http://127.0.0.1:1/a")


def test_a_port_in_a_rule_is_the_only_one() -> None:
    rules = HostRules.parse(f"{HOST}:8443/loras", default=HostRules())
    rules.check(f"https://{HOST}:8443/loras/a")
    assert "port 443" in refusal(rules, f"https://{HOST}/loras/a")


def test_a_port_and_a_bucket_must_be_of_the_same_rule() -> None:
    rules = HostRules.parse(f"{HOST}:8443/one,{HOST}/two", default=HostRules())
    assert "outside the allowed buckets" in refusal(rules, f"https://{HOST}:8443/two/a")


def test_an_empty_list_refuses_everything_and_says_so() -> None:
    for rules in (HostRules(), HostRules.own(None, "loras"), HostRules.own(f"https://{HOST}", None)):
        assert "allow-list is empty" in refusal(rules, f"https://{HOST}/loras/a")
    assert "allow-list is empty" in refusal(HostRules.parse(" , ", default=OWN), f"https://{HOST}/loras/a")


ANY_PUBLIC = HostRules(any_public=True)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/sdxl",
        "https://hooks.example.com",
        "https://hooks.example.com/",
        "https://HOOKS.example.com:443/deep/er?a=b",
        "https://8.8.8.8/hook",
        "https://[2606:4700::1111]/hook",
    ],
)
def test_where_any_public_host_will_do_https_to_it_is_allowed(url: str) -> None:
    ANY_PUBLIC.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/sdxl",
        "https://hooks.example.com:8443/sdxl",
        "https://hooks.example.com:80/sdxl",
        "https://user@hooks.example.com/sdxl",
        "https://hooks.example.com/a/../b",
        "https://127.0.0.1/hook",
        "https://[::1]/hook",
        "https://2130706433/hook",
        "https://169.254.169.254/latest/meta-data",
        "ftp://hooks.example.com/sdxl",
        "",
    ],
)
def test_where_any_public_host_will_do_nothing_else_is_allowed(url: str) -> None:
    refusal(ANY_PUBLIC, url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/hook", "http://localhost/hook", "https://127.0.0.1/hook"])
def test_a_loopback_host_that_is_not_listed_is_never_any_public_host(url: str) -> None:
    refusal(HostRules(any_public=True, allow_loopback=True), url)


def test_a_rule_without_a_bucket_covers_the_whole_host() -> None:
    rules = HostRules.parse(HOST, default=HostRules())
    for path in ("", "/", "/a", "/a/b"):
        rules.check(f"https://{HOST}{path}")


def test_without_a_list_of_its_own_a_purpose_has_the_default() -> None:
    assert HostRules.parse(None, default=LOOPBACK) is LOOPBACK


def test_the_own_rule_takes_the_endpoints_port_and_never_its_userinfo() -> None:
    rules = HostRules.own("https://user:password@store.example:8443/", "loras")
    assert rules.rules == (HostRule("store.example", 8443, "loras"),)


@pytest.mark.parametrize(
    "text", ["*.example.com", "https://a.example", "a.example/b/c", "a_b", "a.example.", "127.1", "a:0"]
)
def test_a_list_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="host"):
        HostRules.parse(text, default=OWN)


def test_a_refusal_never_repeats_the_query() -> None:
    for place in ("http://{}/loras/a", "https://evil.{}/a", "https://{}:1/loras/a", "https://{}/other/a", "ftp://{}/a"):
        assert "s3cr3t" not in refusal(OWN, place.format(HOST) + "?X-Amz-Signature=s3cr3t")


_PIECES = [HOST, "evil.example", "https://", "http://", "/", "\\", "@", "#", "?", ":", ".", "..", "%2f", "%2e", "loras"]
_PIECES += ["%00", " ", "[", "]", "443", "127.0.0.1", "\t", "。"]


@given(st.lists(st.sampled_from(_PIECES), max_size=8).map(lambda parts: "https://" + "".join(parts)))
def test_what_is_allowed_is_what_the_client_connects_to(url: str) -> None:
    try:
        OWN.check(url)
    except ForbiddenUrl:
        return
    target = URL(url, encoded=True)
    assert (target.scheme, target.port) == ("https", 443)
    assert target.host == f"loras.{HOST}" or (target.host == HOST and re.match("/loras/.", target.raw_path))


NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
V4 = f"https://{HOST}/loras/a?X-Amz-Date=20260501T120000Z&X-Amz-Expires=300&X-Amz-Signature=5ca1ab1e"


def test_a_sigv4_url_says_when_it_begins_and_ends() -> None:
    assert read_lifetime(V4) == Lifetime(NOW, NOW + timedelta(seconds=300))


def test_a_sigv2_url_says_when_it_ends() -> None:
    ends = int(NOW.timestamp())
    url = f"https://{HOST}/loras/a?AWSAccessKeyId=k&Expires={ends}&Signature=s%2Bs%3D"
    assert read_lifetime(url) == Lifetime(None, NOW)


@pytest.mark.parametrize(
    "url",
    [
        V4.partition("?")[0],
        V4.replace("5ca1ab1e", ""),
        V4.replace("&X-Amz-Signature", "&Unknown"),
        V4.replace("=300", "=604801"),
        V4.replace("=300", "=0"),
        V4.replace("=300", "=-5"),
        V4.replace("=300", "=3e2"),
        V4.replace("=300", "=٣"),
        V4.replace("&X-Amz-Expires=300", ""),
        V4.replace("20260501T120000Z", "2026-05-01"),
        V4 + "&X-Amz-Expires=600",
        f"https://{HOST}/loras/a?Expires=never&Signature=s",
        f"https://{HOST}/loras/a?Expires=99999999999999999999&Signature=s",
        f"https://{HOST}/loras/a?Expires=99999999999&Signature=&X-Goog-Signature=s",
    ],
)
def test_a_url_that_is_unsigned_or_signed_for_too_long_is_refused(url: str) -> None:
    with pytest.raises(ForbiddenUrl):
        read_lifetime(url)
