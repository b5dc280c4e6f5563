"""Run AlexNet on two devices with one tower each, as in Fig. 2 of the paper and layers-145.cfg of its code.

A tower has half of the maps of each convolution and half of the units of fc6 and fc7. conv2, conv4 and conv5
see only the maps of their own tower. Before conv3, fc6 and fc7, the towers exchange their outputs, and both
see all of them. fc8 and the loss are on the first device, to which the second one sends its half of fc7. No
weight is on both devices, so no gradients are summed between them: the backward pass of each exchange of
values is an exchange of their gradients.

The response normalisation of the paper's text spans all channels. The two channels on either side of the
border between the towers are therefore also sent to the other tower, which Fig. 2 does not show. Windows that
end at the tower's edge, as in `code2012`, need no exchange.

Together, the two compute the same as `AlexNet`, whose grouped convolutions are the two towers on one device.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import AlexNet
from model.fused import normalise_and_pool

State = dict[str, Tensor]
BORDER = 2  # number of channels of the other tower that a window of five channels reaches


def split(state: State, tower: int) -> State:
    """Return a copy of the part of an AlexNet's state that tower 0 or 1 holds.

    That is half of the outputs of each layer, and all of fc8 for tower 0. A layer's inputs have the
    same order as in the whole net.
    """
    return {
        name: value.clone() if name.startswith("fc8.") else value.chunk(2)[tower].clone()
        for name, value in state.items()
        if tower == 0 or not name.startswith("fc8.")
    }


def merge(first: State, second: State) -> State:
    """Merge the states of two towers into that of an AlexNet; the inverse of `split`."""
    return {
        name: torch.cat([value, second[name]]) if name in second else value for name, value in first.items()
    }


class Link:
    """The connection to the process of the other tower.

    peer: rank of that process. sent_bytes: number of bytes sent so far.
    """

    def __init__(self, peer: int):
        self.peer = peer
        self.sent_bytes = 0

    def swap(self, x: Tensor, channels: int) -> Tensor:
        """Send x: [...,C], and return the other tower's [...,channels], which has the same type."""
        received = x.new_empty(*x.shape[:-1], channels)
        transfers = [
            dist.P2POp(transfer, tensor, self.peer)
            for transfer, tensor in ((dist.isend, x.contiguous()), (dist.irecv, received))
            if tensor.numel()
        ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        self.sent_bytes += x.numel() * x.element_size()
        return received


class _Swap(torch.autograd.Function):
    """Swap values with the other tower, and their gradients in the backward pass.

    The gradient of a received value belongs to the tower that sent the value.
    """

    @staticmethod
    def forward(ctx, x: Tensor, channels: int, link: Link) -> Tensor:
        ctx.sent, ctx.link = x.shape[-1], link
        return link.swap(x, channels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link.swap(grad, ctx.sent), None, None


class Tower(nn.Module):
    """One of the two towers of `net`, with a copy of its weights on the same device.

    tower: 0 or 1. link: the connection to the other tower's process; by default, that is the other of two
    processes in torch's default process group. Both must be given the same pixels, and run forward and
    backward in step. The processes' random generators must differ, or dropout drops the same units of both
    halves.

    Parameters have the same names as in AlexNet. Raises ValueError unless the net is that of Fig. 2, apart
    from its activation, normalisation, pooling and width.
    """

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d

    def __init__(self, net: AlexNet, tower: int):
        super().__init__()
        variant = net.variant
        if (variant.towers, variant.conv6, variant.without) != (2, False, "none"):
            raise ValueError("only a net with two towers and five convolutions can be split over two devices")
        self.tower, self.link = tower, Link(peer=1 - tower)
        self.preset, self.variant = net.preset, variant
        self.activation, self.window, self.round_up = net.activation, net.window, net.round_up
        self.conv1_pad = net.conv1_pad
        self.classes = net.fc8.out_features
        with torch.device("meta"):  # only shapes; the values are loaded below
            for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
                whole: nn.Conv2d = getattr(net, name)
                (side, _), (stride, _), padding = whole.kernel_size, whole.stride, whole.padding[0]
                inputs, kernels = whole.in_channels // whole.groups, whole.out_channels // 2
                self.add_module(name, nn.Conv2d(inputs, kernels, side, stride, int(padding)))
            units = net.fc7.in_features
            self.fc6 = nn.Linear(net.fc6.in_features, units // 2)
            self.fc7 = nn.Linear(units, units // 2)
            if tower == 0:
                self.fc8 = nn.Linear(units, self.classes)
        self.load_state_dict(split(net.state_dict(), tower), assign=True)
        self.drop6, self.drop7, self.pool = net.drop6, net.drop7, net.pool

    def forward(self, x: Tensor) -> Tensor:
        """Map [N,3,crop,crop] to logits [N,classes] on tower 0.

        Tower 1 returns zeros, from which its backward pass starts with any gradient, because the gradient
        that tower 0 sends replaces it. Shapes below are those of a 224-px crop.
        """
        x = F.pad(x, (0, self.conv1_pad, 0, self.conv1_pad))
        x = self.conv1(x)  # [N,48,55,55]
        x = self._normalise_and_pool(x, relu_first=not self.preset.lrn1_before_relu)  # [N,48,27,27]
        x = self.conv2(x)  # [N,128,27,27]
        x = self._normalise_and_pool(x, spatial_norm=self.preset.spatial_norm)  # [N,128,13,13]
        x = self.activation(self.conv3(self._exchange(x)))  # [N,192,13,13]
        x = self.activation(self.conv4(x))  # [N,192,13,13]
        x = self.pool(self.activation(self.conv5(x)))  # [N,128,6,6]
        x = self._exchange(x).permute(0, 2, 3, 1).flatten(1)  # [N,9216]
        x = self.drop6(self.activation(self.fc6(x)))  # [N,2048]
        x = self.drop7(self.activation(self.fc7(self._exchange(x))))  # [N,2048]
        if self.tower == 0:
            return self.fc8(torch.cat([x, self._swap(x[:, :0], x.shape[1])], 1))
        return self._swap(x, 0).sum(1, keepdim=True).expand(-1, self.classes)

    def _swap(self, x: Tensor, channels: int) -> Tensor:
        """Send [N,C,…] and return [N,channels,…] of the other tower. Both are sent channels last."""
        return _Swap.apply(x.movedim(1, -1), channels, self.link).movedim(-1, 1)

    def _in_order(self, own: Tensor, other: Tensor) -> Tensor:
        """Join the channels of both towers, those of tower 0 first."""
        return torch.cat([own, other] if self.tower == 0 else [other, own], 1)

    def _exchange(self, x: Tensor) -> Tensor:
        """Exchange [N,C,…] with the other tower, and join both to [N,2C,…]."""
        return self._in_order(x, self._swap(x, x.shape[1]))

    def _normalise_and_pool(self, x: Tensor, relu_first: bool = True, spatial_norm: bool = False) -> Tensor:
        """Apply `normalise_and_pool`, with the other tower's border channels if windows span both towers."""
        lrn, channels = self.variant.lrn, x.shape[1]
        joint = lrn and self.preset.lrn_towers == 1
        if joint:
            border = x[:, -BORDER:] if self.tower == 0 else x[:, :BORDER]
            x = self._in_order(x, self._swap(border, BORDER))
        x = normalise_and_pool(
            x,
            self.preset.lrn_alpha if lrn else None,
            relu_first=relu_first,
            spatial_norm=spatial_norm and lrn,
            activation=self.activation,
            window=self.window,
            round_up=self.round_up,
        )
        if joint:  # drop the other tower's channels, which were needed only for this tower's windows
            x = x[:, :channels] if self.tower == 0 else x[:, -channels:]
        return x
