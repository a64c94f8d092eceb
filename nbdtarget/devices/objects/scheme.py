# SPDX-License-Identifier: Apache-2.0
"""Device names that are URLs of objects. What such a URL says: `nbdtarget.devices.objects.url`."""

from typing import TYPE_CHECKING, ClassVar

from nbdtarget.devices.objects.url import ObjectUrl, parse_object_url
from nbdtarget.devices.ranged.scheme import RangedScheme

if TYPE_CHECKING:
    from nbdtarget.devices.ranged.store import Store

__all__ = ["AzureScheme", "GcsScheme", "S3Scheme"]


class S3Scheme(RangedScheme):
    name: ClassVar[str] = "s3"
    syntax: ClassVar[str] = "s3://BUCKET/KEY"
    summary: ClassVar[str] = (
        "an object in S3 or a store that speaks its protocol, read-only; needs nbdtarget[objects]"
    )
    modules: ClassVar[tuple[str, ...]] = ("obstore",)

    def parse(self, name: str) -> ObjectUrl:
        return parse_object_url(name)

    def store(self, name: str) -> "Store":
        from nbdtarget.devices.http.url_command import url_command_for
        from nbdtarget.devices.objects.store import ObjectStore

        url = parse_object_url(name)
        return ObjectStore(url, url_command_for(url.place))


class GcsScheme(S3Scheme):
    name: ClassVar[str] = "gs"
    syntax: ClassVar[str] = "gs://BUCKET/KEY"
    summary: ClassVar[str] = "an object in Google Cloud Storage, the same"


class AzureScheme(S3Scheme):
    name: ClassVar[str] = "az"
    syntax: ClassVar[str] = "az://CONTAINER/PATH"
    summary: ClassVar[str] = "a blob in Azure, the same"
