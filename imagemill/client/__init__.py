"""The Python client: `Client` for blocking code, `AsyncClient` for asyncio."""

from imagemill.client.clients import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
