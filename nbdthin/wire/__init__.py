"""The NBD protocol as bytes in and bytes out: no asyncio, no sockets, no pool."""
