# SPDX-License-Identifier: Apache-2.0
"""The policy smq (stochastic multi-queue), and its parts."""

from nbdtarget.policies.smq.policy import POLICIES, Smq

__all__ = ["POLICIES", "Smq"]
