"""Tools around the three tasks: what can be built, checkpoints from one form to another, networks as ONNX."""
