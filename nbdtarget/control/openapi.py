# SPDX-License-Identifier: Apache-2.0
"""The control socket described for machines: OpenAPI 3.1, made from the message types.

Descriptions of fields are those of the types in `messages` and `status_fields`, and the examples are objects of these
types in `examples`. `docs/openapi.json` is what `python -m nbdtarget.control.openapi` prints; a test
holds the two together.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from nbdtarget import __version__
from nbdtarget.control import messages as m
from nbdtarget.control.examples import EXAMPLES, FAILURE
from nbdtarget.control.status_fields import STATUS_FIELDS
from nbdtarget.control.verbs import Verbs

__all__ = ["openapi"]

_REFERENCE = "#/components/schemas/{name}"
_DESCRIPTION = (
    "device-mapper's verbs over HTTP and JSON. The control socket is a unix socket,"
    " for example /run/nbdtarget/control.sock: `curl --unix-socket PATH http://x/v1/status`. A request"
    " with a field that is not described here is refused."
)


def openapi() -> dict[str, Any]:
    """Return the document."""
    messages = [m.Failure, *(each for pair in m.VERBS.values() for each in pair)]
    unique = list(dict.fromkeys([*messages, *STATUS_FIELDS.values()]))
    schemas, components = msgspec.json.schema_components(
        unique, ref_template=_REFERENCE
    )
    references = dict(zip(unique, schemas, strict=True))
    for component in components.values():
        component["description"] = inspect.cleandoc(component["description"])
    _type_fields(components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nbdtarget control socket",
            "version": __version__,
            "description": _DESCRIPTION,
        },
        "paths": {f"/v1/{verb}": _path(verb, references) for verb in m.VERBS},
        "components": {
            "schemas": dict(sorted(components.items())),
            "responses": {
                "Failure": {
                    "description": "The reason of the failure, with a positive errno.",
                    "content": _json(references[m.Failure], FAILURE),
                }
            },
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Only if the server has a token, as it must on TCP.",
                }
            },
        },
        "security": [{}, {"token": []}],
    }


def _type_fields(components: dict[str, Any]) -> None:
    """Say which fields a status line has, instead of "any"."""
    fields = components["TableLine"]["properties"]["fields"]
    del fields["additionalProperties"]
    names = {type_: each.__name__ for type_, each in STATUS_FIELDS.items()}
    fields["anyOf"] = [
        *({"$ref": _REFERENCE.format(name=name)} for name in names.values()),
        {"type": "object", "maxProperties": 0},
    ]
    by_type = ", ".join(f"`{type_}`: {name}" for type_, name in names.items())
    fields["description"] += f" {by_type}; other types have none."


def _path(verb: str, references: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    request_type, answer_type = m.VERBS[verb]
    request, answer = EXAMPLES[verb]
    responses = {
        "200": {
            "description": "The verb has been carried out.",
            "content": _json(references[answer_type], answer),
        },
        "4XX": {"$ref": "#/components/responses/Failure"},
        "5XX": {"$ref": "#/components/responses/Failure"},
    }
    summary = (inspect.getdoc(getattr(Verbs, verb)) or verb).splitlines()[0]
    needed = any(
        field.default is msgspec.NODEFAULT
        and field.default_factory is msgspec.NODEFAULT
        for field in msgspec.structs.fields(request_type)
    )
    path: dict[str, Any] = {
        "post": {
            "operationId": verb,
            "summary": summary,
            "requestBody": {
                "required": needed,
                "content": _json(references[request_type], request),
            },
            "responses": responses,
        }
    }
    if verb in m.READING_VERBS:
        get: dict[str, Any] = {
            "operationId": f"{verb}_all",
            "summary": summary,
            "responses": responses,
        }
        if any(field.name == "names" for field in msgspec.structs.fields(request_type)):
            get["parameters"] = [
                {
                    "name": "name",
                    "in": "query",
                    "description": "Name of a device; may be given more than once. Default: all.",
                    "schema": {"type": "array", "items": {"type": "string"}},
                    "example": ["disk"],
                }
            ]
        path["get"] = get
    return path


def _json(schema: dict[str, Any], example: msgspec.Struct) -> dict[str, Any]:
    """Args: example: of the schema; fields that have their default are left out."""
    shown = {
        field.encode_name: value
        for field in msgspec.structs.fields(example)
        if (value := getattr(example, field.name)) != field.default
    }
    return {
        "application/json": {"schema": schema, "example": msgspec.to_builtins(shown)}
    }


if __name__ == "__main__":
    print(json.dumps(openapi(), indent=2, ensure_ascii=False))
