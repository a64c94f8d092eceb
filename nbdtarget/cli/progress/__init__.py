# SPDX-License-Identifier: Apache-2.0
"""What a long-running command prints about its progress."""
