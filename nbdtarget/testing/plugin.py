# SPDX-License-Identifier: Apache-2.0
"""The plugin that pytest loads by the entry point `nbdtarget`: ready-made fixtures, and the settings they read.

    nbd_server       a server, one for each test process, so that pytest-xdist needs no care
    powercut_disk    a disk whose power can be cut
    flaky_disk       a disk that fails when told to
    slow_disk        a disk on which each request takes 10 ms, or what is said
    scratch_disk     a writable copy of an image, pristine in each test
    clone_of         a function: clone_of("golden.img") is a writable copy, made at once
    nbd_file         a function: nbd_file(disk) is the disk as a file

Nothing is imported and nothing is started before a test asks for a fixture.
"""

import pytest

from nbdtarget.testing import factories

__all__ = [
    "clone_of",
    "flaky_disk",
    "nbd_file",
    "nbd_server",
    "powercut_disk",
    "pytest_addoption",
    "scratch_disk",
    "slow_disk",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the settings."""
    parser.addini(
        factories.SIZE_INI,
        "Size of the disks that nbdtarget's fixtures make, for example 1G.",
        default=factories.SIZE_DEFAULT,
    )
    parser.addini(
        factories.CONTROL_INI,
        "Control socket of a running nbdtarget server that the fixtures are to use; empty: start one.",
        default="",
    )
    parser.addini(
        factories.IMAGE_INI,
        "Image that the fixture scratch_disk is a copy of.",
        default="",
    )


nbd_server = factories.nbd_server()
powercut_disk = factories.powercut_disk()
flaky_disk = factories.flaky_disk()
slow_disk = factories.slow_disk()
scratch_disk = factories.scratch_disk()
clone_of = factories.clone_of()
nbd_file = factories.nbd_file()
