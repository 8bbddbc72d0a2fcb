import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator

from schemas.__main__ import main
from schemas.errors import ERROR_TABLE
from schemas.events import Event, decode_event
from schemas.export import EVENTS, documents
from schemas.keys import JobState, Keys, Priority
from schemas.requests import GenerationRequest, LoraRef, decode_request

CONTRACT = Path(__file__).parents[2] / "docs" / "contract"
EXAMPLES = sorted((CONTRACT / "examples").glob("*.json"))
SCHEMAS = sorted(CONTRACT.glob("*.schema.json"))
ASYNCAPI = json.loads((CONTRACT / "asyncapi.json").read_bytes())
README = (CONTRACT / "README.md").read_text(encoding="utf-8")

every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
every_schema = pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)


def validator(message: str) -> Validator:
    return Draft202012Validator(json.loads((CONTRACT / f"{message}.schema.json").read_bytes()))


def message_of(path: Path) -> str:
    return next(name for name in ("request", *EVENTS) if path.stem == name or path.stem.startswith(f"{name}."))


def decode(path: Path) -> GenerationRequest | Event:
    raw = path.read_bytes().removesuffix(b"\n")
    return decode_request(raw) if message_of(path) == "request" else decode_event(raw)


def copied(folder: Path) -> Path:
    for path in [*CONTRACT.glob("*.json"), *EXAMPLES]:
        target = folder / path.relative_to(CONTRACT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def test_the_committed_documents_are_those_of_the_code() -> None:
    command = [sys.executable, "-m", "schemas", "export", "--check", str(CONTRACT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_document_that_was_edited_by_hand_is_shown_as_a_diff(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = copied(tmp_path) / "request.schema.json"
    edited.write_text(edited.read_text(encoding="utf-8").replace('"maximum": 50', '"maximum": 60'), encoding="utf-8")
    assert main(["export", "--check", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "--- request.schema.json (committed)" in shown
    assert re.search(r'^- +"maximum": 60,?\n\+ +"maximum": 50,?$', shown, re.MULTILINE)
    assert "asyncapi.json" not in shown


@pytest.mark.parametrize(("name", "sign"), [("asyncapi.json", "+"), ("generation.paused.schema.json", "-")])
def test_a_document_that_is_missing_or_one_too_many_is_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, sign: str
) -> None:
    path = copied(tmp_path) / name
    if path.exists():
        path.unlink()
    else:
        path.write_text("{}\n")
    assert main(["export", "--check", str(tmp_path)]) == 1
    assert f"\n{sign}{{" in capsys.readouterr().out


def test_exporting_writes_what_checking_finds_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "contract"
    assert main(["export", str(folder)]) == 0
    assert main(["export", "--check", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == set(documents(CONTRACT))


def test_a_command_that_is_not_known_is_bad_usage() -> None:
    with pytest.raises(SystemExit) as usage:
        main(["import"])
    assert usage.value.code == 2


@every_schema
def test_a_schema_is_one_and_explains_every_field(path: Path) -> None:
    schema = json.loads(path.read_bytes())
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for part in (schema, *schema.get("$defs", {}).values()):
        for name, rule in part.get("properties", {}).items():
            assert rule["description"].endswith("."), name


def test_there_is_a_schema_and_an_example_of_every_message() -> None:
    messages = {"request", *EVENTS}
    assert {path.name.removesuffix(".schema.json") for path in SCHEMAS} == messages
    assert {message_of(path) for path in EXAMPLES} == messages


def test_there_are_examples_of_requests_without_with_one_and_with_several_loras() -> None:
    requests = [decode_request(path.read_bytes()) for path in EXAMPLES if message_of(path) == "request"]
    assert sorted(len(request.lora_refs) for request in requests) == [0, 1, 2]


@every_example
def test_an_example_fits_its_schema_and_no_other(path: Path) -> None:
    example = json.loads(path.read_bytes())
    for message in ("request", *EVENTS):
        assert validator(message).is_valid(example) == (message == message_of(path)), message


@every_example
def test_an_example_comes_back_from_its_model_byte_for_byte(path: Path) -> None:
    assert decode(path).encode() + b"\n" == path.read_bytes()


@pytest.mark.parametrize("name", list(EVENTS))
def test_what_a_newer_consumer_adds_to_an_event_fits_its_schema(name: str) -> None:
    example = json.loads((CONTRACT / "examples" / f"{name}.json").read_bytes())
    example["data"]["added"] = 1
    assert validator(name).is_valid(example)


@pytest.mark.parametrize(
    "fields",
    [
        {"unknown": 1},
        {"v": 2},
        {"job_id": "a.b"},
        {"prompt": ""},
        {"prompt": "x" * 4001},
        {"prompt": None},
        {"steps": 19},
        {"steps": 51},
        {"steps": "28"},
        {"steps": 28.5},
        {"steps": True},
        {"width": 1023},
        {"cfg": 20.1},
        {"seed": 2**32},
        {"timeout": 0},
        {"lora_scale": 1.1},
        {"lora_sha256": "0" * 63},
        {"loras": [{"key": f"{n}"} for n in range(5)]},
        {"loras": [{}]},
        {"loras": [{"key": "a", "url": "https://h.example/a"}]},
        {"loras": [{"key": "a", "weight": 1}]},
        {"lora_url": "https://h.example/a", "lora_key": "a"},
        {"lora_url": "https://h.example/a", "loras": [{"key": "a"}]},
        {"lora_key": "a", "loras": [{"key": "b"}]},
        {"upload_url": "https://h.example/a", "output_key": "a"},
        {"metadata": []},
        {"output_key": ""},
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_the_schema_refuses_what_a_schema_can_express(fields: dict[str, Any]) -> None:
    assert not validator("request").is_valid({"job_id": "j-1", "prompt": "a"} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_url": "https://h.example/a", "lora_key": None, "loras": []},
        {"lora_key": "a", "lora_url": None},
        {"loras": [{"key": "a", "url": None}, {"url": "https://h.example/a"}], "lora_url": None, "lora_key": None},
        {"upload_url": "https://h.example/a", "output_key": None},
        {"seed": None, "expires_at": None, "cfg": 7},
    ],
    ids=repr,
)
def test_the_schema_takes_what_the_model_takes(fields: dict[str, Any]) -> None:
    request = {"job_id": "j-1", "prompt": "a"} | fields
    decode_request(json.dumps(request).encode())
    assert validator("request").is_valid(request)


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in references(item)]
    return [found for item in value for found in references(item)] if isinstance(value, list) else []


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    found = references(ASYNCAPI)
    assert len(found) > 20
    for reference in found:
        if reference.startswith("./"):
            assert (CONTRACT / reference).is_file(), reference
            continue
        value = ASYNCAPI
        for part in reference.removeprefix("#/").split("/"):
            value = value[part]


def test_the_asyncapi_document_has_the_streams_under_their_keys() -> None:
    keys = Keys()
    tag = {channel["parameters"]["hashTag"]["default"] for channel in ASYNCAPI["channels"].values()}
    assert tag == {"{sdxl}"}
    addresses = [channel["address"].replace("{hashTag}", "{sdxl}") for channel in ASYNCAPI["channels"].values()]
    assert addresses == [*keys.request_streams, keys.completions, keys.dead, keys.progress("{jobId}")]
    for channel in ASYNCAPI["channels"].values():
        assert set(re.findall(r"{(\w+)}", channel["address"])) == set(channel["parameters"])


def test_every_channel_has_an_operation_and_requests_are_what_is_received() -> None:
    actions = {op["channel"]["$ref"].rsplit("/", 1)[1]: op["action"] for op in ASYNCAPI["operations"].values()}
    assert set(actions) == set(ASYNCAPI["channels"])
    assert {name for name, action in actions.items() if action == "receive"} == {
        f"requests{priority.capitalize()}" for priority in Priority
    }


@pytest.mark.parametrize("message", ["request", *EVENTS])
def test_a_message_carries_the_recorded_examples(message: str) -> None:
    recorded = {path.stem: json.loads(path.read_bytes()) for path in EXAMPLES if message_of(path) == message}
    shown = {example["name"]: example["payload"] for example in ASYNCAPI["components"]["messages"][message]["examples"]}
    assert shown == recorded


def test_the_guide_names_every_key_field_state_and_code() -> None:
    keys = Keys()
    names = {*GenerationRequest.model_fields, *LoraRef.model_fields, *ERROR_TABLE, *JobState, *EVENTS}
    names |= {keys.completions, keys.dead, keys.delayed, keys.consumers, *keys.request_streams}
    names |= {keys.job("<job_id>"), keys.cancel("<job_id>"), keys.progress("<job_id>"), keys.consumer("<name>")}
    for path in SCHEMAS[:-1]:
        for part in json.loads(path.read_bytes())["$defs"].values():
            names |= set(part.get("properties", {}))
    assert sorted(name for name in names if f"`{name}`" not in README) == []


def test_the_requests_and_the_event_of_the_guide_are_valid() -> None:
    requests = re.findall(
        r"^ *redis-cli XADD '({sdxl}:requests:\w+)' '\*' job_id (\S+) .*payload '(.*)'$", README, re.M
    )
    assert len(requests) == 3
    for stream, job_id, payload in requests:
        assert stream in Keys().request_streams
        assert decode_request(payload.encode()).job_id == job_id
    event = re.search(r"^```json\n(.*)\n```$", README, re.M)
    assert event is not None
    assert decode_event(event[1].encode()).encode().decode() == event[1]


def test_every_link_of_the_guide_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (CONTRACT / target).exists(), target
