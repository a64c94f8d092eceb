# SPDX-License-Identifier: Apache-2.0
"""Work on metadata and logs that no server has open."""
