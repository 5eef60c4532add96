"""What makes schemathesis' requests reach the model, for `SCHEMATHESIS_HOOKS=tests.schemathesis_hooks`."""

from typing import Any

import schemathesis

_BROUGHT = {"messages": [{"role": "user", "content": "Hello"}], "input": "Hello", "prompt": "Hello"}
"""What stands in the place of nothing at all, which a schema allows for the sake of sessions."""
_PATHS = {
    "/v1/chat/completions": ("messages", "max_tokens", "max_completion_tokens"),
    "/v1/completions": ("prompt", "max_tokens"),
    "/v1/responses": ("input", "max_output_tokens"),
    "/v1/responses/compact": ("input", "max_output_tokens"),
    "/v1/messages": ("messages", "max_tokens"),
}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Ask something, if nothing is asked, and for a short answer, unless the limit is no number."""
    if context.operation.path not in _PATHS or not isinstance(body, dict):
        return body
    brings, *limits = _PATHS[context.operation.path]
    few = {limit: 3 for limit in limits if not isinstance(body.get(limit), str | list | dict | bool)}
    return {**body, **few, brings: body.get(brings) or _BROUGHT[brings]}
