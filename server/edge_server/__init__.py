"""The light asynchronous server: aggregates what devices send, remembers every event, serves versions."""
