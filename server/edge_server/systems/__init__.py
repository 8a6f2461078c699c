"""One file per published system: its settings, what a device should do next, and the server's step. `runs.py` binds them."""
