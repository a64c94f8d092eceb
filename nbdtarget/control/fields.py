# SPDX-License-Identifier: Apache-2.0
"""Shared by the messages of several verbs: their base classes, and fields with their descriptions."""

from typing import Annotated

import msgspec

__all__ = [
    "Answer",
    "BelowLine",
    "Certificate",
    "FailureText",
    "Losses",
    "Name",
    "Names",
    "Remote",
    "Request",
    "Uuid",
    "told",
]


def told(description: str) -> msgspec.Meta:
    """Describe a field for the OpenAPI document."""
    return msgspec.Meta(description=description)


Name = Annotated[str, told("Name of a mapped device, which is also its export's.")]
Names = Annotated[
    tuple[str, ...],
    told(
        "Names of mapped devices, answered in this order. An empty list means all devices."
    ),
]
Uuid = Annotated[str, told("UUID: any text of up to 128 bytes, or empty for none.")]
FailureText = Annotated[
    str,
    told("Reason why the device has no table although it should have one; else empty."),
]
Losses = Annotated[
    int,
    told(
        "How many times writes that were not flushed yet may have been lost. The next FLUSH of each client"
        " has failed because of it."
    ),
]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """The fields that a verb is given."""


# Answers are trees, made of values. So the collector of reference cycles need not follow them, which costs as much as making them.
class Answer(msgspec.Struct, gc=False):
    """The fields that a verb gives back. New fields need defaults: an old client skips them."""


class Remote(Answer):
    """The requests and the time that a disk of another machine has cost since it was opened."""

    requests: Annotated[int, told("Requests that were sent.")] = 0
    retries: Annotated[
        int,
        told(
            "Requests that had to be sent again; of an NBD server, attempts to connect again."
        ),
    ] = 0
    received_bytes: Annotated[int, told("Bytes of the disk that have come.")] = 0
    away_s: Annotated[float, told("Seconds that it has not answered, added up.")] = 0.0


class BelowLine(Answer):
    """One disk that a live table uses, directly or through other tables."""

    name: Annotated[str, told("Path or URI of the disk.")]
    state: Annotated[
        str,
        told(
            "`ok`; `latched`: a write or a flush has failed, and no FLUSH succeeds until the disk is"
            " opened again; `lost`: the disk does not answer any more."
        ),
    ] = "ok"
    errno: Annotated[int, told("Of a disk that is latched or lost: the errno.")] = 0
    since_s: Annotated[
        float, told("Of a disk that is latched or lost: since when, in Unix time.")
    ] = 0.0
    errors: Annotated[
        dict[str, int],
        told("How many requests have failed since the disk was opened, by operation."),
    ] = {}
    last_error: Annotated[str, told("The last failure, or empty.")] = ""
    losses: Losses = 0
    remote: Annotated[
        Remote | None,
        told("Requests and time of a disk of another machine; null: it is none."),
    ] = None


class Certificate(Answer):
    """A file of certificates, or of withdrawn ones, that the server or one of its disks uses."""

    path: Annotated[str, told("The file.")]
    expires_s: Annotated[
        float, told("Until when everything in it is valid, in Unix time.")
    ]
