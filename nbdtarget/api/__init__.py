# SPDX-License-Identifier: Apache-2.0
"""The Python API: servers and disks as objects. `nbdtarget` itself exports what users need of it."""
