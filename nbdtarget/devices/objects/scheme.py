# SPDX-License-Identifier: Apache-2.0
"""Device names that are URLs of objects. What such a URL says: `nbdtarget.devices.objects.url`."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.objects.url import parse_object_url
from nbdtarget.devices.ranged.options import (
    REMOTE_COPY_BYTES,
    REMOTE_IN_FLIGHT_BYTES,
    absolute_options,
)
from nbdtarget.devices.scheme import Scheme

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["AzureScheme", "GcsScheme", "S3Scheme"]


class S3Scheme(Scheme):
    name: ClassVar[str] = "s3"
    syntax: ClassVar[str] = "s3://BUCKET/KEY"
    summary: ClassVar[str] = (
        "an object in S3 or a store that speaks its protocol, read-only; needs nbdtarget[objects]"
    )
    modules: ClassVar[tuple[str, ...]] = ("obstore",)

    async def open(self, name: str, *, read_only: bool) -> "Device":
        from nbdtarget.devices.http.url_command import url_command_for
        from nbdtarget.devices.objects.store import ObjectStore
        from nbdtarget.devices.ranged.device import open_ranged, refuse_writing

        refuse_writing(name, read_only=read_only)
        url = parse_object_url(name)
        store = ObjectStore(url, url_command_for(url.place))
        return await open_ranged(name, url.place, store, url.options)

    def identity(self, name: str) -> Hashable:
        try:
            return parse_object_url(name).identity
        except ResolveError:
            return name

    def is_read_only(self, name: str) -> bool:
        return True

    def copy_sizes(self, name: str) -> tuple[int, int]:
        return REMOTE_COPY_BYTES, REMOTE_IN_FLIGHT_BYTES

    def absolute(self, name: str, directory: str) -> str:
        return absolute_options(name, directory)


class GcsScheme(S3Scheme):
    name: ClassVar[str] = "gs"
    syntax: ClassVar[str] = "gs://BUCKET/KEY"
    summary: ClassVar[str] = "an object in Google Cloud Storage, the same"


class AzureScheme(S3Scheme):
    name: ClassVar[str] = "az"
    syntax: ClassVar[str] = "az://CONTAINER/PATH"
    summary: ClassVar[str] = "a blob in Azure, the same"
