# SPDX-License-Identifier: Apache-2.0
"""`gzip:`, `xz:` and `zstd:`: packed images as disks that can be read from the front to the end."""
