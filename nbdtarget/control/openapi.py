# SPDX-License-Identifier: Apache-2.0
"""The control socket described for machines: OpenAPI 3.1, made from the message types.

`docs/openapi.json` is what `python -m nbdtarget.control.openapi` prints; a test holds the two
together.
"""

import inspect
import json
from typing import Any

import msgspec

from nbdtarget import __version__
from nbdtarget.control import messages as m
from nbdtarget.control.verbs import Verbs

__all__ = ["openapi"]


def openapi() -> dict[str, Any]:
    """Return the document."""
    types = [m.Failure, *(each for pair in m.VERBS.values() for each in pair)]
    unique = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(
        unique, ref_template="#/components/schemas/{name}"
    )
    references = dict(zip(unique, schemas, strict=True))
    paths = {
        f"/v1/{verb}": _path(verb, references[request], references[answer], request)
        for verb, (request, answer) in m.VERBS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nbdtarget control socket",
            "version": __version__,
            "description": "device-mapper's verbs over HTTP and JSON, on a unix socket.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "responses": {
                "Failure": {
                    "description": "What was wrong, with a positive errno.",
                    "content": _json(references[m.Failure]),
                }
            },
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only when the server was given a token.",
                }
            },
        },
        "security": [{}, {"token": []}],
    }


def _path(
    verb: str, request: dict[str, Any], answer: dict[str, Any], type_: type[m.Request]
) -> dict[str, Any]:
    responses = {
        "200": {"description": "Done.", "content": _json(answer)},
        "4XX": {"$ref": "#/components/responses/Failure"},
        "5XX": {"$ref": "#/components/responses/Failure"},
    }
    summary = (inspect.getdoc(getattr(Verbs, verb)) or verb).splitlines()[0]
    needed = any(
        field.default is msgspec.NODEFAULT
        and field.default_factory is msgspec.NODEFAULT
        for field in msgspec.structs.fields(type_)
    )
    path: dict[str, Any] = {
        "post": {
            "operationId": verb,
            "summary": summary,
            "requestBody": {"required": needed, "content": _json(request)},
            "responses": responses,
        }
    }
    if verb in m.READING_VERBS:
        get: dict[str, Any] = {
            "operationId": f"{verb}_all",
            "summary": summary,
            "responses": responses,
        }
        if any(field.name == "names" for field in msgspec.structs.fields(type_)):
            get["parameters"] = [
                {
                    "name": "name",
                    "in": "query",
                    "description": "A device; may be given more than once. Default: all.",
                    "schema": {"type": "array", "items": {"type": "string"}},
                }
            ]
        path["get"] = get
    return path


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


if __name__ == "__main__":
    print(json.dumps(openapi(), indent=2, ensure_ascii=False))
