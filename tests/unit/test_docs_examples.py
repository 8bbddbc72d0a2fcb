"""What the documents show compiles, and the client's document leaves nothing out."""

import inspect
import re

import pytest

from producer import errors
from producer.client import AsyncGenerationClient
from producer.errors import ClientErrorCode, ProducerError
from producer.jobs import CancelVerdict
from schemas.keys import JobState
from tests.docs_kit import DOCS, Block, blocks_of

BLOCKS = [block for page in sorted(DOCS.rglob("*.md")) for block in blocks_of(page)]
CLIENT = (DOCS / "client.md").read_text()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_a_python_block_compiles(block: Block) -> None:
    block.compiled()


def test_a_block_that_does_not_compile_is_told_with_its_line() -> None:
    with pytest.raises(SyntaxError) as caught:
        Block(DOCS / "x.md", "X", 41, "x = 1\ny =\n").compiled()
    assert caught.value.lineno == 42


def test_every_error_is_in_the_clients_table() -> None:
    kinds = {
        kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and kind.__base__ is ProducerError
    }
    table = CLIENT.split("## Errors")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == kinds
    for code in ClientErrorCode:
        assert f"`{code}`" in table


def test_every_method_and_every_option_of_waiting_and_submitting_is_described() -> None:
    public = [name for name, _ in inspect.getmembers(AsyncGenerationClient, callable) if not name.startswith("_")]
    for name in {*public} - {"aclose", "from_settings"}:
        assert re.search(rf"\b{name}\(", CLIENT), name
    for method in (AsyncGenerationClient.result, AsyncGenerationClient.submit):
        for option in {*inspect.signature(method).parameters} - {"self", "job_id", "request", "fields", "run"}:
            assert option in CLIENT, option


def test_every_state_that_a_cancellation_can_find_and_every_verdict_is_named() -> None:
    table = CLIENT.split("## Cancel")[1].split("\n## ")[0]
    assert {*JobState, *CancelVerdict} <= set(re.findall(r"`(\w+)`", table))
