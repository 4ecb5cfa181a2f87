"""The messages between server and clients, byte by byte (``docs/protocol.md``)."""
