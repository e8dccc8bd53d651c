"""What a request that fits the document may still be refused for, since no schema can say it.

Schemathesis loads this beside its checks. A refusal that is not listed here is a fault of the
document.
"""

import re
from typing import Any

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.openapi.checks import RejectedPositiveData

REASONS = (
    # JSON Schema takes 8.0 for an integer, this service does not
    r"Input should be a valid integer",
    # Schemathesis takes a plain 0 for a text of this header's declared pattern
    r"Last-Event-ID must be the id of a frame",
    # which ids are in a list is known to the service only
    r"must be an id of the list",
    # what else the same key came with is known to the service only
    r"this Idempotency-Key came before with another body",
    # that a text is a picture takes a reader of pictures
    r"must be (base64|a picture)",
    # a model's own limits are in the catalog, which each deployment has of its own
    r"a job of \w+ has at most \d+",
    r"(width|height) must be a multiple of \d+",
    r"width and height make \d+x\d+, more than \d+ pixels",
    r"(steps|guidance_scale) must be between \d+ and \d+",
)


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext,
    failure: Failure,
    case: schemathesis.Case[Any],
    response: schemathesis.Response,
) -> bool:
    """Whether a failure counts."""
    known = any(re.search(reason, response.text) for reason in REASONS)
    return not (isinstance(failure, RejectedPositiveData) and known)
