"""The server's large model: what it writes, how it learns, where that runs; torch stays in a process of its own."""
