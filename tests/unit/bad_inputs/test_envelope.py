"""Entries that are no requests: each ends with its own event, or as a dead letter where no job id can be read."""

import json

import pytest

from producer.errors import RequestRefused
from producer.requests import make_request
from schemas.entries import decode_entry
from tests.unit.bad_inputs.envelopes import CATALOGUE, ENVELOPES
from tests.unit.bad_inputs.kit import FINE, JOB_ID, Case, case_name, judged


def test_the_catalogue_counts_24_envelopes() -> None:
    """Two bodies under one id are the 24th: which of them owns the run is for the queue to say."""
    assert len({case.name for case in CATALOGUE}) >= 23
    assert len({case.name for case in ENVELOPES}) == len(ENVELOPES)


@pytest.mark.parametrize("case", ENVELOPES, ids=case_name)
async def test_an_envelope_ends_as_the_contract_has_it(case: Case) -> None:
    """Guards `decode_request` and `strict_json.loads`, which let pass what is not refused here."""
    assert await judged(case.beside_its_id()) == case.outcome


@pytest.mark.parametrize("case", ENVELOPES, ids=case_name)
def test_a_job_id_is_read_from_an_envelope_where_there_is_one(case: Case) -> None:
    """Guards `strict_json.salvage_string`; what it cannot name is buried."""
    entry = decode_entry(case.bare())
    assert entry.job_id == (JOB_ID if case.named else None)
    assert (entry.error is None) is (case.outcome is FINE)
    assert entry.raw == case.bare().get(b"payload", b"")


@pytest.mark.parametrize("case", [case for case in ENVELOPES if case.fields is not None], ids=case_name)
def test_the_client_refuses_what_a_consumer_would(case: Case) -> None:
    """Guards the last look of `producer.requests.make_request`: it decodes what it is about to send."""
    if case.outcome is FINE:
        make_request(case.fields or {})
        return
    with pytest.raises(RequestRefused) as caught:
        make_request(case.fields or {})
    assert caught.value.error_code == case.outcome.code
    assert "X-Amz" not in f"{caught.value} {json.dumps(caught.value.details)}"
