# train_torchrun.py
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder


def convnet(classes: int) -> nn.Module:
    body = [nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


folder, checkpoint = sys.argv[1], Path(sys.argv[2])
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()
augment = [transforms.RandomCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
dataset = ImageFolder(folder, transforms.Compose(augment))
sampler = DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=20 // dist.get_world_size(), sampler=sampler, num_workers=2)
net = DistributedDataParallel(convnet(len(dataset.classes)).to(device, memory_format=torch.channels_last))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
first_epoch = 0
if checkpoint.exists():
    state = torch.load(checkpoint, map_location=device)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    first_epoch = state["epoch"]

for epoch in range(first_epoch, 3):
    sampler.set_epoch(epoch)
    for step, (pixels, labels) in enumerate(loader, 1):
        loss = nn.functional.cross_entropy(net(pixels.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0 and dist.get_rank() == 0:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            state["epoch"] = epoch
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
dist.destroy_process_group()
