"""Why a request may be refused although it matches the document: rules that no schema can express.

Schemathesis loads this module. A refusal that isn't listed here is an error in the document.
"""

import re
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.openapi.checks import RejectedPositiveData

REASONS = (
    # JSON Schema accepts 8.0 as an integer, this service doesn't
    r"Input should be a valid integer",
    # Schemathesis thinks that a plain 0 matches this header's pattern
    r"Last-Event-ID must be the id of an event",
    # only the service knows which ids are in a list
    r"must be an id from the list",
    # only the service knows other requests with the same key
    r"this Idempotency-Key was already used with a different body",
    # a schema can't tell whether a string is an image
    r"must be (base64|a PNG, JPEG or WebP image)",
    # a model's own limits are in the deployment's catalog
    r"a job of \w+ can have at most \d+",
    r"(width|height) must be a multiple of \d+",
    # fields of other servers are accepted while they're off, which may depend on their content
    r"isn't supported",
    r"make \d+ images, more than \d+",
    r"they mean the same, so send one of them",
    # `extra_body` has the fields of the body that it's in
    r"Unknown parameter: ",
    r"width and height make \d+x\d+, more than \d+ pixels",
    r"(steps|guidance_scale) must be between \d+ and \d+",
)


_LENIENT = ("/sdapi/", "/internal/")
"""Routes that read numbers and flags of other types, as A1111 does."""


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext,
    failure: Failure,
    case: schemathesis.Case[Any],
    response: schemathesis.Response,
) -> bool:
    """Whether a failure counts."""
    if isinstance(failure, AcceptedNegativeData) and case.operation.path.startswith(_LENIENT):
        return False
    known = any(re.search(reason, response.text) for reason in REASONS)
    return not (isinstance(failure, RejectedPositiveData) and known)
