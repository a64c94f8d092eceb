# SPDX-License-Identifier: Apache-2.0
"""A Debian in QEMU, for tests of kernel clients and of systemd: `make vm-test`."""
