"""tandem-edge on a device: small language models that get better where the data is.

Importing this package loads no torch, no transformers and no ONNX Runtime; they come with the first use.
"""

from edge_sdk.device import EdgeDevice, Prediction
from edge_sdk.engines import open_bundle
from edge_sdk.errors import (
    AssetError,
    DataError,
    EdgeError,
    MissingRuntime,
    Refused,
    ServerError,
    SettingsError,
    Unreachable,
    WireError,
)

__all__ = [
    "AssetError",
    "DataError",
    "EdgeDevice",
    "EdgeError",
    "MissingRuntime",
    "Prediction",
    "Refused",
    "ServerError",
    "SettingsError",
    "Unreachable",
    "WireError",
    "open_bundle",
]
