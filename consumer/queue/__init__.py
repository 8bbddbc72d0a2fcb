"""The consumer's end of the queue protocol: the only package here that speaks Redis.

`intake` gets entries, `leases` begins and ends their runs by the atomic `scripts`, `presence` says who is alive.
"""

from consumer.queue.connection import connect, connect_for_blocking_reads
from consumer.queue.intake import Delivery, Intake, Place
from consumer.queue.leases import Begun, Held, Lease, Leases
from consumer.queue.presence import Presence

__all__ = [
    "Begun",
    "Delivery",
    "Held",
    "Intake",
    "Lease",
    "Leases",
    "Place",
    "Presence",
    "connect",
    "connect_for_blocking_reads",
]
