"""Networks written in torch, for what its exporters make of them."""

from __future__ import annotations

import math

# A module class has to be defined at module level; whoever imports this file wants a PyTorch model.
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

WIDTH = 64
HEADS = 4


class Attention(nn.Module):
    """Scaled dot products written out, as exporters decompose them; attends to itself, or to `memory`."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, *, joined: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.joined = joined
        if joined:  # one layer for query, key and value, as in ViT and GPT
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.qkv(x).chunk(3, -1) if self.joined else (self.q(x), self.k(memory), self.v(memory))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Attention and two fully connected layers; LayerNorm before them, or after (`post`)."""

    def __init__(self, *, post: bool = False, joined: bool = False, approximate: str = "none") -> None:
        super().__init__()
        self.post = post
        self.attention = Attention(joined=joined)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.approximate = approximate

    def mlp(self, x: Tensor) -> Tensor:
        return self.narrow(functional.gelu(self.wide(x), approximate=self.approximate))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.post:
            x = self.first(x + self.attention(x, mask=mask))
            return self.second(x + self.mlp(x))
        x = x + self.attention(self.first(x), mask=mask)
        return x + self.mlp(self.second(x))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al., 2021: patches, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.3 * torch.randn(1, 17, WIDTH))
        self.layers = nn.ModuleList(EncoderLayer(joined=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class WindowLayer(nn.Module):
    """Attention inside windows of 4 x 4, shifted or not, with a relative bias; Liu et al., "Swin", 2021."""

    def __init__(self, width: int, size: int, shift: int) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.attention = Attention(width, joined=True)
        self.bias = nn.Parameter(0.2 * torch.randn(1, HEADS, 16, 16))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        mask = torch.zeros(1, size, size, 1)
        for number, rows in enumerate((slice(0, -4), slice(-4, -shift or None), slice(-shift or size, None))):
            mask[:, rows] += 3 * number
            mask[:, :, rows] += number
        regions = self.windows(mask).squeeze(-1)
        self.register_buffer("alike", 100.0 * (regions[:, None] == regions[:, :, None]).float()[:, None] - 100.0)

    def windows(self, x: Tensor) -> Tensor:
        count = self.size // 4
        return x.reshape(-1, count, 4, count, 4, x.shape[-1]).transpose(2, 3).reshape(-1, 16, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        count, width = self.size // 4, x.shape[-1]
        y = self.first(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        bias = self.bias
        if self.shift:
            bias = (bias + self.alike).repeat(8, 1, 1, 1)
        y = self.attention(self.windows(y), bias=bias)
        y = y.reshape(-1, count, count, 4, 4, width).transpose(2, 3).reshape(-1, self.size, self.size, width)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.second(x))


class Swin(nn.Module):
    """Two stages of windows, patches merged between them; for a batch of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.near = nn.Sequential(WindowLayer(32, 8, 0), WindowLayer(32, 8, 2))
        self.merged_norm, self.merge = nn.LayerNorm(128), nn.Linear(128, 64, bias=False)
        self.far = WindowLayer(64, 4, 0)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 16)

    def forward(self, image: Tensor) -> Tensor:
        x = self.near(self.patches(image).permute(0, 2, 3, 1))
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = self.far(self.merge(self.merged_norm(torch.cat(quarters, -1))))
        return self.head(self.norm(x).mean((1, 2)))


class ConvNeXt(nn.Module):
    """Liu et al., 2022: depthwise 7x7, LayerNorm over the channels, two fully connected layers, a gain per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.stages = nn.ModuleList([ConvNeXtBlock(32), ConvNeXtBlock(32), Downsample(), ConvNeXtBlock(64)])
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 16)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x.mean((2, 3))))


class Downsample(nn.Module):
    """LayerNorm over the channels and a convolution of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(32), nn.Conv2d(32, 64, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class ConvNeXtBlock(nn.Module):
    """The block of `ConvNeXt`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gain = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gain * self.narrow(functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Bert(nn.Module):
    """Devlin et al., 2019: embeddings, padding kept out by a mask, LayerNorm after sums, the first token decides."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(100, WIDTH), nn.Embedding(32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(EncoderLayer(post=True) for _ in range(2))
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        x = self.norm(self.words(ids) + self.positions(places))
        for layer in self.layers:
            x = layer(x, mask[:, None, None] > 0)
        return self.head(torch.tanh(self.pooler(x[:, 0]))), x * mask.unsqueeze(-1)


class Gpt(nn.Module):
    """Radford et al., 2019: attention to what came before (a triangle of ones), logits for the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(100, WIDTH), nn.Parameter(0.3 * torch.randn(1, 12, WIDTH))
        self.layers = nn.ModuleList(EncoderLayer(joined=True, approximate="tanh") for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 100, bias=False)
        self.register_buffer("past", torch.ones(12, 12).tril().bool())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions
        for layer in self.layers:
            x = layer(x, self.past)
        return self.head(self.norm(x))


class Llama(nn.Module):
    """Touvron et al., 2023: RMSNorm, rotary positions, a gated SiLU; one block."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(2 * WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 100, bias=False)
        self.gains = nn.ParameterList(torch.exp(0.3 * torch.randn(WIDTH)) for _ in range(3))
        angles = torch.arange(12)[:, None] / 100.0 ** (torch.arange(8) / 8)
        self.register_buffer("cosine", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sine", torch.cat([angles, angles], -1).sin())
        self.register_buffer("mask", torch.full((12, 12), -1e4).triu(1))

    def norm(self, x: Tensor, index: int) -> Tensor:
        return self.gains[index] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def turned(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * self.cosine + torch.cat([-high, low], -1) * self.sine

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        y = self.norm(x, 0)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = self.turned(q) @ self.turned(k).transpose(-2, -1) / 4.0 + self.mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = self.norm(x, 1)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(x, 2))


class SpeechEncoder(nn.Module):
    """Radford et al., "Whisper", 2023: two 1-D convolutions over a spectrogram, sines as positions, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(32, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 3, 2, padding=1)
        angles = torch.arange(20)[:, None] / 10000.0 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], -1))
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = functional.gelu(self.second(functional.gelu(self.first(spectrogram))))
        x = x.transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Conformer(nn.Module):
    """Gulati et al., 2020, one block: attention and a gated depthwise convolution between half feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(32, WIDTH)
        self.halves = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128), nn.SiLU(), nn.Linear(128, WIDTH))
            for _ in range(2)
        )
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.conv_norm, self.gated = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 2 * WIDTH, 1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 9, padding=4, groups=WIDTH)
        self.statistics, self.pointwise = nn.BatchNorm1d(WIDTH), nn.Conv1d(WIDTH, WIDTH, 1)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, features: Tensor) -> Tensor:
        x = self.inward(features.transpose(1, 2))
        x = x + 0.5 * self.halves[0](x)
        x = x + self.attention(self.attention_norm(x))
        y = functional.glu(self.gated(self.conv_norm(x).transpose(1, 2)), 1)
        y = self.pointwise(functional.silu(self.statistics(self.depthwise(y))))
        x = x + y.transpose(1, 2)
        x = x + 0.5 * self.halves[1](x)
        return self.head(self.norm(x)).log_softmax(-1)


class Detr(nn.Module):
    """Carion et al., 2020: a convolutional backbone, learned queries that attend to its features, classes and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64),
            nn.ReLU(), nn.Conv2d(64, WIDTH, 3, 2, 1),
        )  # fmt: skip
        self.queries, self.positions = nn.Parameter(torch.randn(1, 6, WIDTH)), nn.Parameter(torch.randn(1, 16, WIDTH))
        self.itself, self.cross = Attention(), Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.classes, self.boxes = (
            nn.Linear(WIDTH, 16),
            nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 4)),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.backbone(image).flatten(2).transpose(1, 2) + self.positions
        x = self.queries.expand(memory.shape[0], -1, -1)
        x = self.norms[0](x + self.itself(x))
        x = self.norms[1](x + self.cross(x, memory))
        x = self.norms[2](x + self.mlp(x))
        return self.classes(x), self.boxes(x).sigmoid()


class Tagger(nn.Module):
    """Huang et al., 2015: a bidirectional LSTM over words, a GRU over its states, one tag for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 32, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(64, 32, batch_first=True)
        self.hidden, self.head = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.words(ids))
        states, _ = self.gru(states)
        return self.head(functional.relu(self.hidden(states)))
