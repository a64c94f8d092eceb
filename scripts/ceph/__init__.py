# SPDX-License-Identifier: Apache-2.0
"""A real cluster of Ceph on this machine, for `make ceph-test`."""
