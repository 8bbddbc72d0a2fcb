"""Requests with one parameter that is wrong, or that only looks as if it were."""

import json
from typing import Any

from tests.unit.bad_inputs.kit import BAD_PROMPT, FINE, JOB_ID, REFUSED, SIGNED, Case, Outcome, payload_with

_NAN = float("nan")
_OTHER = SIGNED.replace("a.safetensors", "b.safetensors")


def _case(name: str, outcome: Outcome | None, /, **fields: Any) -> Case:
    given = {"job_id": JOB_ID, "prompt": "a lighthouse", "webhook_url": SIGNED, **fields}
    return Case(name, {b"payload": json.dumps(given).encode()}, outcome, fields=given)


def _raw(name: str, outcome: Outcome | None, members: str) -> Case:
    """A number as only JSON can spell it."""
    return Case(name, {b"payload": payload_with(members)}, outcome)


CATALOGUE = [
    _case("an int as text", REFUSED, steps="20"),
    _case("an int as a float", REFUSED, steps=20.0),
    _case("an int as a boolean", REFUSED, seed=True),
    _case("an int as text with spaces", REFUSED, timeout=" 20 "),
    _case("an int as text with an underscore", REFUSED, seed="1_0"),
    _case("0 steps", REFUSED, steps=0),
    _case("-1 steps", REFUSED, steps=-1),
    _case("19 steps", REFUSED, steps=19),
    _case("51 steps", REFUSED, steps=51),
    _case("a width of 1023", REFUSED, width=1023),
    _case("a width of 8", REFUSED, width=8),
    _case("a width of 16384", REFUSED, width=16384),
    _case("1344 by 1536", FINE, width=1344, height=1536),
    _case("a cfg that reads nan", REFUSED, cfg="nan"),
    _case("a cfg of -1", REFUSED, cfg=-1),
    _case("a cfg of 20.1", REFUSED, cfg=20.1),
    _case("a seed of -1", REFUSED, seed=-1),
    _case("a seed of 2^32", REFUSED, seed=2**32),
    _case("a seed of 2^63", REFUSED, seed=2**63),
    _case("a timeout of 0", REFUSED, timeout=0),
    _case("a timeout of 301", REFUSED, timeout=301),
    _case("a scale of -0.1", REFUSED, lora_key="a", lora_scale=-0.1),
    _case("a scale of 1.1", REFUSED, lora_key="a", lora_scale=1.1),
    _case("a scale of NaN", REFUSED, lora_key="a", lora_scale=_NAN),
    _case("an empty prompt", BAD_PROMPT, prompt=""),
    _case("a prompt of spaces", BAD_PROMPT, prompt="   "),
    _case("a prompt of zero width", BAD_PROMPT, prompt="\u200b\u200d\ufeff\u2060"),
    _case("a prompt from right to left", FINE, prompt="\u202eيوم مشمس\u202c"),
    _case("a prompt of 100000 characters", REFUSED, prompt="x" * 100_000),
    _case("a prompt of more than 77 tokens", FINE, prompt="a lighthouse in the fog, " * 40),
    _case("a prompt with NUL", BAD_PROMPT, prompt="a\0b"),
    _case("a prompt with ANSI escapes", BAD_PROMPT, prompt="\x1b[31mred\x1b[0m"),
    _case("a prompt with a script", FINE, prompt="<script>alert(1)</script>"),
    _case("a prompt of two lines", FINE, prompt="one\ntwo"),
    _case("five LoRAs", REFUSED, loras=[{"key": f"{number}"} for number in range(5)]),
    _case("the same LoRA twice", REFUSED, loras=[{"key": "a"}, {"key": "a", "scale": 0.5}]),
    _case("LoRAs together with lora_url", REFUSED, loras=[{"key": "a"}], lora_url=SIGNED),
    _case("5 KiB of metadata", REFUSED, metadata={"a": "x" * 5 * 1024}),
    _case("an output key that climbs", REFUSED, output_key="../x"),
    _case("an absolute output key", REFUSED, output_key="/x"),
    _case("a URL for a LoRA's key", REFUSED, lora_key=SIGNED),
    _case("a URL for an output key", REFUSED, output_key=SIGNED),
    _case("an output key of 2000 characters", REFUSED, output_key="x" * 2000),
]

_NUMBERS = [
    _raw("an int as 2E1", REFUSED, '"steps": 2E1'),
    _raw("an int as 1e0", REFUSED, '"timeout": 1e0'),
    _raw("a seed of 1E2", REFUSED, '"seed": 1E2'),
    _raw("a seed of -0.0", REFUSED, '"seed": -0.0'),
    _raw("a seed of -0", FINE, '"seed": -0'),
    _raw("a cfg of 2E0", FINE, '"cfg": 2E0'),
    _raw("a cfg of 1e309", REFUSED, '"cfg": 1e309'),
    _raw("a cfg of 1e-400", REFUSED, '"cfg": 1e-400'),
    _raw("a scale of -0.0", FINE, '"lora_scale": -0.0'),
    _raw("a scale of 1e-400", FINE, '"lora_scale": 1e-400'),
    _raw("a scale just over 1", REFUSED, '"lora_scale": 1.0000000000000002'),
    _raw("a scale that rounds to 1", FINE, '"lora_scale": 1.00000000000000000001'),
    _case("steps that are null", REFUSED, steps=None),
    _case("steps in a list", REFUSED, steps=[28]),
    _case("steps of 28.5", REFUSED, steps=28.5),
    _case("steps in other digits", REFUSED, steps="٢٨"),
    _case("a width as text", REFUSED, width="1024"),
    _case("a height of -1024", REFUSED, height=-1024),
    _case("a cfg that is a boolean", REFUSED, cfg=True),
    _case("a cfg of infinity", REFUSED, cfg=float("inf")),
    _case("a cfg of 10^400", REFUSED, cfg=10**400),
    _case("a seed of -2^63", REFUSED, seed=-(2**63)),
    _case("the largest seed", FINE, seed=2**32 - 1),
    _case("a scale that reads 0.5", REFUSED, lora_key="a", lora_scale="0.5"),
]
_TEXTS = [
    _case("no prompt but null", REFUSED, prompt=None),
    _case("a prompt that is a list", REFUSED, prompt=["a"]),
    _case("a prompt of 4001 characters", REFUSED, prompt="x" * 4001),
    _case("a prompt of 4000 characters", FINE, prompt="夕" * 4000),
    _case("a prompt of combining marks", BAD_PROMPT, prompt="\u0301\u20dd"),
    _case("a prompt of wide spaces", BAD_PROMPT, prompt="\u3000\u00a0\u2028"),
    _case("a prompt with a carriage return", BAD_PROMPT, prompt="one\r\ntwo"),
    _case("a prompt with a C1 escape", BAD_PROMPT, prompt="c1\x9b31m"),
    _case("a prompt with DEL", BAD_PROMPT, prompt="a\x7f"),
    _case("a prompt with markup for terminals", FINE, prompt="[bold]%s {0} $(id) `id` '; DROP TABLE jobs --"),
    _case("a blank prompt and a bad number", REFUSED, prompt=" ", steps=1),
    _case("a negative prompt with NUL", BAD_PROMPT, negative_prompt="a\0"),
    _case("a negative prompt of 4001 characters", REFUSED, negative_prompt="x" * 4001),
    _case("an empty negative prompt", FINE, negative_prompt=""),
    _case("a tenant that is a number", REFUSED, tenant=7),
    _case("a tenant with NUL", REFUSED, tenant="a\0"),
    _case("a lora_version with NUL", REFUSED, lora_key="a", lora_version="1\0"),
    _case("a time without a zone", REFUSED, expires_at="2036-01-01T00:00:00"),
    _case("a time as a number", REFUSED, expires_at=2_082_758_400),
    _case("a time as a number in text", REFUSED, expires_at="2082758400"),
    _case("a time that never was", REFUSED, expires_at="2036-02-30T00:00:00Z"),
    _case("a time before all times", REFUSED, expires_at="0001-01-01T00:00:00+01:00"),
    _case("a time after all times", REFUSED, expires_at="9999-12-31T23:59:59-01:00"),
]
_PLACES = [
    _case("a LoRA with a url and a key", REFUSED, loras=[{"url": SIGNED, "key": "a"}]),
    _case("a LoRA with neither", REFUSED, loras=[{"scale": 0.5}]),
    _case("a LoRA that is a string", REFUSED, loras=["a"]),
    _case("LoRAs that are an object", REFUSED, loras={"key": "a"}),
    _case("LoRAs that are null", REFUSED, loras=None),
    _case("a LoRA with an unknown field", REFUSED, loras=[{"key": "a", "weight": 1}]),
    _case("a LoRA whose scale is text", REFUSED, loras=[{"key": "a", "scale": "1"}]),
    _case("the same LoRA under two signatures", REFUSED, loras=[{"url": SIGNED}, {"url": f"{SIGNED}&again=1"}]),
    _case("two LoRAs of one place", FINE, loras=[{"url": SIGNED}, {"url": _OTHER}]),
    _case("LoRAs together with lora_key", REFUSED, loras=[{"key": "a"}], lora_key="b"),
    _case("a lora_url and a lora_key", REFUSED, lora_url=SIGNED, lora_key="a"),
    _case("a lora_key that climbs", REFUSED, lora_key="a/../../b"),
    _case("an absolute lora_key", REFUSED, lora_key="/etc/passwd"),
    _case("an empty lora_key", REFUSED, lora_key=""),
    _case("a short digest", REFUSED, lora_key="a", lora_sha256="0" * 63),
    _case("a digest that is none", REFUSED, lora_key="a", lora_sha256="g" * 64),
    _case("a digest with a newline", REFUSED, lora_key="a", lora_sha256="0" * 64 + "\n"),
    _case("an upload_url and an output_key", REFUSED, upload_url=SIGNED, output_key="a.png"),
    _case("an empty output key", REFUSED, output_key=""),
    _case("an output key of two lines", REFUSED, output_key="a\nb"),
    _case("an output key with NUL", REFUSED, output_key="a\0b"),
    _case("an output key of 1025 bytes", REFUSED, output_key="ü" * 512 + "x"),
    _case("an output key of 1024 bytes", FINE, output_key="ü" * 512),
    _case("metadata that is a list", REFUSED, metadata=[]),
    _case("metadata that is text", REFUSED, metadata="{}"),
    _case("metadata that is null", REFUSED, metadata=None),
    _case("metadata with NaN", REFUSED, metadata={"a": [_NAN]}),
    _case("metadata with NUL", REFUSED, metadata={"a": "b\0"}),
    _case("metadata with a backslash before NUL", REFUSED, metadata={"a": "\\\0"}),
    _case("metadata that spells NUL", FINE, metadata={"a": "\\u0000"}),
    _case("metadata of 4 KiB", FINE, metadata={"a": "x" * (4096 - len('{"a":""}'))}),
]

PARAMETERS = CATALOGUE + _NUMBERS + _TEXTS + _PLACES
