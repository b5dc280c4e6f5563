# train.py
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def resnet(classes: int) -> nn.Module:
    blocks = [Residual(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)]
    return nn.Sequential(nn.Conv2d(3, 32, 7, stride=4), *blocks, *head)


folder, checkpoint = sys.argv[1], Path(sys.argv[2])
device = "cuda" if torch.cuda.is_available() else "cpu"
augment = [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
dataset = ImageFolder(folder, transforms.Compose(augment))
loader = DataLoader(dataset, batch_size=20, shuffle=True, num_workers=2, pin_memory=True)
net = resnet(len(dataset.classes)).to(device, memory_format=torch.channels_last)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
first_epoch = 0
if checkpoint.exists():
    state = torch.load(checkpoint, map_location=device)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    first_epoch = state["epoch"]

for epoch in range(first_epoch, 3):
    for step, (pixels, labels) in enumerate(loader, 1):
        loss = nn.functional.cross_entropy(net(pixels.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            state["epoch"] = epoch
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)
