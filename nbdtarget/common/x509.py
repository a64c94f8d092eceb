# SPDX-License-Identifier: Apache-2.0
"""What files of certificates say: until when they are valid, and whose they are. Nothing is verified here.

    certificate           notAfter
    list of withdrawn     nextUpdate, if it has one: from then on OpenSSL accepts no certificate of that authority
    certificates (CRL)

Python's ssl module decodes no file, and no certificate that was refused, so the few fields are taken out of DER here.
Source: RFC 5280, 4.1 and 5.1.
"""

import base64
import re
from calendar import timegm
from collections.abc import Iterator
from typing import Final, NamedTuple

from nbdtarget.common.errors import NbdTargetError

__all__ = [
    "FILE_MAX",
    "End",
    "earliest_end",
    "element",
    "first_certificate",
    "subject_of",
]

FILE_MAX: Final = 64 << 20  # bytes; lists of withdrawn certificates may be long
_BLOCK: Final = re.compile(
    rb"-----BEGIN (CERTIFICATE|X509 CERTIFICATE|TRUSTED CERTIFICATE|X509 CRL)-----(.*?)-----END \1-----",
    re.DOTALL,
)
_INTEGER: Final = 0x02
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_TIMES: Final = (0x17, 0x18)  # UTCTime, GeneralizedTime
_COMMON_NAME: Final = b"\x55\x04\x03"


class End(NamedTuple):
    """Until when something is valid, in Unix time, and its subject, or the authority that made the list."""

    expires_s: float
    name: str


def earliest_end(path: str) -> End | None:
    """Return what ends first of all certificates and lists in a PEM file.

    None: nothing in it ends, as a list need not. Raises: NbdTargetError: there is none in it.
    """
    try:
        ends = [_end(label, der) for label, der in _blocks(path)]
    except (ValueError, IndexError):
        ends = []
    if not ends:
        raise NbdTargetError(f"{path}: has no certificate in PEM")
    return min((end for end in ends if end is not None), default=None)


def first_certificate(path: str) -> bytes:
    """Return the first certificate of a PEM file, in DER. Raises: NbdTargetError: it cannot be read; ValueError: it has none."""
    for label, der in _blocks(path):
        if not label.endswith(b"CRL"):
            return der
    raise ValueError("no certificate")


def _blocks(path: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield label and content of what is in a PEM file. Raises: NbdTargetError: it cannot be read; ValueError."""
    try:
        with open(path, "rb") as file:
            text = file.read(FILE_MAX)
    except OSError as error:
        raise NbdTargetError(f"{path}: {error.strerror or error}") from None
    for label, content in _BLOCK.findall(text):
        yield label, base64.b64decode(content)


def subject_of(der: bytes) -> str:
    """Return the common name of a certificate's subject; without one, all that the subject says.

    Raises: ValueError, IndexError: it is not DER.
    """
    return _name(_fields_of_certificate(der)[1])


def _end(label: bytes, der: bytes) -> End | None:
    """Raises: ValueError, IndexError."""
    if label.endswith(b"CRL"):
        return _end_of_list(der)
    validity, subject = _fields_of_certificate(der)
    _, _, behind = element(validity)
    _, not_after, _ = element(behind)
    return End(_time(not_after), _name(subject))


def _fields_of_certificate(der: bytes) -> tuple[bytes, bytes]:
    """Return validity and subject."""
    behind = _signed(der)
    tag, _, after_version = element(behind)
    if tag == _VERSION:
        behind = after_version
    for _ in ("serial number", "algorithm", "issuer"):
        _, _, behind = element(behind)
    tag, validity, behind = element(behind)
    if tag != _SEQUENCE:
        raise ValueError("no validity")
    _, subject, _ = element(behind)
    return validity, subject


def _end_of_list(der: bytes) -> End | None:
    behind = _signed(der)
    tag, _, after_version = element(behind)
    if tag == _INTEGER:
        behind = after_version
    _, _, behind = element(behind)  # the algorithm
    _, issuer, behind = element(behind)
    _, _, behind = element(behind)  # thisUpdate
    tag, next_update, _ = element(behind) if behind else (0, b"", b"")
    return End(_time(next_update), _name(issuer)) if tag in _TIMES else None


def _signed(der: bytes) -> bytes:
    """Return the content of what is signed, without the signature."""
    _, outer, _ = element(der)
    _, signed, _ = element(outer)
    return signed


def _name(name: bytes) -> str:
    values: list[tuple[bytes, str]] = []
    while name:
        _, one, name = element(name)
        while one:
            _, pair, one = element(one)
            _, kind, behind = element(pair)
            _, value, _ = element(behind)
            values.append((kind, value.decode("utf-8", "replace")))
    common = [value for kind, value in values if kind == _COMMON_NAME]
    return ", ".join(common or [value for _, value in values])


def _time(text: bytes) -> float:
    digits = text.decode("ascii")
    # UTCTime has two digits for the year, of 1950 to 2049; GeneralizedTime has four.
    if len(digits) == 13:
        digits = ("19" if digits >= "50" else "20") + digits
    year, *others = (int(digits[at : at + 2]) for at in range(2, 14, 2))
    return float(timegm((int(digits[:2]) * 100 + year, *others)))


def element(data: bytes) -> tuple[int, bytes, bytes]:
    """Return the tag and content of the first element of DER, and what is behind it. Raises: ValueError, IndexError."""
    tag, length, begin = data[0], data[1], 2
    if length & 0x80:
        nr_bytes = length & 0x7F
        begin += nr_bytes
        length = int.from_bytes(data[2:begin], "big")
    if begin + length > len(data):
        raise ValueError("cut off")
    return tag, data[begin : begin + length], data[begin + length :]
