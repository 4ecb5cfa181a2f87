"""What travels between server and clients, byte by byte (``docs/protocol.md``)."""
