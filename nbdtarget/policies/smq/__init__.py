# SPDX-License-Identifier: Apache-2.0
"""The policy smq (`nbdtarget.policies.smq.policy`) and its parts, which nothing else uses."""
