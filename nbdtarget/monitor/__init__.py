# SPDX-License-Identifier: Apache-2.0
"""The figures of a running server for programs, and its metrics for Prometheus."""
