"""Defines the generator of images that a synthesis trains: noise, two doublings of the size, statistics of images."""

from __future__ import annotations

from torch import Tensor, nn

SMALLEST = 4  # pixels of a side


class ImageGenerator(nn.Module):
    """Makes images `[B, C, H, W]` from noise `[B, noise]`, of mean 0 and standard deviation 1 in each channel.

    As in Chen et al. 2019, arXiv:1904.01186.
    """

    def __init__(self, shape: tuple[int, int, int], noise: int = 100, width: int = 128) -> None:
        super().__init__()
        channels, height, wide = shape
        self.shape, self.noise = shape, noise
        self.grid = (-(-height // 4), -(-wide // 4))
        self.start = nn.Linear(noise, width * self.grid[0] * self.grid[1])
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width, 0.8),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2, 0.8),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
        )
        self.images = nn.BatchNorm2d(channels, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        """`[B, noise] -> [B, C, H, W]`."""
        y = self.body(self.norm(self.start(z).view(len(z), -1, *self.grid)))
        return self.images(y[..., : self.shape[1], : self.shape[2]])
