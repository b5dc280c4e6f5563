"""The nets of cuda-convnet, their update, and their training on small images."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.alexnet import count_parameters
from pipeline.manifest import read_manifest
from tools.experiments import cifar10, normalisation
from tools.experiments.cuda_convnet import RECIPES, LocallyConnected, Update, conv_local, layers_18pct
from tools.experiments.four_layers import Images
from tools.experiments.small_training import (
    Data,
    batches,
    centred,
    load,
    misclassified,
    random_crops,
    train,
    views,
)


def test_layers_18pct_has_the_shapes_of_its_file():
    net = layers_18pct(10, 0)
    shapes, x = [], torch.zeros(2, 3, 32, 32)
    for layer in net:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    pooled = [shape for layer, shape in zip(net, shapes, strict=True) if "Pool" in type(layer).__name__]
    assert pooled == [(32, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert shapes[-1] == (10,)
    # 32 of 5×5×3, 32 and 64 of 5×5×32, 10 of 4×4×64, and a bias each.
    assert count_parameters(net) == 32 * 76 + 32 * 801 + 64 * 801 + 10 * 1025
    kinds = [type(layer).__name__ for layer in net]
    assert kinds[:9] == [
        *("Conv2d", "MaxPool2d", "ReLU", "ResponseNorm"),
        *("Conv2d", "ReLU", "AvgPool2d", "ResponseNorm", "Conv2d"),
    ]


def test_normalisation_within_maps_divides_by_a_sum_over_the_window_that_is_clipped_at_the_border():
    x = 300 * torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = layers_18pct(10, 0)[3](x)
    for channel, top, left in np.ndindex(2, 4, 4):
        window = x[0, channel, max(0, top - 1) : top + 2, max(0, left - 1) : left + 2]
        expected = x[0, channel, top, left] / (1 + 0.00005 / 9 * window.square().sum()) ** 0.75
        assert found[0, channel, top, left].item() == pytest.approx(expected.item(), rel=1e-12)


def test_average_pooling_divides_by_the_values_that_are_in_the_map():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    found = layers_18pct(10, 0)[6](x)
    # The windows begin at 0 and 2. The second one has two rows or columns left.
    expected = [[x[0, 0, top : top + 3, left : left + 3].mean().item() for left in (0, 2)] for top in (0, 2)]
    assert found[0, 0].tolist() == expected


@pytest.mark.parametrize("normalise", [False, True])
def test_conv_local_has_the_shapes_of_its_file(normalise):
    net = conv_local(10, 0, normalise)
    shapes, x = {}, torch.zeros(2, 3, 24, 24)
    for layer in net:
        x = layer(x)
        shapes.setdefault(type(layer).__name__, []).append(tuple(x.shape[1:]))
    assert shapes["MaxPool2d"] == [(64, 12, 12), (64, 6, 6)]
    assert shapes.get("ResponseNorm", []) == ([(64, 12, 12), (64, 12, 12)] if normalise else [])
    assert shapes["LocallyConnected"] == [(32, 6, 6), (32, 6, 6)]
    assert shapes["Linear"] == [(10,)]
    # 64 of 5×5×3 and of 5×5×64; at 36 positions, 32 of 3×3×64 and of 3×3×32; 10 of 6×6×32; and a bias each.
    kernels = 64 * 76 + 64 * 1601 + 36 * 32 * (577 + 289) + 10 * 1153
    assert count_parameters(net) == kernels


def test_normalisation_across_maps_is_over_nine_maps():
    x = 30 * torch.randn(1, 64, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = conv_local(10, 0, normalise=True)[3](x)
    for index in range(64):
        window = x[0, max(0, index - 4) : index + 5]
        expected = x[0, index] / (1 + 0.001 / 9 * window.square().sum()) ** 0.75
        assert found[0, index].item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_locally_connected_layer_has_weights_for_each_position():
    generator = torch.Generator().manual_seed(0)
    layer = LocallyConnected(2, 3, 4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=generator)
    found, padded = layer(x), nn.functional.pad(x, (1, 1, 1, 1))
    for top, left in np.ndindex(4, 4):
        position = 4 * top + left
        kernels = layer.weight[position].reshape(3, 3, 2, 3)  # top, left, input, output
        window = padded[:, :, top : top + 3, left : left + 3]
        expected = torch.einsum("ncyx,yxco->no", window, kernels) + layer.bias[position]
        torch.testing.assert_close(found[:, :, top, left], expected)


def test_the_update_is_that_of_the_release():
    net = nn.Sequential(nn.Linear(1, 1))
    weight, bias = 0.5, 0.25
    nn.init.constant_(net[0].weight, weight)
    nn.init.constant_(net[0].bias, bias)
    update = Update(net, (1.0,))
    weight_speed = bias_speed = 0.0
    for rate, gradient in ((0.001, 3.0), (0.001, -2.0), (0.0001, 1.0)):
        net[0].weight.grad, net[0].bias.grad = torch.tensor([[gradient]]), torch.tensor([gradient])
        update.step(rate, 2 * rate)
        weight_speed = 0.9 * weight_speed - rate * gradient - rate * 1.0 * weight
        bias_speed = 0.9 * bias_speed - 2 * rate * gradient
        weight, bias = weight + weight_speed, bias + bias_speed
        assert net[0].weight.item() == pytest.approx(weight, rel=1e-6)
        assert net[0].bias.item() == pytest.approx(bias, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "epoch", "epochs", "rates"),
    [
        ("layers-18pct", 119, 140, (1e-3, 2e-3)),
        ("layers-18pct", 120, 140, (1e-4, 2e-4)),
        ("layers-18pct", 129, 140, (1e-4, 2e-4)),
        ("layers-18pct", 130, 140, (1e-5, 2e-5)),
        ("layers-18pct", 12, 14, (1e-4, 2e-4)),
        ("with normalisation", 79, 100, (1e-3, 2e-3)),
        ("with normalisation", 80, 100, (1e-4, 2e-3)),
        ("without normalisation", 90, 100, (1e-5, 2e-3)),
        ("without normalisation", 45, 50, (1e-5, 2e-3)),
    ],
)
def test_the_rates_fall_as_the_files_say(name, epoch, epochs, rates):
    assert RECIPES[name].rates(epoch, epochs) == pytest.approx(rates)


def small_data(classes: int = 2) -> Data:
    """Images of noise, the brighter the higher their class."""
    labels = np.arange(60) % classes
    pixels = np.random.default_rng(0).integers(0, 56, (60, 3, 32, 32))
    pixels += 200 // classes * labels[:, None, None, None]
    images = Images(pixels.astype(np.uint8), labels, torch.device("cpu"))
    return Data(images, images, images.pixels.float().mean(0))


def test_random_crops_reach_all_places_and_half_are_reflected():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    crops = random_crops(image.expand(3000, -1, -1, -1), 24, np.random.default_rng(0))
    assert crops.shape == (3000, 3, 24, 24)
    places = set()
    for crop in crops:
        top, left = int(crop[0, 0, 0]), int(crop[1, 0].min())
        flip = bool(crop[1, 0, 0] > crop[1, 0, 1])
        expected = image[:, top : top + 24, left : left + 24]
        assert torch.equal(crop, expected.flip(2) if flip else expected)
        places.add((top, left, flip))
    assert places == {(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)}


def test_the_centre_of_the_mean_image_is_subtracted_from_crops():
    mean = torch.arange(32.0 * 32).reshape(1, 32, 32).expand(3, -1, -1) / 8
    found = centred(torch.full((2, 3, 24, 24), 100, dtype=torch.uint8), mean)
    assert found[1, 2, 0, 0] == 100 - (32 * 4 + 4) / 8
    assert found[1, 2, 23, 23] == 100 - (32 * 27 + 27) / 8


def test_a_test_averages_the_softmax_of_ten_views():
    tests = views(24)
    assert tests[0] == (4, 4, False)
    assert set(tests) == {
        (top, left, flip) for top, left in ((4, 4), (0, 0), (0, 8), (8, 0), (8, 8)) for flip in (False, True)
    }
    assert views(None) == [(0, 0, False)]
    # The net's logits are (x, 0), where x is the pixel at the top left of a view. One view has a large x and
    # nine have a negative one: class 0 has the higher mean logit, but class 1 the higher mean softmax.
    pixels = np.full((1, 3, 32, 32), 9, np.uint8)
    pixels[0, 0, 0, 0] = 255
    data = Images(pixels, np.array([1]), torch.device("cpu"))

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0, 0, 0], torch.zeros(len(x))], 1)

    mean = torch.full((3, 32, 32), 10.0)
    assert misclassified(Corner(), data, mean, 24, tests).tolist() == [False]
    assert misclassified(Corner(), data, mean, 24, [(0, 0, False)]).tolist() == [True]


def test_the_mean_image_is_that_of_the_training_images(packed):
    data = load(packed, read_manifest(packed), torch.device("cpu"))
    assert (len(data.train), len(data.val)) == (60, 20)
    np.testing.assert_allclose(data.mean, data.train.pixels.numpy().mean(0), rtol=1e-5)


def test_batches_end_with_the_files_of_cifar_10_and_are_the_same_in_each_epoch():
    first, again, other = (list(batches(25_000, seed)) for seed in (0, 0, 1))
    assert [len(batch) for batch in first] == [*([128] * 78 + [16]) * 2, *[128] * 39, 8]
    assert sorted(torch.cat(first).tolist()) == list(range(25_000))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", ["layers-18pct", "with normalisation"])
def test_an_interrupted_training_resumes_as_if_uninterrupted(tmp_path, monkeypatch, name):
    data, halves = small_data(), tmp_path / "halves"
    halves.mkdir()
    whole = train(data, tmp_path, name, 0, 3)

    def stop(*_args: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", stop)  # after the first epoch is saved
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(data, halves, name, 0, 3)
    resumed = train(data, halves, name, 0, 3)
    assert resumed.curve == whole.curve
    assert resumed.train_error == whole.train_error
    assert torch.equal(resumed.wrong, whole.wrong)
    states = [torch.load(next(folder.glob("*.pt"))) for folder in (tmp_path, halves)]
    torch.testing.assert_close(states[0]["net"], states[1]["net"], rtol=0, atol=0)


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    data = small_data()
    first = train(data, tmp_path, "layers-18pct", 0, 1)
    monkeypatch.setattr("tools.experiments.small_training._epoch", None)
    again = train(data, tmp_path, "layers-18pct", 0, 1)
    assert again.test_error == first.test_error
    assert again.minutes == first.minutes > 0


@pytest.mark.parametrize(
    ("experiment", "name", "published"),
    [(cifar10, "cifar10", [18]), (normalisation, "normalisation", [13, -2])],
)
def test_the_experiments_on_a_packed_dataset(packed, tmp_path, experiment, name, published):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    given = ["--data", str(packed), "--epochs", "1", "--seeds", "2", "--device", "cpu"]
    record = experiment.run(parser.parse_args(given, argparse.Namespace(out=tmp_path)), [])
    assert [row.published["test error (%)"] for row in record.rows] == published
    for row in record.rows:
        test, train, gap = (
            row.values(f"{measure} error (%)") for measure in ("test", "training", "test minus training")
        )
        assert gap == pytest.approx(np.subtract(test, train).tolist())
        assert len(test) == 2
    assert record.runs[-1].seed == 1
    assert [figure.file for figure in record.figures] == [f"{name}.png"]
    with Image.open(tmp_path / f"{name}.png") as image:
        image.load()
