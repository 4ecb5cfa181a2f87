"""Exported graphs on ONNX Runtime and OpenVINO, with weights as inputs."""
