# SPDX-License-Identifier: Apache-2.0
"""The client side of the wire, under one name."""

from protocol.client_handshake import ClientHandshake, ClientNegotiated
from protocol.client_transmission import ClientTransmission, Completion

__all__ = ["ClientHandshake", "ClientNegotiated", "ClientTransmission", "Completion"]
