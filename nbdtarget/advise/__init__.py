# SPDX-License-Identifier: Apache-2.0
"""How large a cache should be, from a list of what was read and written."""
