"""Writes networks as ONNX files and as packages of torch.export."""
