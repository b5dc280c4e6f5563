# train_accelerate.py
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


def convnet(classes: int) -> nn.Module:
    body = [nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


folder, checkpoint = sys.argv[1], Path(sys.argv[2])
accelerator = Accelerator()
augment = [transforms.RandomCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
dataset = ImageFolder(folder, transforms.Compose(augment))
loader = DataLoader(dataset, batch_size=20 // accelerator.num_processes, shuffle=True, num_workers=2)
net = convnet(len(dataset.classes))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
first_epoch = 0
if checkpoint.exists():
    accelerator.load_state(str(checkpoint))
    first_epoch = int((checkpoint / "epoch").read_text())

for epoch in range(first_epoch, 3):
    for step, (pixels, labels) in enumerate(loader, 1):
        loss = nn.functional.cross_entropy(net(pixels), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step % 2 == 0:
            accelerator.save_state(str(checkpoint))
            (checkpoint / "epoch").write_text(str(epoch))
