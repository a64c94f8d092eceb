# SPDX-License-Identifier: Apache-2.0
"""What a running server tells of itself: figures for programs, and metrics for Prometheus."""
