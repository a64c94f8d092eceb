# SPDX-License-Identifier: Apache-2.0
"""A regular file or a block device: `FileDevice`, how it is opened, and the system calls that it needs."""
