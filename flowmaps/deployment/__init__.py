"""A flow map outside PyTorch: graphs for ONNX and torch.export, a web page, an app."""
