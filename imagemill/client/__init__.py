"""The Python client: `Client` for plain code, `AsyncClient` for asyncio."""

from imagemill.client.clients import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
