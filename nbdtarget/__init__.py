# SPDX-License-Identifier: Apache-2.0
"""nbdtarget: device-mapper's clone and cache as NBD exports, in user space."""

__version__ = "0.1.0"
