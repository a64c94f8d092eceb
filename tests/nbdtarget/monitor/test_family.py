# SPDX-License-Identifier: Apache-2.0
"""A family has exactly one way to its values."""

from nbdtarget.monitor.families import FAMILIES
from nbdtarget.monitor.family import COUNTER, GAUGE, HISTOGRAM


def test_a_family_has_one_source_and_a_type_of_prometheus() -> None:
    for family in FAMILIES:
        sources = family.rows, family.of_device, family.of_target
        assert sum(source is not None for source in sources) == 1, family.name
        assert bool(family.target) == (family.of_target is not None)
        assert family.kind in (COUNTER, GAUGE, HISTOGRAM)
