"""Short binary codes of feature vectors, and the search among them by Hamming distance.

Three ways to a code, each a function that learns from a sample of features and says for other features
which bits are set. Random hyperplanes and the signs of principal components are what an auto-encoder has
to be better than.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]  # features fp32 [n,d] → bits, bool [n,bits]
HIDDEN = 512  # units of the auto-encoder's layers before and after the code
BATCH = 256
ROWS = 8192  # features that are encoded at a time


def random_hyperplanes(sample: Tensor, bits: int, seed: int) -> Encoder:
    """On which side of so many planes through the sample's mean, drawn by the seed."""
    torch.manual_seed(seed)
    return _sides(sample.mean(0), torch.randn(sample.shape[1], bits).to(sample.device))


def pca_signs(sample: Tensor, bits: int, seed: int) -> Encoder:
    """The signs of the first principal components. Needs as many samples as bits."""
    torch.manual_seed(seed)  # of the randomised decomposition
    mean = sample.mean(0)
    _, _, directions = torch.pca_lowrank(sample - mean, bits, center=False, niter=4)
    return _sides(mean, directions)


def _sides(mean: Tensor, directions: Tensor) -> Encoder:
    return lambda features: (features - mean) @ directions > 0


class AutoEncoder(nn.Module):
    """[n,inputs] → code of −1 and 1 [n,bits] → [n,inputs], with a hidden layer on either side.

    The code is the sign of what comes out of a tanh, which the gradient takes for that itself.
    """

    def __init__(self, inputs: int, bits: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, bits), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(bits, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, inputs))

    def forward(self, features: Tensor) -> Tensor:
        soft = self.encoder(features)
        hard = torch.where(soft > 0, 1.0, -1.0)
        return self.decoder(soft + (hard - soft).detach())


def auto_encoder(sample: Tensor, bits: int, seed: int, epochs: int) -> Encoder:
    """An auto-encoder trained by Adam on the squared error of features of mean 0 and variance 1 over all."""
    torch.manual_seed(seed)
    mean = sample.mean(0)
    scale = (sample - mean).square().mean().sqrt()
    net = AutoEncoder(sample.shape[1], bits).to(sample.device)
    steps = epochs * -(-len(sample) // BATCH)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for numbers in torch.randperm(len(sample)).to(sample.device).split(BATCH):
            features = (sample[numbers] - mean) / scale
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(net(features), features).backward()
            optimizer.step()
            schedule.step()
    return lambda features: net.encoder((features - mean) / scale) > 0


@torch.inference_mode()
def encode(encoder: Encoder, parts: list[np.ndarray], device: torch.device) -> np.ndarray:
    """The codes of features fp16 [n,d] in parts, as `pack` makes them."""
    return np.concatenate(
        [
            pack(
                encoder(torch.from_numpy(part[start : start + ROWS].copy()).to(device).float()).cpu().numpy()
            )
            for part in parts
            for start in range(0, len(part), ROWS)
        ]
    )


def pack(bits: np.ndarray) -> np.ndarray:
    """Bits, bool [n,bits], as words of 64 bits, or of 32 or 8 where these do not fill such: [n,words]."""
    width = next(width for width in (64, 32, 8) if bits.shape[1] % width == 0)
    return np.packbits(bits, axis=1).view(f"u{width // 8}")


def nearest_codes(query: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the `count` codes [n,words] nearest to a query [words] in Hamming distance, the nearest
    first; of those at the same distance, the one with the lower number."""
    distances = np.bitwise_count(codes ^ query).sum(1, dtype=np.int64)
    keys = distances * len(codes) + np.arange(len(codes))  # all different
    count = min(count, len(keys))
    return np.sort(np.partition(keys, count - 1)[:count]) % len(codes)
