"""Networks for other programs: ONNX, torch.export, safetensors, the Hugging Face Hub.

folded.py      batch norm put into the convolution before it, normalisation in front of the network
graphs.py      ONNX and torch.export: written, read back and run
quantize.py    int8 by onnxruntime, with what it costs and gains
hub_folder.py  weights, config.json and a model card
"""
