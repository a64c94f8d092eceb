# SPDX-License-Identifier: Apache-2.0
"""Disks that a program beside this one opens: qemu-nbd, nbdkit, or what the configuration file names."""
