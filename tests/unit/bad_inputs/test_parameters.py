"""Requests with a parameter outside the contract: refused by consumer and client alike, and by the same code."""

import json

import pytest

from producer.errors import RequestRefused
from producer.requests import make_request
from schemas.entries import decode_entry
from schemas.requests import decode_request
from tests.unit.bad_inputs.kit import FINE, JOB_ID, Case, case_name, judged
from tests.unit.bad_inputs.parameters import CATALOGUE, PARAMETERS

BUILT = [case for case in PARAMETERS if case.fields is not None]


def test_the_catalogue_counts_36_parameters() -> None:
    assert len({case.name for case in CATALOGUE if case.outcome is not FINE}) >= 36
    assert len({case.name for case in PARAMETERS}) == len(PARAMETERS)


@pytest.mark.parametrize("case", PARAMETERS, ids=case_name)
async def test_a_parameter_ends_as_the_contract_has_it(case: Case) -> None:
    """Guards the fields of `schemas.requests.GenerationRequest` and their rules in `schemas.fields`."""
    assert await judged(case.bare()) == case.outcome
    assert decode_entry(case.bare()).job_id == JOB_ID


@pytest.mark.parametrize("case", BUILT, ids=case_name)
def test_the_client_judges_a_parameter_as_a_consumer_does(case: Case) -> None:
    """Guards `producer.requests.make_request`."""
    if case.outcome is FINE:
        assert make_request(case.fields or {}) == decode_request(case.entry[b"payload"])
        return
    with pytest.raises(RequestRefused) as caught:
        make_request(case.fields or {})
    assert (caught.value.error_code, caught.value.job_id) == (case.outcome.code, JOB_ID)
    assert "X-Amz" not in f"{caught.value} {json.dumps(caught.value.details)}"
