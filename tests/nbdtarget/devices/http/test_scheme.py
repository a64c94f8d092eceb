# SPDX-License-Identifier: Apache-2.0
"""URLs as names of devices. What all remote images have in common: ../ranged/test_scheme.py."""

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.resolve import absolute_name, identity, open_device


async def test_refusals_hold_no_secret() -> None:
    with pytest.raises(ResolveError, match="can only be read") as caught:
        await open_device("https://h/a?secret")
    assert "secret" not in str(caught.value)


def test_identity_and_absolute_name() -> None:
    assert identity("http://H/a") == identity("http://h:80/a#connections=3")
    assert identity("http://h/a?x=1") != identity("http://h/a?x=2")
    assert (
        absolute_name("https://h/a?x#ca=c.pem", "/srv") == "https://h/a?x#ca=/srv/c.pem"
    )
