"""The demo's network: residual, as the nets are that INT8 is used for, and small enough to train while one waits."""

from __future__ import annotations

# A module class has to be defined at module level; whoever imports this file wants a PyTorch model.
import torch  # noqa: TID253
from torch import nn  # noqa: TID253

CLASSES = 10
DEFAULT_WIDTH = 32


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut around them (He et al., 2016, arXiv:1512.03385, figure 2).

    The shortcut is the identity where shapes allow, else a 1x1 convolution with BatchNorm.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        residual = torch.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(features))


class DigitsResNet(nn.Module):
    """A residual network for 32x32 grey images: three stages of one block each, at 32x32, 16x16 and 8x8.

    Args:
        width: channels of the first stage; the second has twice, the third four times as many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width, stride=1)
        self.layer2 = BasicBlock(width, 2 * width, stride=2)
        self.layer3 = BasicBlock(2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map images [N, 1, 32, 32], float32 in -1..1, to logits [N, 10]."""
        features = torch.relu(self.bn1(self.conv1(image)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: torch.Tensor = self.fc(self.pool(features).flatten(1))
        return logits


def digits_resnet(width: int = DEFAULT_WIDTH) -> nn.Module:
    """Make the demo's network, with random weights.

    At the default width it has 0.3 million weights and takes 49 million multiply-adds per image, enough for its layers,
    and not the calls between them, to be what inference spends its time on.

    Args:
        width: channels of the first stage.
    """
    return DigitsResNet(width)
