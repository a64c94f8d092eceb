# SPDX-License-Identifier: Apache-2.0
"""Images that are read by ranges over a network: how they are pinned, retried and planned, for each protocol alike."""
