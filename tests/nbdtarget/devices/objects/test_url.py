# SPDX-License-Identifier: Apache-2.0
"""URLs of objects: their parts, and what is refused."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.objects.url import parse_object_url


def test_parts() -> None:
    url = parse_object_url(
        "S3://my-bucket/a%20b/c.img#region=eu-1&endpoint=http://h:9000&pin=size"
    )
    assert (url.scheme, url.bucket, url.key) == ("s3", "my-bucket", "a b/c.img")
    assert url.place == "s3://my-bucket/a%20b/c.img"
    assert url.options.said == {
        "region": "eu-1",
        "endpoint": "http://h:9000",
        "pin": "size",
    }
    assert url.options.is_pinned_by_size


def test_identity() -> None:
    def same(a: str, b: str) -> bool:
        return parse_object_url(a).identity == parse_object_url(b).identity

    assert same("s3://b/k", "s3://b/k#connections=3")
    assert not same("s3://b/k", "s3://b/k#endpoint=http://h")
    assert not same("s3://b/k", "s3://b/k#version=2")
    assert not same("s3://b/k", "gs://b/k")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://key:secret@bucket/a", "credentials do not stand in the URL"),
        ("s3://bucket/a?X-Amz-Signature=secret", "credentials do not stand in the URL"),
        ("s3://bucket", "write s3://BUCKET/KEY"),
        ("az://c/", "write az://CONTAINER/KEY"),
        ("s3://b/k#account=x", "unknown option `account' behind the #"),
        ("gs://b/k#anonymous=1", "anonymous is yes or no, not 1"),
    ],
)
def test_mistakes(name: str, says: str) -> None:
    with pytest.raises(ResolveError) as caught:
        parse_object_url(name)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
