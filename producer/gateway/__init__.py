"""The HTTP face of the queue, for backends that call a synchronous endpoint today. It needs the extra `gateway`."""

from producer.gateway.app import create_app

__all__ = ["create_app"]
