"""Models -> bundles: export through optimum, graph surgery with onnx. Runs on a workstation, never on a device."""
