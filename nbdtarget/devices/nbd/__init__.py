# SPDX-License-Identifier: Apache-2.0
"""An export of another NBD server: `NbdDevice`, its connections, and the URIs that name it."""
