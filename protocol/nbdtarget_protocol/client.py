# SPDX-License-Identifier: Apache-2.0
"""The client side of the wire, under one name."""

from nbdtarget_protocol.client_handshake import ClientHandshake, ClientNegotiated
from nbdtarget_protocol.client_transmission import ClientTransmission, Completion

__all__ = ["ClientHandshake", "ClientNegotiated", "ClientTransmission", "Completion"]
