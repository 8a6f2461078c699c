"""Training on the device: torch and peft, only with the `[train]` extra."""
