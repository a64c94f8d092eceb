# SPDX-License-Identifier: Apache-2.0
"""The compiled fast path of plain READs and WRITEs, where it could be built; without it everything works."""
