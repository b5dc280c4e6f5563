"""Short binary codes of feature vectors, and search among them by Hamming distance.

There are three kinds of codes. The function of each learns from a sample of features and returns an encoder
for other features. Random hyperplanes and the signs of principal components are the baselines that an
auto-encoder has to beat.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]  # features fp32 [n,d] → bits, bool [n,bits]
HIDDEN = 512  # units of the auto-encoder's layers before and after the code
BATCH = 256
ROWS = 8192  # features encoded at a time


def random_hyperplanes(sample: Tensor, bits: int, seed: int) -> Encoder:
    """Encode on which side of random planes through the sample's mean a vector lies."""
    torch.manual_seed(seed)
    return _sides(sample.mean(0), torch.randn(sample.shape[1], bits).to(sample.device))


def pca_signs(sample: Tensor, bits: int, seed: int) -> Encoder:
    """Encode the signs of the first principal components. Needs at least as many samples as bits."""
    torch.manual_seed(seed)  # for the randomised decomposition
    mean = sample.mean(0)
    _, _, directions = torch.pca_lowrank(sample - mean, bits, center=False, niter=4)
    return _sides(mean, directions)


def _sides(mean: Tensor, directions: Tensor) -> Encoder:
    return lambda features: (features - mean) @ directions > 0


class AutoEncoder(nn.Module):
    """Map [n,inputs] to a code of −1 and 1 [n,bits] and back, with a hidden layer on either side.

    The code is the sign of a tanh; the gradient passes through as if it were the tanh itself.
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
    """Train an auto-encoder with Adam on the squared error of standardised features."""
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
    """Encode features, given in parts fp16 [n,d]; return codes as `pack` makes them."""
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
    """Pack bits, bool [n,bits], into the largest words that they fill, of 64, 32 or 8 bits: [n,words]."""
    width = next(width for width in (64, 32, 8) if bits.shape[1] % width == 0)
    return np.packbits(bits, axis=1).view(f"u{width // 8}")


def nearest_codes(query: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` codes [n,words] nearest to a query [words] in Hamming distance.

    The nearest comes first; at the same distance, the lower index.
    """
    distances = np.bitwise_count(codes ^ query).sum(1, dtype=np.int64)
    keys = distances * len(codes) + np.arange(len(codes))  # all different
    count = min(count, len(keys))
    return np.sort(np.partition(keys, count - 1)[:count]) % len(codes)
