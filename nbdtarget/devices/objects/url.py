# SPDX-License-Identifier: Apache-2.0
"""Parses the URL of an object: `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `az://CONTAINER/PATH`, and options behind a `#`.

Besides the options of all remote images (`nbdtarget.devices.ranged.options`):

    endpoint=URL      where the store is, if it is not the provider's own: an S3 of another maker, for example
    region=NAME       s3; the environment's, or us-east-1
    account=NAME      az; the environment's
    version=ID        s3: this version of the object, in a bucket that keeps versions
    anonymous=yes     without credentials

Credentials never stand in a URL. They come from the environment and from where the provider's own tools find them, or from
a command (`nbdtarget.devices.objects.credentials`).
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.ranged.options import SourceOptions, parse_options

__all__ = ["OBJECT_SCHEMES", "ObjectUrl", "parse_object_url"]

OBJECT_SCHEMES: Final = {
    "s3": ("endpoint", "region", "version", "anonymous"),
    "gs": ("endpoint", "anonymous"),
    "az": ("endpoint", "account", "anonymous"),
}


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """See the module head.

    Attributes:
        place: the URL without options, for metadata.
    """

    scheme: str
    bucket: str
    key: str
    place: str
    options: SourceOptions

    @property
    def identity(self) -> Hashable:
        """Return the same value for each way to write this URL."""
        said = self.options.said
        where = tuple(said.get(key, "") for key in ("endpoint", "account", "version"))
        return ("url", self.scheme, self.bucket, self.key, where)


def parse_object_url(name: str) -> ObjectUrl:
    """Take the name of a device apart. Raises: ResolveError."""
    parts = urlsplit(name)
    scheme = parts.scheme.lower()
    what = "container" if scheme == "az" else "bucket"
    if "@" in parts.netloc or parts.query:
        reason = "credentials do not stand in the URL: they come from the environment or from a command"
        raise ResolveError(name, reason)
    key = unquote(parts.path.removeprefix("/"))
    if not parts.netloc or not key:
        raise ResolveError(name, f"write {scheme}://{what.upper()}/KEY")
    options = parse_options(name, parts.fragment, OBJECT_SCHEMES[scheme])
    anonymous = options.said.get("anonymous", "no")
    if anonymous not in ("yes", "no"):
        raise ResolveError(name, f"anonymous is yes or no, not {anonymous}")
    place = f"{scheme}://{parts.netloc}{parts.path}"
    return ObjectUrl(scheme, parts.netloc, key, place, options)
