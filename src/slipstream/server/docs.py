"""What the server takes: `/docs`, a plain page that loads nothing from anywhere, and `/openapi.json`."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: #8881; padding: .75rem; overflow-x: auto; }
details { border-top: 1px solid #8884; padding: .4rem 0; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 4.5rem; }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #dfe2e8; } a { color: #8ab4ff; } }
"""


def add_routes(app: FastAPI) -> None:
    """Add the routes, answered on other threads than the event loop's: making the description takes a while."""

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(_page(app.openapi()), headers=_HEADERS)

    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())


def _page(api: Mapping[str, Any]) -> str:
    title = escape(f"{api['info']['title']} {api['info']['version']}")
    root = escape(api["servers"][0]["url"] if api.get("servers") else "", quote=True)
    operations = "".join(_operations(api["paths"]))
    schemas = "".join(_schema(name, schema) for name, schema in sorted(api["components"]["schemas"].items()))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>The same as <a href="{root}/openapi.json">OpenAPI</a>, for programs.</p>'
        f"<h2>Requests</h2>{operations}<h2>Bodies</h2>{schemas}</html>"
    )


def _operations(paths: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, operation in methods.items():
            parameters = "".join(
                f"<li><code>{escape(each['name'])}</code> in the {escape(each['in'])}</li>"
                for each in operation.get("parameters", ())
            )
            body = "".join(_links(operation.get("requestBody", {})))
            answers = "".join(_links(operation["responses"].get("200", operation["responses"].get("201", {}))))
            yield (
                f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code></summary><ul>{parameters}"
                f"<li>body: {body or 'none'}</li><li>answer: {answers or 'see docs/protocols.md'}</li></ul></details>"
            )


def _links(value: Any) -> Iterator[str]:
    """Links to the schemas that a part of the description names."""
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            name = escape(reference.rpartition("/")[2], quote=True)
            yield f'<a href="#{name}"><code>{name}</code></a> '
        for each in value.values():
            yield from _links(each)
    elif isinstance(value, list):
        for each in value:
            yield from _links(each)


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    told = escape(json.dumps(schema, indent=2))
    name = escape(name, quote=True)
    return f'<details id="{name}"><summary><code>{name}</code></summary><pre>{told}</pre></details>'
