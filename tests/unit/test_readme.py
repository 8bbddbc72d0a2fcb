"""What the README says of settings, commands and code is so."""

import ast
import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from consumer.settings import ConsumerSettings
from producer.settings import ProducerSettings
from schemas.keys import Keys, Priority
from schemas.requests import decode_request

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def variables(settings: type[BaseSettings]) -> set[str]:
    return {field.alias for field in settings.model_fields.values() if field.alias}


def test_the_settings_table_has_every_variable_and_no_other() -> None:
    table = README.split("## Settings")[1].split("## ")[0]
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table))
    hub = {"HUGGINGFACE_HUB_TOKEN", "HF_HOME"}
    assert named - hub == variables(ConsumerSettings) | variables(ProducerSettings)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_compile(code: str) -> None:
    compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_redis_example_is_a_good_request_in_a_stream_that_there_is() -> None:
    [(stream, job_id, payload)] = re.findall(
        r"^redis-cli XADD '(.*)' '\*' job_id (\S+) payload '(.*)'$", README, re.MULTILINE
    )
    assert stream == Keys().requests(Priority.NORMAL)
    assert decode_request(payload.encode()).job_id == job_id


def test_every_local_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_commands_it_names_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)) - {"on"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
