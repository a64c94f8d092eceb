# SPDX-License-Identifier: Apache-2.0
"""All mutants, from the disk's format up to the wire, and the names that must be among them."""

from typing import Final

from tests.mutants.bounds import BOUNDS
from tests.mutants.cache_metadata import CACHE_METADATA
from tests.mutants.cache_parts import CACHE_PARTS
from tests.mutants.cache_target import CACHE_TARGET
from tests.mutants.cache_tools import CACHE_TOOLS
from tests.mutants.clone import CLONE
from tests.mutants.clone_features import CLONE_FEATURES
from tests.mutants.commit import COMMIT
from tests.mutants.devices import DEVICES
from tests.mutants.disks import DISKS
from tests.mutants.extended import EXTENDED
from tests.mutants.fast import FAST
from tests.mutants.helpers import HELPERS
from tests.mutants.mapped_device import MAPPED_DEVICE
from tests.mutants.metadata import METADATA
from tests.mutants.mutant import Mutant
from tests.mutants.policies import POLICIES
from tests.mutants.porcelain import PORCELAIN
from tests.mutants.server import SERVER
from tests.mutants.sources import SOURCES
from tests.mutants.state import STATE
from tests.mutants.suites import SUITES
from tests.mutants.tls import TLS

__all__ = ["CATALOG", "ESSENTIAL"]

CATALOG: Final[tuple[Mutant, ...]] = (
    *METADATA,
    *CACHE_METADATA,
    *CACHE_PARTS,
    *CACHE_TARGET,
    *CACHE_TOOLS,
    *COMMIT,
    *CLONE,
    *CLONE_FEATURES,
    *MAPPED_DEVICE,
    *DEVICES,
    *DISKS,
    *POLICIES,
    *SERVER,
    *BOUNDS,
    *SOURCES,
    *HELPERS,
    *TLS,
    *EXTENDED,
    *FAST,
    *PORCELAIN,
    *SUITES,
    *STATE,
)

# The best known mistakes of crash safety. A change of the catalog must not remove or rename them.
ESSENTIAL: Final = frozenset(
    {
        "commit-before-flush",
        "commit-without-destination-flush",
        "superblock-before-journal",
        "journal-not-flushed",
        "superblock-without-fua",
        "one-superblock-copy-written",
        "generation-not-advanced",
        "fua-without-commit",
        "fua-completed-before-its-commit",
        "second-flush-elided-when-nothing-was-committed",
        "bit-set-before-the-copy-is-written",
        "short-tail-region-taken-for-an-overwrite",
        "discard-overtakes-a-copy",
        "revert-forgotten-after-a-failed-commit",
        "latch-forgotten-after-a-failed-fsync",
        "compaction-drops-a-delta",
        "cache-clean-shutdown-not-cleared",
        "cache-dirty-bits-trusted-after-an-unclean-shutdown",
        "cache-insertion-without-cache-flush",
        "cache-removal-without-origin-flush",
        "cache-dirty-log-record-after-the-write",
        "cache-block-reused-before-its-removal-is-committed",
        "cache-target-fua-overwrite-ends-before-its-commit",
        "cache-target-demotion-does-not-wait-for-its-commit",
        "cache-target-cblock-reused-while-it-is-read",
        "cache-target-invalidation-writes-before-its-commit",
        "deferred-payload-not-owned",
    }
)
