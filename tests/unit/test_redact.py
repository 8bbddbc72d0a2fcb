import json
import string
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.redact import redact_bytes, redact_text, redact_value, without_query

SECRET = "0f9e8d7c6b5a49380f9e8d7c6b5a4938"

SIGNED_URLS = [
    f"https://account.r2.example/loras/a.safetensors?X-Amz-Expires=60&X-Amz-Signature={SECRET}",
    f"https://account.r2.example/loras/a.safetensors?X-Amz-Signature={SECRET}&X-Amz-Expires=60",
    f"HTTPS://ACCOUNT.R2.EXAMPLE/LORAS/A?X-AMZ-SIGNATURE={SECRET}",
    f"https://account.r2.example/a?AWSAccessKeyId=AKIA&Signature={SECRET}&Expires=1",
    f"https://account.r2.example/a?sv=2024&sig={SECRET}",
    f"https://account.r2.example?{SECRET}",
    f"https://account.r2.example/a#{SECRET}",
    f"https://user:{SECRET}@account.r2.example/a",
    f"https://{SECRET}@account.r2.example/a?b=c",
    f"redis://default:{SECRET}@redis.example:6379/0",
    f"rediss://:{SECRET}@redis.example:6379/0?ssl_cert_reqs=none",
    f"postgresql+psycopg://app:{SECRET}@db.example/app",
    f"s3+http://host/a?{SECRET}",
    f"redis://:x...{SECRET}@host:6379/0",
    f"https://user:{SECRET}...x@host/a",
    f"https://user:{SECRET}\\u0040host/a",
    f"https://host/a\\u003fx={SECRET}",
    f"https://host/a\\U003F{SECRET}",
    f"https://host/a\\u0023{SECRET}",
    f"https\\u003a//host/a?x={SECRET}",
    f"https:\\u002f\\u002Fhost/a?x={SECRET}",
    f"https:\\u002f\\u002fuser:{SECRET}@host/a",
]
LOOSE_SECRETS = [
    f"X-Amz-Signature={SECRET}",
    f"&X-Amz-Signature={SECRET}&X-Amz-Expires=60",
    f"X-Amz-Security-Token: {SECRET}",
    f"x-amz-credential = {SECRET}/20260101/auto/s3/aws4_request",
    f'"X-Amz-Signature": "{SECRET}"',
    f"'Signature': '{SECRET}'",
    f'{{\\"token\\": \\"{SECRET}\\"}}',
    f'{{\\\\\\"token\\\\\\":\\\\\\"{SECRET}\\\\\\"}}',
    f"AWSAccessKeyId%3D{SECRET}",
    f"a space in a URL?sv=1&sig={SECRET}&se=2",
    f"%3FSignature%3D{SECRET}%26Expires%3D1",
    f"%253FSignature%253D{SECRET}",
    f"X-Amz-Signature\\u003d{SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"authorization: Basic {SECRET}",
    f"Authorization: AWS4-HMAC-SHA256 Credential=AKIA/x, SignedHeaders=host, Signature={SECRET}",
    f"('Authorization', 'Bearer {SECRET}')",
    f"password={SECRET}",
    f'password: "two words {SECRET}"',
    f"R2_SECRET_ACCESS_KEY={SECRET}",
    f"secret-access-key: {SECRET}",
    f"aws_access_key_id={SECRET}",
    f"apiToken={SECRET}",
    f"WEBHOOK_SECRET=whsec_{SECRET}",
    f"the secrets are whsec_{SECRET},whsec_{SECRET}",
]
WRAPPINGS = [
    "{}",
    "GET {} failed with 403",
    "{}\n{}",
    "first line\n  {}\nlast line\n",
    '"{}"',
    "<{}>",
    "`{}`",
    "({})",
    "{},{}",
    "{}, {}; {}",
    '{{"lora_url":"{}","n":1}}',
    "url='{}' code=1",
    "b'{}'",
    "\u00a0{}\u2028{}",
    "schön: {}",
    "a" * 1000 + "{}",
    "https://proxy.example/{}",
    "https://other.example/a,{}",
    "token=token: a|{}|{}",
]


def json_escaped(url: str) -> str:
    return json.dumps(url).replace("/", "\\/")


ENCODINGS = {
    "plain": lambda url: url,
    "JSON with escaped slashes": json_escaped,
    "JSON in JSON": lambda url: json.dumps(json_escaped(url)),
    "JSON with escaped ampersands": lambda url: url.replace("&", "\\u0026"),
    "HTML": lambda url: url.replace("&", "&amp;"),
    "upper case scheme": lambda url: url.replace("http", "HTTP"),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_no_secret_of_a_url_gets_through_however_it_is_written(encode: Any, wrapping: str) -> None:
    for url in SIGNED_URLS:
        text = wrapping.replace("{}", encode(url)).replace("{{", "{").replace("}}", "}")
        assert SECRET not in redact_text(text), text
        assert SECRET.encode() not in redact_bytes(text.encode()), text


@pytest.mark.parametrize("secret", LOOSE_SECRETS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_no_secret_that_stands_alone_gets_through(secret: str, wrapping: str) -> None:
    text = wrapping.replace("{}", secret)
    assert SECRET not in redact_text(text)
    assert SECRET.encode() not in redact_bytes(text.encode())


@pytest.mark.parametrize("url", SIGNED_URLS[:2])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_no_signature_gets_through_in_a_percent_encoded_url(url: str, times: int) -> None:
    for _ in range(times):
        url = quote(url, safe="")
    assert SECRET not in redact_text(f"https://proxy.example/fetch/{url} and {url}")


def test_what_remains_still_names_the_object() -> None:
    text = f"GET {SIGNED_URLS[0]} gave 403, as did {SIGNED_URLS[9]}"
    assert redact_text(text) == (
        "GET https://account.r2.example/loras/a.safetensors gave 403, as did redis://redis.example:6379/0"
    )


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ('{"token":"abc","n":1}', '{"token":"[redacted]","n":1}'),
        ('{\\"token\\":\\"abc\\",\\"n\\":1}', '{\\"token\\":\\"[redacted]\\",\\"n\\":1}'),
        ("a?Signature=abc&Expires=1", "a?Signature=[redacted]&Expires=1"),
        ("Authorization: Bearer abc\nAccept: */*", "Authorization: [redacted]\nAccept: */*"),
        ("<Handle f('https://r2.exam...2e5a4c1')>", "<Handle f('https://r2.exam')>"),
        ("sent with bearer 0123456789", "sent with bearer [redacted]"),
        (r'{"url":"https:\/\/h\/k?a=b","n":1}', r'{"url":"https:\/\/h\/k","n":1}'),
    ],
)
def test_what_stands_around_a_secret_stays(text: str, redacted: str) -> None:
    assert redact_text(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the prompt was cut at 77 tokens",
        "is it? #1 of 3, 50% done; 'quoted' & \"quoted\"",
        "not a URL: http:/one-slash?query#fragment",
        "user@example.org",
        "C:\\models\\sdxl",
        "https://account.r2.example/loras/a.safetensors",
        "rediss://redis.example:6379/0",
        "https://account.r2.example/a%3Fb",
        "lora_url: is not a URL; steps: Input should be less than or equal to 50",
        "width: must be one of 512, 768, 1024, 1344, 1536",
        "ein schöner Sonnenuntergang, 夕日, \N{GRINNING FACE}",
        "signature verification failed; the token was refused; passwords, secrets and credentials",
    ],
)
def test_text_without_a_secret_comes_back_unchanged(text: str) -> None:
    assert redact_text(text) == text
    assert redact_bytes(text.encode()) == text.encode()


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters=":/=%\\")))
def test_text_that_can_hold_neither_a_url_nor_an_assignment_comes_back_unchanged(text: str) -> None:
    assert redact_text(text) == text or "whsec_" in text.lower() or "bearer" in text.lower()


@settings(deadline=None)
@given(st.binary())
@example(b"\xff\x00https://h/\x85\xa0?a=b")
def test_bytes_of_any_kind_are_taken(raw: bytes) -> None:
    redact_bytes(raw)


def test_bytes_that_are_not_ascii_come_back_as_they_were_and_do_not_end_a_url() -> None:
    raw = b"\xff\xfe " + "https://h/Å\u00a0à?sig=1".encode() + b" \x80"
    assert redact_bytes(raw) == b"\xff\xfe " + "https://h/Å\u00a0à".encode() + b" \x80"


PUNCTUATION = ["//", "\\/", *"/?#@:=&,;'\"\\ \n", "%3D", "\\u003d"]
WORDS = ["https://", "http:", "token", "Signature", "authorization", "bearer ", "whsec_", "secret", "a", "0123456789"]
FRAGMENTS = st.sampled_from([*SIGNED_URLS[:3], *PUNCTUATION, *WORDS])


@settings(deadline=None, max_examples=500)
@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=14).map("".join))
@example("https://a@https://b@c?d")
@example("token='token=\"a b\"'")
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once = redact_text(text)
    assert redact_text(once) == once


URLS = st.builds(
    "{}://{}/{}?{}&X-Amz-Signature={}{}".format,
    st.sampled_from(["https", "http", "HTTPS", "s3", "git+ssh"]),
    st.text(string.ascii_letters + string.digits + ".-", min_size=1, max_size=12),
    st.text(string.ascii_letters + string.digits + "/._-%~!$()*+,;:@ü夕", max_size=20),
    st.text(string.ascii_letters + string.digits + "=&-%", max_size=20),
    st.just(SECRET),
    st.sampled_from(["", "&x-id=GetObject", "#top"]),
)


@settings(deadline=None, max_examples=300)
@given(
    before=st.text(max_size=10), url=URLS, after=st.text(max_size=10), encode=st.sampled_from(list(ENCODINGS.values()))
)
def test_no_planted_signature_gets_through(before: str, url: str, after: str, encode: Any) -> None:
    text = f"{before}{encode(url)}{after}"
    assert SECRET not in redact_text(text)
    assert SECRET.encode() not in redact_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "unit", ["a", "a:", "a://", "a:\\", "a://b@", "://", "token", "token ", "token=", "token='", "?#"]
)
def test_a_long_text_is_redacted_in_time_that_grows_with_its_length_alone(unit: str) -> None:
    # Not timed: quadratic patterns would keep this for minutes.
    redact_text(unit * (400_000 // len(unit)))


def test_values_are_redacted_wherever_they_stand() -> None:
    url = SIGNED_URLS[0]
    value = {
        "url": url,
        "nested": {"list": [url, 1, None, True, 2.5], "tuple": (url,)},
        "raw": url.encode(),
        "error": OSError(f"cannot open {url}"),
        "headers": {
            "Authorization": SECRET,
            "apiToken": SECRET,
            "x-amz-security-token": SECRET,
            "R2_SECRET_ACCESS_KEY": SECRET.encode(),
        },
    }
    redacted = redact_value(value)
    assert SECRET not in repr(redacted)
    assert redacted["nested"]["list"] == ["https://account.r2.example/loras/a.safetensors", 1, None, True, 2.5]
    assert redacted["error"] == "OSError: cannot open https://account.r2.example/loras/a.safetensors"
    assert redacted["headers"]["Authorization"] == "[redacted]"
    assert value["url"] == url


def test_values_without_a_secret_come_back_equal() -> None:
    value = {"status": 403, "tokens": 77, "token": 3, "modules": ["to_q"], "a": {"b": None}, 1: 2}
    assert redact_value(value) == value


@pytest.mark.parametrize(
    ("url", "named"),
    [
        (SIGNED_URLS[0], "https://account.r2.example/loras/a.safetensors"),
        (SIGNED_URLS[7], "https://account.r2.example/a"),
        ("https://h:8443/a%20b;v=1?c#d", "https://h:8443/a%20b;v=1"),
        ("https://[::1]/a", "https://[::1]/a"),
        ("https://h", "https://h"),
        ("https://u:p@h@i/a", "https://i/a"),
    ],
)
def test_a_url_without_its_query_names_the_object(url: str, named: str) -> None:
    assert without_query(url) == named
    assert without_query(named) == named


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be"])
def test_no_secret_gets_through_in_an_encoding_with_nuls(encoding: str) -> None:
    """Guards the second look of `redact_bytes`."""
    raw = f'{{"lora_url": "https://account.r2.example/a?X-Amz-Signature={SECRET}"}}'.encode(encoding)
    assert SECRET not in redact_bytes(raw).replace(b"\0", b"").decode("latin-1")


def test_bytes_with_a_nul_and_no_secret_behind_it_stay_as_they_are() -> None:
    assert redact_bytes(b"a\0b https://host/a?b=c \xff") == b"a\0b https://host/a \xff"
