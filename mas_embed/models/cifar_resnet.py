"""The residual networks for CIFAR-10 of He et al. (2016), with the parameter names of the public weights for them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CifarResNet(nn.Module):
    """A residual network for images of about 32x32 pixels: a 3x3 convolution, three stages, average pooling, a linear layer.

    Stages have 16, 32 and 64 channels; the second and third halve height and width. Where the shape changes, the shortcut
    takes every second pixel and fills the new channels with zeros (option A of the paper), so it has no parameters. Weights of
    https://github.com/akamaster/pytorch_resnet_cifar10 can be loaded.

    Args:
        num_blocks: of each stage, with two convolutions each; the network has 6 `num_blocks` + 2 layers.
        num_classes: size of the output.
    """

    def __init__(self, num_blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, num_blocks)
        self.layer2 = _stage(16, 32, num_blocks)
        self.layer3 = _stage(32, 64, num_blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """The class scores [N, C] of images [N, 3, H, W]."""
        maps = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        return self.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1))


class _Block(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.stride = num_outputs // num_inputs
        self.num_new = num_outputs - num_inputs
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_outputs)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_outputs)

    def forward(self, maps: Tensor) -> Tensor:
        shortcut = maps
        if self.num_new:
            before = self.num_new // 2
            shortcut = F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.num_new - before))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps))))) + shortcut)


def _stage(num_inputs: int, num_outputs: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(num_inputs, num_outputs), *(_Block(num_outputs, num_outputs) for _ in range(num_blocks - 1))
    )
