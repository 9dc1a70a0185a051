"""A check for schemathesis: what /openapi.json calls a valid request is answered, but for what no schema can say.

    SCHEMATHESIS_HOOKS=described_requests st run http://HOST:PORT/openapi.json --checks all \
        --exclude-checks positive_data_acceptance --continue-on-failure --seed 1 -n 300

in this folder stands in for the check of schemathesis itself, which knows of no exceptions.
"""

# pyright: reportMissingImports=false
import re
from typing import Any

import schemathesis

NOT_SAYABLE = (
    r"Prompt is too long",  # a schema counts characters, the context holds tokens
    r"'min_tokens' is \d+, and the answer has room for",  # no schema compares two fields
    r"'n' asks for \d+ answers to all prompts",  # nor multiplies them
)


@schemathesis.check
def described_requests_are_answered(_context: Any, response: Any, case: Any) -> None:
    """Fails for a refusal of a request that was made to be valid."""
    mode = case.meta and case.meta.generation.mode
    if response.status_code != 400 or mode is None or not mode.is_positive:
        return
    message = response.json()["error"]["message"]
    assert re.match("|".join(NOT_SAYABLE), message), f"refused: {message}"
