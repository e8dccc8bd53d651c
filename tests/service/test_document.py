"""Schemathesis over the OpenAPI document: whatever it sends, the answers are as documented."""

from contextlib import ExitStack, nullcontext, suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.conftest import Deployment, working

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
EXAMPLES = 12
"""Requests per operation and mode."""


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_answers_are_as_documented(mill: Deployment, mode: GenerationMode) -> None:
    mill.store.register("w1", {"model": "demo", "state": "ready"}, 600)
    with ExitStack() as stack:
        for model in ("demo", "distilled", "idle"):
            stack.enter_context(working(mill, model=model))
        try_every_operation(mill, mode)


def try_every_operation(mill: Deployment, mode: GenerationMode) -> None:
    """Send each operation's requests and check the answers."""
    document = schemathesis.openapi.from_asgi("/openapi.json", mill.client.app)
    for found in document.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def conforms(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=list(CHECKS))

        # an operation whose requests cannot be wrong has no negative ones
        with suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else nullcontext():
            conforms()
