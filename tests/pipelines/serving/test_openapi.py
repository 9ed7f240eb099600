"""The served OpenAPI document holds: schemathesis asks for what it allows and for what it forbids."""

from __future__ import annotations

from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from pipelines.serving.api.app import create_api
from pipelines.serving.api.service import Service
from tests.pipelines.serving.conftest import Running

DOCUMENT = create_api(cast(Service, None)).openapi()
OPERATIONS = [result.ok() for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]


@pytest.fixture(scope="module")
def headers(stub: Running) -> dict[str, str]:
    with stub.client_of("fuzz", requests_per_minute=100_000, max_active=10_000) as client:
        return {"Authorization": client.headers["Authorization"]}


def test_openapi_is_served_without_a_key(stub: Running) -> None:
    assert stub.client.get("/openapi.json", headers={"Authorization": ""}).json()["paths"] == DOCUMENT["paths"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=[operation.label for operation in OPERATIONS])
def test_openapi_operation_answers_as_its_document_says(stub: Running, headers: dict[str, str], operation: Any) -> None:
    takes_nothing = not (operation.body or operation.query or operation.headers or operation.path_parameters)
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    for mode in (positive,) if takes_nothing else (positive, negative):

        @settings(
            max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            # No schema can say which photos have a face in them, or which manifests there are.
            case.call_and_validate(
                base_url=stub.url, headers=headers, timeout=30, excluded_checks=[positive_data_acceptance]
            )

        ask()
