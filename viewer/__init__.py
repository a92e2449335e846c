"""The live viewer: a process of its own that knows a session only by its published messages."""
