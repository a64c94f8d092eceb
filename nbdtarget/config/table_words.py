# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the words of a table line, as far as that can be told without opening a device.

A constructor opens its devices first, as the kernel's does, and looks at the other words after that. In a
configuration file the two kinds of refusal have different consequences: a word that can never be right is a
mistake of the file, and ends the start; a device that cannot be opened keeps only its own line
from being served.
"""

from collections.abc import Sequence

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SIZE_MAX
from nbdtarget.dm.table import TargetSpec
from nbdtarget.policies.registry import policy_type
from nbdtarget.targets.arguments import parse_sectors
from nbdtarget.targets.cache import table as cache_table
from nbdtarget.targets.clone import table as clone_table

__all__ = ["words_mistake"]

LOGICAL_BLOCK_SIZE_MIN = 512


def words_mistake(spec: TargetSpec) -> str:
    """The reason why no device could make this line right; "" if there is none."""
    check = {"clone": _check_clone, "cache": _check_cache, "linear": _check_linear}
    if spec.type_name not in check:
        return ""
    try:
        return check[spec.type_name](spec.args)
    except NbdTargetError as error:
        return str(error)


def _check_clone(args: Sequence[str]) -> str:
    if len(args) < clone_table.ARGUMENTS_MIN:
        return "clone: Invalid number of arguments"
    clone_table.parse_region_size(args[3], block_size=LOGICAL_BLOCK_SIZE_MIN)
    clone_table.parse_options(args[4:])
    return ""


def _check_cache(args: Sequence[str]) -> str:
    if len(args) < cache_table.ARGUMENTS_MIN:
        return "cache: Insufficient args"
    cache_table.parse_block_size(args[3], cache_size=SIZE_MAX)
    policy_type(cache_table.parse_options(args[4:]).policy_name)
    return ""


def _check_linear(args: Sequence[str]) -> str:
    if len(args) != 2:
        return "linear: Invalid argument count"
    return "linear: Invalid device sector" if parse_sectors(args[1]) is None else ""
