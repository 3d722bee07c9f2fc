"""Networks that torch exports: by its TorchScript exporter, whose graphs are everywhere, and by the one that traces."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from zoo.architecture import Architecture, Promise
from zoo.builder import SPREAD
from zoo.inputs import Input, calibration_batches

Exporter = Literal["torchscript", "dynamo"]


def _exported(
    name: str,
    network: str,
    inputs: Sequence[Input],
    promise: Promise,
    *,
    opset: int,
    exporter: Exporter = "torchscript",
) -> Architecture:
    """Declare a class of `zoo.modules` as an architecture."""

    def write(path: Path) -> Sequence[Input]:
        import torch
        from zoo import modules

        torch.manual_seed(sum(map(ord, name)))
        module = getattr(modules, network)()
        feeds = {key: torch.from_numpy(value) for key, value in calibration_batches(inputs)[0].items()}
        _initialise(module)
        with torch.no_grad():
            module.train()(*feeds.values())  # BatchNorm takes the statistics of this batch
        module.eval()
        axes = {
            entry.name: {
                index: "N" if index == 0 else str(size)
                for index, size in enumerate((entry.batch or "N", *entry.shape))
                if isinstance(size, str)
            }
            for entry in inputs
        }
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the one is deprecated, the other one imports what is
            if exporter == "dynamo":
                shapes = {
                    key: {axis: torch.export.Dim(size) for axis, size in found.items()} for key, found in axes.items()
                }
                torch.onnx.export(
                    module, tuple(feeds.values()), path, dynamo=True, opset_version=opset, input_names=list(feeds),
                    dynamic_shapes=shapes, external_data=False,
                )  # fmt: skip
            else:
                torch.onnx.export(
                    module, tuple(feeds.values()), path, dynamo=False, opset_version=opset, input_names=list(feeds),
                    dynamic_axes=axes,
                )  # fmt: skip
        return inputs

    return promise.of(name, write)


def _initialise(module: Any) -> None:
    """Draw He weights with a gain of their own for each output channel; see `zoo.builder.Builder.weights`."""
    import torch
    from torch import nn

    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            weight = layer.weight.data
            gain = torch.exp(SPREAD * torch.randn(len(weight)) - SPREAD**2)
            deviation = weight[0].numel() ** -0.5
            weight.normal_(0.0, deviation).mul_(gain.reshape(-1, *[1] * (weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.data.normal_(0.0, 0.1)
        elif isinstance(layer, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            layer.weight.data.copy_(torch.exp(0.3 * torch.randn(len(layer.weight))))
            layer.bias.data.normal_(0.0, 0.1)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = None  # keep the plain average of what was seen


_IMAGE = (Input("image", (3, 32, 32)),)

EXPORTED = (
    # Patches; in 2 layers qkv, out and 2 of the feed-forward layer; Gemm: 1 + 8 + 1 = 10. Products of activations (4)
    # stay float. LayerNormalization is one operator from opset 17 on; GELU is a chain around Erf below 20.
    _exported("vit", "VisionTransformer", _IMAGE, Promise((10, 10), (28, 23), half=True), opset=17),
    # Patches, 3 layers of 4, the merging MatMul, Gemm: 1 + 12 + 1 + 1 = 15. 6 products stay float.
    _exported("swin", "Swin", (Input("image", (3, 32, 32), batch=8),), Promise((15, 15), (31, 24)), opset=16),
    # Stem, 3 blocks of 3, the downsampling convolution, Gemm: 1 + 9 + 1 + 1 = 12. LayerNorm is a chain of ReduceMean,
    # Pow, Sqrt and Div below opset 17.
    _exported("convnext", "ConvNeXt", _IMAGE, Promise((12, 12), (29, 23), half=True), opset=13),
    # 2 layers of 6, pooler, head: 14. The head has 3 columns and stays float for TensorRT. So do 4 products and the
    # embeddings on both targets.
    _exported(
        "bert",
        "Bert",
        (Input("ids", ("T",), "ids", limit=100), Input("mask", ("T",), "mask")),
        Promise((13, 14), (19, 16), half=True),
        opset=13,
    ),
    # 2 layers of 4, the logits: 9. 4 products stay float.
    _exported(
        "gpt", "Gpt", (Input("ids", (12,), "ids", limit=100),), Promise((9, 9), (27, 26)), opset=20, exporter="dynamo"
    ),
    # 4 of the attention, 3 of the gated layer, the logits: 8. 2 products stay float.
    _exported("llama", "Llama", (Input("ids", (12,), "ids", limit=100),), Promise((8, 8), (27, 26)), opset=18),
    # 2 convolutions, 2 layers of 6: 14. 4 products stay float.
    _exported(
        "speech_encoder", "SpeechEncoder", (Input("spectrogram", (32, 40)),), Promise((14, 14), (30, 28)), opset=14
    ),
    # First, 2 halves of 2, 4 of the attention, 3 convolutions, last: 1 + 4 + 4 + 3 + 1 = 13. 2 products stay float.
    _exported("conformer", "Conformer", (Input("features", (32, 24)),), Promise((13, 13), (35, 31)), opset=17),
    # Backbone 3, 2 attentions of 4, feed-forward 2, classes 1, boxes 2: 16. 4 products stay float, and for TensorRT the
    # last layer of the boxes, which has 4 columns.
    _exported("detr", "Detr", _IMAGE, Promise((15, 16), (27, 23)), opset=17),
    # Hidden and last: 2. LSTM and GRU stay float; their weights are not those of a weighted operator.
    _exported("tagger", "Tagger", (Input("ids", ("T",), "ids", limit=100),), Promise((2, 2), (37, 37)), opset=14),
)
