"""Files that are no LoRA: refused for good, for the right reason, and before they cost any memory."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from consumer.errors import LoraInvalid
from consumer.lora import formats
from consumer.lora.formats import parse
from consumer.lora.tensors import FileTensors
from producer.lora_check import check_lora
from schemas.entries import decode_entry
from schemas.errors import ErrorCode
from schemas.lora import adapter_config
from schemas.lora.adapter_config import METADATA_KEY, AdapterConfig
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import MAX_HEADER_BYTES, Header, read_header
from schemas.lora.sdxl_base import sdxl_base
from tests.lora_bytes import ACCEPTED_BY_THE_FORMAT, REFUSED_BY_THE_FORMAT
from tests.unit.bad_inputs.kit import Outcome, failed, payload
from tests.unit.bad_inputs.lora_files import (
    ACCEPTED,
    BAD_FILES,
    BIG,
    BROKEN,
    DOWN,
    GOOD,
    MEANT_FOR_OTHERS,
    UP,
    BadFile,
    a_file,
    file_name,
    zeros,
)

SDXL = sdxl_base()
PEAK_BYTES = 4 * MAX_HEADER_BYTES  # as bytes, as text, and what the parser has of it
REFUSED = Outcome(ErrorCode.LORA_LOAD_FAILED, None, dead_lettered=False)


def test_the_catalogue_counts_54_files() -> None:
    assert (len(BROKEN) >= 33, len(ACCEPTED) >= 11, len(MEANT_FOR_OTHERS) >= 10) == (True, True, True)
    names = {file.name for file in BAD_FILES}
    assert len(names) == len(BAD_FILES) >= 54
    assert names >= REFUSED_BY_THE_FORMAT.keys()
    assert names >= ACCEPTED_BY_THE_FORMAT.keys() - {"NaN", "Inf"}


def test_the_file_that_the_others_are_made_from_is_taken(tmp_path: Path) -> None:
    path = BadFile("good", GOOD, "").write(tmp_path)
    assert parse(path, SDXL).modules == 1
    assert check_lora(path).refusal is None


def no_reader(*_: object, **__: object) -> None:
    pytest.fail("the weights are read")


@pytest.mark.parametrize("file", BAD_FILES, ids=file_name)
async def test_a_bad_file_ends_its_job_for_good_and_before_its_weights_are_touched(
    tmp_path: Path, file: BadFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards each `raise` of `schemas.lora` and of `formats._deltas`: `said` is the text of one of them.

    And the order in `formats.parse`: `plan` before `FileTensors`.
    """
    path = file.write(tmp_path)
    if not file.by_value:
        monkeypatch.setattr(formats, "FileTensors", no_reader)
    with pytest.raises(LoraInvalid, match=re.escape(file.said)) as refusal:
        parse(path, SDXL)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500
    assert len(json.dumps(refusal.value.details)) < 1000
    entry = decode_entry({b"payload": payload()})
    assert await failed(entry, refusal.value) == REFUSED


@pytest.mark.parametrize("file", BAD_FILES, ids=file_name)
def test_the_check_before_publishing_says_what_a_consumer_says(tmp_path: Path, file: BadFile) -> None:
    """Guards that `check_lora` and `parse` read the header with the same code."""
    path = file.write(tmp_path)
    with pytest.raises(LoraInvalid) as refusal:
        parse(path, SDXL)
    report = check_lora(path)
    if file.by_value:
        assert report.refusal is None  # it reads no weights, and says so
        return
    assert report.refusal is not None
    assert (str(report.refusal), report.refusal.details) == (str(refusal.value), refusal.value.details)


@pytest.mark.parametrize("file", [*BIG, *(file for file in ACCEPTED if "60k" in file.name)], ids=file_name)
def test_a_big_file_costs_no_more_memory_than_a_header_may_have(tmp_path: Path, file: BadFile) -> None:
    """Guards `length > MAX_HEADER_BYTES` in `read_header`, and `_refuse_crowds`, before anything is parsed."""
    path = file.write(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(LoraUnusable, match=re.escape(file.said)):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


def test_a_file_with_as_many_tensors_as_are_allowed_is_no_crowd(tmp_path: Path) -> None:
    """Guards `_MAX_TOKENS` against being too low: four dimensions each, and metadata besides."""
    tensors = {f"unet.{number}.lora_A.weight": zeros(1, 1, 1, 1, dtype="U8", item_bytes=1) for number in range(20_000)}
    raw = a_file(tensors, {f"ss_{number}": "a, [b], {c}, \\" for number in range(500)})
    assert len(read_header(BadFile("full", raw, "").write(tmp_path)).tensors) == 20_000


def test_what_matches_nothing_is_not_read_however_big_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `parse`, which reads the planned deltas' tensors alone."""
    read: list[str] = []

    def noting(path: Path, header: Header, names: list[str]) -> FileTensors:
        read.extend(names)
        return FileTensors(path, header, names)

    monkeypatch.setattr(formats, "FileTensors", noting)
    strange = {f"unet.extra.lora_{half}.weight": zeros(2, 2) for half in "AB"}
    path = BadFile("with more", a_file({DOWN: zeros(1, 640), UP: zeros(640, 1), **strange}), "").write(tmp_path)
    assert sorted(parse(path, SDXL).skipped) == sorted(strange)
    assert read == [DOWN, UP]


def test_each_alpha_pattern_is_read_once_however_many_modules_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `AdapterConfig._patterns`: searched for each module, a mebibyte of patterns takes a consumer minutes."""

    class Counting:
        read = 0

        def fullmatch(self, text: str) -> re.Match[str] | None:
            self.read += 1
            return re.fullmatch(r"(?P<path>[\w.]+)", text)

    counting = Counting()
    monkeypatch.setattr(adapter_config, "_LITERAL_PATTERN", counting)
    patterns = {"attn1.to_q": 3, "to_q": 4, **{f"module_{number}": 1 for number in range(1000)}}
    config = AdapterConfig({METADATA_KEY: json.dumps({"alpha_pattern": patterns})})
    alphas = [config.alpha(module, 8) for module in SDXL.weights]
    assert (set(alphas), counting.read) == ({3.0, 4.0, 8.0}, 3 * len(patterns))  # of each component
