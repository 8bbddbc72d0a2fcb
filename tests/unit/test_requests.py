import itertools
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.errors import ErrorCode
from schemas.fields import is_job_id
from schemas.requests import GenerationRequest, LoraRef, RequestError, decode_request

LORA = "https://account.r2.example/loras/style.safetensors"
SIGNED = f"{LORA}?X-Amz-Expires=60&X-Amz-Signature=0f9e8d7c6b5a"
URL_FIELDS = ["lora_url", "upload_url", "webhook_url", "loras"]


def wire(**fields: Any) -> bytes:
    return json.dumps({"job_id": "j-1", "prompt": "a lighthouse"} | fields).encode()


def with_url(field: str, url: str) -> bytes:
    return wire(loras=[{"url": url}]) if field == "loras" else wire(**{field: url})


def refusal(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode_request(raw)
    return caught.value


def request(**fields: Any) -> GenerationRequest:
    return decode_request(wire(**fields))


def test_what_is_left_out_is_as_the_contract_has_it() -> None:
    assert request().model_dump() == {
        "v": 1,
        "job_id": "j-1",
        "prompt": "a lighthouse",
        "negative_prompt": "",
        "lora_url": None,
        "lora_key": None,
        "lora_scale": 1.0,
        "lora_version": None,
        "lora_sha256": None,
        "loras": (),
        "width": 1024,
        "height": 1024,
        "steps": 28,
        "cfg": 5.5,
        "seed": None,
        "timeout": 60,
        "expires_at": None,
        "tenant": None,
        "output_key": None,
        "upload_url": None,
        "webhook_url": None,
        "metadata": {},
    }


@pytest.mark.parametrize(
    "fields",
    [
        *[
            {"width": width, "height": height}
            for width, height in itertools.product((512, 768, 1024, 1344, 1536), repeat=2)
        ],
        {"v": 1},
        {"steps": 20},
        {"steps": 50},
        {"cfg": 1},
        {"cfg": 20.0},
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"seed": None},
        {"timeout": 1},
        {"timeout": 300},
        {"lora_scale": 0},
        {"lora_scale": 1.0},
        {"prompt": "x" * 4000},
        {"prompt": "夕" * 4000},
        {"prompt": "one\n\ttwo"},
        {"prompt": "a very long prompt of more than seventy-seven tokens " * 20},
        {"prompt": "\u202eيوم مشمس\u202c"},
        {"prompt": "<script>alert(1)</script>"},
        {"prompt": "[bold]markup[/bold] %s {0} $(id) '; DROP TABLE jobs --"},
        {"prompt": "\N{FAMILY}\u200d\N{GIRL}"},
        {"negative_prompt": ""},
        {"negative_prompt": " "},
        {"lora_url": SIGNED, "lora_version": "v2", "lora_sha256": "aB" * 32},
        {"lora_key": "loras/style.safetensors"},
        {"loras": []},
        {"loras": [{"key": f"{n}"} for n in range(4)]},
        {"loras": [{"key": "a", "scale": 0.5, "version": "1", "sha256": "0" * 64}, {"url": SIGNED}]},
        {"expires_at": "2026-03-01T12:00:00Z"},
        {"expires_at": "2026-03-01t12:00:00.123456789z"},
        {"expires_at": "2026-03-01T12:00:00-07:30"},
        {"output_key": "a/b c/ü.png"},
        {"output_key": "k" * 1024},
        {"upload_url": SIGNED},
        {"metadata": {"a": [1, 2.5, None, True, {"b": "c"}], "夕": "\n\t\u200b"}},
        {"metadata": {"a": "\\u0000"}},
        {"tenant": ""},
    ],
    ids=repr,
)
def test_a_request_within_the_contract_is_taken(fields: dict[str, Any]) -> None:
    taken = request(**fields)
    dumped = taken.model_dump()
    for name, value in fields.items():
        if name not in ("loras", "expires_at"):
            assert dumped[name] == value


# Every way in which one parameter can be wrong; the catalogue of faults counts 36 of them.
PROMPT = "INVALID_PROMPT"
REQUEST = "INVALID_REQUEST"
BAD_NUMBERS: list[Any] = ["28", " 28 ", "2_8", 28.0, 28.5, True, None, [28], {}, 10**30, -(10**30), "", "nan"]
BAD_PARAMETERS: list[tuple[str, Any, str]] = [
    *[(field, value, REQUEST) for field in ("steps", "timeout", "width") for value in BAD_NUMBERS],
    *[("seed", value, REQUEST) for value in BAD_NUMBERS if value is not None],
    *[(field, value, REQUEST) for field in ("cfg", "lora_scale") for value in ("1", "nan", True, None, [1.0], 10**400)],
    ("v", 2, REQUEST),
    ("v", 0, REQUEST),
    ("v", "1", REQUEST),
    ("v", None, REQUEST),
    ("steps", 0, REQUEST),
    ("steps", -1, REQUEST),
    ("steps", 19, REQUEST),
    ("steps", 51, REQUEST),
    ("width", 1023, REQUEST),
    ("width", 8, REQUEST),
    ("height", 16384, REQUEST),
    ("height", -1024, REQUEST),
    ("cfg", -1, REQUEST),
    ("cfg", 0.99, REQUEST),
    ("cfg", 20.1, REQUEST),
    ("cfg", float("nan"), REQUEST),
    ("cfg", float("inf"), REQUEST),
    ("seed", -1, REQUEST),
    ("seed", 2**32, REQUEST),
    ("seed", 2**63, REQUEST),
    ("timeout", 0, REQUEST),
    ("timeout", 301, REQUEST),
    ("lora_scale", -0.1, REQUEST),
    ("lora_scale", 1.1, REQUEST),
    ("lora_scale", float("nan"), REQUEST),
    ("prompt", "", PROMPT),
    ("prompt", "   ", PROMPT),
    ("prompt", "\n\t", PROMPT),
    ("prompt", "\u200b\u200d\ufeff\u2060", PROMPT),
    ("prompt", "\u3000\u00a0\u2028", PROMPT),
    ("prompt", "a\0b", PROMPT),
    ("prompt", "\x1b[31mred\x1b[0m", PROMPT),
    ("prompt", "one\r\ntwo", PROMPT),
    ("prompt", "bell\x07", PROMPT),
    ("prompt", "c1\x9b31m", PROMPT),
    ("prompt", "del\x7f", PROMPT),
    ("negative_prompt", "a\0b", PROMPT),
    ("negative_prompt", "\x1b[2J", PROMPT),
    ("prompt", "x" * 4001, REQUEST),
    ("prompt", "x" * 100_000, REQUEST),
    ("prompt", None, REQUEST),
    ("prompt", 7, REQUEST),
    ("prompt", ["a"], REQUEST),
    ("negative_prompt", "x" * 4001, REQUEST),
    ("negative_prompt", None, REQUEST),
    ("loras", [{"key": f"{n}"} for n in range(5)], REQUEST),
    ("loras", [{"key": "a"}, {"key": "a", "scale": 0.5}], REQUEST),
    ("loras", [{"url": SIGNED}, {"url": LORA}], REQUEST),
    ("loras", [{}], REQUEST),
    ("loras", [{"scale": 0.5}], REQUEST),
    ("loras", [{"url": LORA, "key": "a"}], REQUEST),
    ("loras", [{"key": "a", "scale": "0.5"}], REQUEST),
    ("loras", [{"key": "a", "scale": 1.1}], REQUEST),
    ("loras", [{"key": "a", "weight": 1}], REQUEST),
    ("loras", [{"key": "a", "sha256": "0" * 63}], REQUEST),
    ("loras", ["a"], REQUEST),
    ("loras", {"key": "a"}, REQUEST),
    ("loras", None, REQUEST),
    ("lora_sha256", "0" * 63, REQUEST),
    ("lora_sha256", "0" * 65, REQUEST),
    ("lora_sha256", "g" * 64, REQUEST),
    ("lora_sha256", "0" * 64 + "\n", REQUEST),
    ("lora_key", "", REQUEST),
    ("lora_key", "../a", REQUEST),
    ("lora_key", "/a", REQUEST),
    ("lora_version", "a\0", REQUEST),
    ("lora_version", 2, REQUEST),
    ("metadata", {"a": "x" * 5 * 1024}, REQUEST),
    ("metadata", {"a": "b\0"}, REQUEST),
    ("metadata", {"a\0": 1}, REQUEST),
    ("metadata", {"a": {"b": float("nan")}}, REQUEST),
    ("metadata", [], REQUEST),
    ("metadata", "{}", REQUEST),
    ("metadata", None, REQUEST),
    ("output_key", "../x", REQUEST),
    ("output_key", "a/../x", REQUEST),
    ("output_key", "/x", REQUEST),
    ("output_key", "", REQUEST),
    ("output_key", "x" * 2000, REQUEST),
    ("output_key", "ü" * 513, REQUEST),
    ("output_key", "a\nb", REQUEST),
    ("output_key", "a\0b", REQUEST),
    ("tenant", "a\0b", REQUEST),
    ("tenant", 7, REQUEST),
    ("expires_at", "2026-03-01", REQUEST),
    ("expires_at", "2026-03-01T12:00:00", REQUEST),
    ("expires_at", "2026-03-01 12:00:00Z", REQUEST),
    ("expires_at", "2026-02-30T12:00:00Z", REQUEST),
    ("expires_at", "2026-03-01T25:00:00Z", REQUEST),
    ("expires_at", "20260301T120000Z", REQUEST),
    ("expires_at", "２０２６-03-01T12:00:00Z", REQUEST),
    ("expires_at", "9999-12-31T23:59:59-01:00", REQUEST),
    ("expires_at", "0001-01-01T00:00:00+01:00", REQUEST),
    ("expires_at", "1772366400", REQUEST),
    ("expires_at", 1772366400, REQUEST),
    ("expires_at", "", REQUEST),
    ("job_id", "", REQUEST),
    ("job_id", "a" * 65, REQUEST),
    ("job_id", "a.b", REQUEST),
    ("job_id", "a\n", REQUEST),
    ("job_id", "a/b", REQUEST),
    ("job_id", "ä", REQUEST),
    ("job_id", 7, REQUEST),
    ("job_id", None, REQUEST),
    ("step", 28, REQUEST),
    ("Prompt", "a", REQUEST),
]


@pytest.mark.parametrize(("field", "value", "code"), BAD_PARAMETERS, ids=lambda value: repr(value)[:32])
def test_a_parameter_outside_the_contract_is_refused(field: str, value: Any, code: str) -> None:
    error = refusal(wire(**{field: value}))
    assert error.code == code
    assert str(error)


@pytest.mark.parametrize("field", ["job_id", "prompt"])
def test_what_has_no_default_is_required(field: str) -> None:
    fields = json.loads(wire())
    del fields[field]
    error = refusal(json.dumps(fields).encode())
    assert (error.code, error.details["problems"]) == (REQUEST, [{"field": field, "problem": "Field required"}])


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_url": LORA, "lora_key": "a"},
        {"lora_url": LORA, "loras": [{"key": "a"}]},
        {"lora_key": "a", "loras": [{"key": "b"}]},
        {"upload_url": LORA, "output_key": "a.png"},
    ],
    ids=repr,
)
def test_what_excludes_each_other_is_refused_together(fields: dict[str, Any]) -> None:
    error = refusal(wire(**fields))
    assert error.code == REQUEST
    assert "excludes" in str(error)


def test_a_prompt_is_to_blame_only_where_nothing_else_is_wrong() -> None:
    assert refusal(wire(prompt=" ", negative_prompt="\0")).code is ErrorCode.INVALID_PROMPT
    assert refusal(wire(prompt=" ", steps=1)).code is ErrorCode.INVALID_REQUEST
    assert refusal(wire(prompt=" ", step=20)).code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("field", URL_FIELDS)
@pytest.mark.parametrize(
    "url",
    [
        "",
        "style.safetensors",
        "/loras/style.safetensors",
        "//account.r2.example/a",
        "https://",
        "https:///a",
        "https:/account.r2.example/a",
        "https:account.r2.example/a",
        "https://?a=b",
        "https://account.r2.example:port/a",
        "https://account.r2.example:65536/a",
        "https://account.r2.example:-1/a",
        "https://[::1/a",
        "https://[account]/a",
        "https://user@account.r2.example/a",
        "https://user:password@account.r2.example/a",
        "https://:password@account.r2.example/a",
        "https://@account.r2.example/a",
        "https://account.r2.example@169.254.169.254/a",
        "ftp://user:password@account.r2.example/a",
        "https://account.r2.example\\@169.254.169.254/a",
        "https://account.r2.example/a b",
        " https://account.r2.example/a",
        "https://account.r2.example/a\n",
        "ht\ttps://account.r2.example/a",
        "https://account.r2.example/a\0",
        "https://account.r2.example/ü",
        "https://\uff11\uff12\uff17.0.0.1/a",
        "https://\u2460.example/a",
        "https://account.r2.ex\u0430mple/a",
        "https://ho\u017ft.example/a",
        "\u212a://host.example/a",
    ],
    ids=ascii,
)
def test_what_is_no_url_or_carries_userinfo_is_refused(field: str, url: str) -> None:
    assert refusal(with_url(field, url)).code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("field", URL_FIELDS)
@pytest.mark.parametrize(
    "url",
    [
        SIGNED,
        "http://account.r2.example/a",
        "file:///etc/passwd",
        "ftp://account.r2.example/a",
        "gopher://account.r2.example/a",
        "data:application/octet-stream;base64,AAAA",
        "javascript:alert(1)",
        "https://account.r2.example:22/a",
        "https://169.254.169.254/#@account.r2.example/a",
        "https://account.r2.example.evil.example/a",
        "https://evil.example/?https://account.r2.example/a",
        "https://account.r2.example./a",
        "HTTPS://ACCOUNT.R2.EXAMPLE/A",
        "https://evil.example%2faccount.r2.example/a",
        "https://2130706433/a",
        "https://0x7f.1/a",
        "https://0177.0.0.1/a",
        "https://127.1/a",
        "https://[::1]/a",
        "https://[::ffff:127.0.0.1]/a",
        "https://[64:ff9b::a9fe:a9fe]/a",
        "https://[fe80::1]/a",
        "https://169.254.169.254/latest/meta-data",
        "https://100.100.100.200/a",
        "https://224.0.0.1/a",
        "https://0.0.0.0/a",
        "https://account.r2.example/other-bucket/a",
        "https://account.r2.example/a?X-Amz-Expires=604801",
        LORA,
    ],
)
def test_a_well_formed_url_is_taken_here_wherever_it_leads(field: str, url: str) -> None:
    # Where it may lead is the consumer's to say: LORA_DOWNLOAD_FAILED.
    taken = decode_request(with_url(field, url))
    assert url in (taken.lora_url, taken.upload_url, taken.webhook_url, *(lora.url for lora in taken.loras))


@pytest.mark.parametrize(("extra", "taken"), [(0, True), (1, False)])
def test_metadata_is_measured_in_bytes_of_json(extra: int, taken: bool) -> None:
    room = 4096 - len('{"a":""}') - len("夕".encode())
    raw = wire(metadata={"a": "夕" + "x" * (room + extra)})
    if taken:
        decode_request(raw)
    else:
        assert "larger than 4096 bytes" in str(refusal(raw))


def test_a_payload_of_64_kib_is_read_and_one_byte_more_is_not() -> None:
    raw = wire()
    assert decode_request(raw + b" " * (64 * 1024 - len(raw))) == decode_request(raw)
    assert refusal(raw + b" " * (64 * 1024 + 1 - len(raw))).code is ErrorCode.INVALID_REQUEST


def test_metadata_that_is_nested_deeper_than_a_payload_may_be_is_refused_in_python_too() -> None:
    def nested(levels: int) -> dict[str, Any]:
        return {} if levels == 1 else {"a": nested(levels - 1)}

    taken = GenerationRequest(job_id="j-1", prompt="a", metadata=nested(63))
    assert decode_request(taken.encode()) == taken
    with pytest.raises(ValidationError, match="nested deeper"):
        GenerationRequest(job_id="j-1", prompt="a", metadata=nested(64))


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": "\ud800"},
        {"prompt": "\ud800"},
        {"output_key": "\ud800"},
        {"metadata": {"a": "\ud800"}},
        {"metadata": {"\ud800": 1}},
        {"metadata": {"a": float("inf")}},
        {"metadata": {"a": object}},
        {"expires_at": datetime(2026, 3, 1)},
        {"expires_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))},
    ],
    ids=ascii,
)
def test_what_could_not_travel_is_refused_in_python_too(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerationRequest(**{"job_id": "j-1", "prompt": "a"} | fields)


def test_loras_may_be_a_list_in_python() -> None:
    made = GenerationRequest.model_validate({"job_id": "j-1", "prompt": "a", "loras": [LoraRef(key="a"), {"key": "b"}]})
    assert made.loras == (LoraRef(key="a"), LoraRef(key="b"))


def test_times_are_kept_in_utc() -> None:
    expires_at = request(expires_at="2026-03-01T12:00:00.5+02:00").expires_at
    assert expires_at == datetime(2026, 3, 1, 10, 0, 0, 500_000, tzinfo=UTC)
    assert json.loads(request(expires_at="2026-03-01T12:00:00+02:00").encode())["expires_at"] == "2026-03-01T10:00:00Z"


@pytest.mark.parametrize(("job_id", "seed"), [("j-1", 0xB4614134), ("a" * 64, 0xFFE054FE)])
def test_without_a_seed_the_first_32_bits_of_the_job_ids_digest_are_one(job_id: str, seed: int) -> None:
    assert request(job_id=job_id).effective_seed == seed


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_is_used_as_it_is(seed: int) -> None:
    assert request(seed=seed).effective_seed == seed


def test_the_image_has_a_key_of_its_own_unless_one_is_given() -> None:
    assert request().image_key == "images/j-1.png"
    assert request(output_key="a/b.png").image_key == "a/b.png"


def test_both_ways_of_writing_one_lora_mean_the_same() -> None:
    digest = "0" * 64
    short = request(lora_url=SIGNED, lora_scale=0.5, lora_version="v2", lora_sha256=digest)
    long = request(loras=[{"url": SIGNED, "scale": 0.5, "version": "v2", "sha256": digest}])
    assert short.lora_refs == long.lora_refs == (LoraRef(url=SIGNED, scale=0.5, version="v2", sha256=digest),)
    assert request(lora_key="a").lora_refs == (LoraRef(key="a"),)
    assert request().lora_refs == ()


def test_loras_keep_their_order() -> None:
    taken = request(loras=[{"key": "b"}, {"url": SIGNED}, {"key": "a"}])
    assert [lora.source for lora in taken.lora_refs] == ["b", LORA, "a"]


@pytest.mark.parametrize(
    ("ref", "source", "name"),
    [
        (LoraRef(url=SIGNED), LORA, "style.safetensors"),
        (LoraRef(key="loras/style.safetensors"), "loras/style.safetensors", "style.safetensors"),
        (LoraRef(key="a"), "a", "a"),
    ],
)
def test_a_lora_is_named_without_its_signature(ref: LoraRef, source: str, name: str) -> None:
    assert (ref.source, ref.name) == (source, name)


def test_a_redacted_request_has_no_query_and_is_still_a_request() -> None:
    taken = request(
        loras=[{"url": SIGNED}, {"key": "k?x"}], upload_url=SIGNED, webhook_url="https://h.example/w?t=s3cret"
    )
    kept = taken.redacted().encode()
    assert b"X-Amz" not in kept
    assert b"s3cret" not in kept
    assert decode_request(kept) == taken.redacted()
    assert taken.redacted().loras[1].key == "k?x"
    assert taken.loras[0].url == SIGNED
    assert request(lora_url=SIGNED).redacted().lora_url == LORA


def test_the_same_job_signed_afresh_has_the_same_fingerprint() -> None:
    first = request(
        lora_url=f"{LORA}?X-Amz-Signature=1", upload_url="https://h.example/u?a", webhook_url="https://h.example/w?a"
    )
    again = request(
        lora_url=f"{LORA}?X-Amz-Signature=2", upload_url="https://h.example/u?b", webhook_url="https://h.example/w?b"
    )
    assert first.fingerprint() == again.fingerprint()
    assert len(first.fingerprint()) == 64


def test_defaults_that_are_written_out_and_the_order_of_fields_do_not_change_the_fingerprint() -> None:
    plain = request(metadata={"a": 1, "b": 2})
    written = {
        "metadata": {"b": 2, "a": 1},
        "steps": 28,
        "loras": [],
        "seed": None,
        "prompt": "a lighthouse",
        "job_id": "j-1",
    }
    assert decode_request(json.dumps(written).encode()).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "b"},
        {"seed": 1},
        {"lora_url": LORA + "x"},
        {"metadata": {"a": 1}},
        {"job_id": "j-2"},
        {"timeout": 61},
    ],
    ids=repr,
)
def test_another_body_has_another_fingerprint(fields: dict[str, Any]) -> None:
    assert request(**{"lora_url": LORA} | fields).fingerprint() != request(lora_url=LORA).fingerprint()


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        request().__setattr__("steps", 30)
    with pytest.raises(ValidationError, match="frozen"):
        LoraRef(key="a").__setattr__("key", "b")


@pytest.mark.parametrize(("value", "valid"), [("a_B-9", True), ("a" * 64, True), ("", False), ("a" * 65, False)])
def test_job_ids_are_short_and_plain(value: str, valid: bool) -> None:
    assert is_job_id(value) is valid
    assert not is_job_id(value + "\n")
    assert not is_job_id(value.encode())


def test_a_refusal_lists_what_is_wrong_by_field() -> None:
    error = refusal(wire(steps=1, loras=[{"key": "a", "scale": 7}], lora_sha265="x"))
    assert [problem["field"] for problem in error.details["problems"]] == ["loras.0.scale", "steps", "lora_sha265"]
    assert str(error).count(";") == 2
    assert error.details["problems"][1]["problem"] in str(error)


def test_a_refusal_stays_short_however_much_is_wrong() -> None:
    error = refusal(wire(**{f"unknown_{'x' * (n % 9)}{n}": n for n in range(1000)}))
    assert len(error.details["problems"]) == 20
    assert len(str(error)) < 300


PLANTED = "https://r2.example/a?X-Amz-Signature=0f9e8d7c6b5a"
NAMES = st.sampled_from([*GenerationRequest.model_fields, PLANTED, "more"])
PLANTED_VALUES = st.sampled_from([PLANTED, f"{PLANTED}\0", f" {PLANTED}", [PLANTED], [{"url": PLANTED, "scale": 9}]])
PLANTS = PLANTED_VALUES | st.sampled_from([{PLANTED: 1}, [{PLANTED: 1}]])


@settings(deadline=None)
@given(st.dictionaries(NAMES, PLANTS, min_size=1))
def test_a_refusal_does_not_repeat_the_input(fields: dict[str, Any]) -> None:
    try:
        decode_request(wire(**fields))
    except RequestError as error:
        text = f"{error} {error!r} {error.details}"
        assert "r2.example" not in text
        assert "0f9e8d7c6b5a" not in text


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(GenerationRequest.model_fields)), PLANTED_VALUES, min_size=1))
def test_errors_of_requests_made_in_python_do_not_repeat_the_input(fields: dict[str, Any]) -> None:
    try:
        GenerationRequest(**{"job_id": "j-1", "prompt": "a"} | fields)
    except ValidationError as error:
        text = f"{error} {error!r}"
        assert "r2.example" not in text
        assert "0f9e8d7c6b5a" not in text


def texts(**bounds: Any) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), **bounds)


URLS = st.builds("https://{}.example/{}?{}".format, *[st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)] * 3)
OBJECT_KEYS = st.from_regex(r"[a-z0-9ü][a-z0-9/_ -]{0,20}", fullmatch=True)
PROMPTS = st.text(st.characters(exclude_categories=["Cc", "Cs"], include_characters="\n\t"), max_size=60)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LORA_FIELDS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"lora_url": URLS}, optional={"lora_scale": st.floats(0, 1), "lora_version": texts()}),
    st.fixed_dictionaries(
        {"lora_key": OBJECT_KEYS}, optional={"lora_sha256": st.from_regex(r"[0-9a-fA-F]{64}", fullmatch=True)}
    ),
    st.fixed_dictionaries(
        {"loras": st.lists(OBJECT_KEYS.map(lambda key: LoraRef(key=key)), unique=True, max_size=4).map(tuple)}
    ),
    st.just({}),
)
OUTPUT_FIELDS = st.fixed_dictionaries({}, optional={"output_key": OBJECT_KEYS}) | st.fixed_dictionaries(
    {"upload_url": URLS}
)
OTHER_FIELDS = st.fixed_dictionaries(
    {
        "job_id": st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
        "prompt": PROMPTS.map(lambda text: "a" + text),
    },
    optional={
        "negative_prompt": PROMPTS,
        "width": st.sampled_from([512, 768, 1024, 1344, 1536]),
        "steps": st.integers(20, 50),
        "cfg": st.floats(1, 20),
        "seed": st.none() | st.integers(0, 2**32 - 1),
        "timeout": st.integers(1, 300),
        "expires_at": st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)),
        "tenant": texts(),
        "webhook_url": URLS,
        "metadata": st.dictionaries(texts(max_size=8), JSON_VALUES, max_size=3),
    },
)
REQUESTS = st.builds(
    lambda *parts: GenerationRequest(**{k: v for part in parts for k, v in part.items()}),
    OTHER_FIELDS,
    LORA_FIELDS,
    OUTPUT_FIELDS,
)


@settings(deadline=None, max_examples=200)
@given(REQUESTS)
def test_a_request_survives_its_way_over_the_wire(made: GenerationRequest) -> None:
    raw = made.encode()
    taken = decode_request(raw)
    assert taken == made
    assert taken.encode() == raw
    assert taken.fingerprint() == made.fingerprint()


@settings(deadline=None)
@given(REQUESTS)
def test_what_is_kept_of_any_request_can_be_read_again(made: GenerationRequest) -> None:
    kept = decode_request(made.redacted().encode())
    assert kept == made.redacted() == kept.redacted()
    assert kept.fingerprint() == made.fingerprint()
