# SPDX-License-Identifier: Apache-2.0
"""Names of RBD images, of ours and of QEMU's."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.rbd_name import RbdImage, parse_rbd, parse_rbd_of_qemu


@pytest.mark.parametrize(
    ("what", "image"),
    [
        ("image", RbdImage("rbd", "", "image", "")),
        ("pool/image", RbdImage("pool", "", "image", "")),
        ("pool/space/image@snap", RbdImage("pool", "space", "image", "snap")),
    ],
)
def test_name_of_ours(what: str, image: RbdImage) -> None:
    assert parse_rbd("rbd:x", what, "", "") == image
    assert parse_rbd("rbd:x", str(image).removeprefix("rbd:"), "", "") == image


@pytest.mark.parametrize("what", ["", "@s", "p/", "/i", "p/i@", "p/i@a@b", "a/b/c/d"])
def test_refused_names(what: str) -> None:
    with pytest.raises(ResolveError, match="write rbd:POOL/IMAGE"):
        parse_rbd("rbd:x", what, "", "")


def test_name_of_qemu_with_colons_in_it() -> None:
    found = parse_rbd_of_qemu("x", r"rbd:p/a\:b@s:conf=/e\:f:id=me")
    assert found == RbdImage("p", "", "a:b", "s", "/e:f", "me")
    with pytest.raises(ResolveError, match="write rbd:POOL/IMAGE"):
        parse_rbd_of_qemu("x", "rbd:p/a:mon_host=h")
    with pytest.raises(ResolveError, match="an option stands twice"):
        parse_rbd_of_qemu("x", "rbd:p/a:id=me:id=you")


def test_words_for_qemu_and_for_rbd() -> None:
    image = RbdImage("p", "n", "i", "s", "/c", "me")
    assert image.qemu_options() == {
        "pool": "p",
        "namespace": "n",
        "image": "i",
        "snapshot": "s",
        "conf": "/c",
        "user": "me",
    }
    # The snapshot is looked for among those of the image.
    assert image.rbd_words() == (
        *("--pool", "p", "--image", "i", "--namespace", "n"),
        *("--conf", "/c", "--id", "me"),
    )
    assert RbdImage("p", "", "i", "").rbd_words() == ("--pool", "p", "--image", "i")
