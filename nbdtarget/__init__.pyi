# SPDX-License-Identifier: Apache-2.0
# What type checkers read instead of __init__.py, which imports nothing.
from nbdtarget.api.blocking import BlockingDisk as BlockingDisk
from nbdtarget.api.blocking import BlockingServer as BlockingServer
from nbdtarget.api.disk import Disk as Disk
from nbdtarget.api.disk import DiskStatus as DiskStatus
from nbdtarget.api.disk import PowerCut as PowerCut
from nbdtarget.api.disk import TargetStatus as TargetStatus
from nbdtarget.api.nbd_client import NbdClient as NbdClient
from nbdtarget.api.nbd_client import NbdError as NbdError
from nbdtarget.api.server import Server as Server
from nbdtarget.common.errors import NbdTargetError as NbdTargetError
from nbdtarget.common.errors import TableError as TableError
from nbdtarget.control.client import NoServerError as NoServerError

__version__: str
__all__: list[str]
