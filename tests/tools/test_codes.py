"""Binary codes: their search compared with a naive one, and what an auto-encoder learns."""

import numpy as np
import pytest
import torch

from tools.experiments.binary_codes import (
    AutoEncoder,
    auto_encoder,
    encode,
    nearest_codes,
    pack,
    pca_signs,
    random_hyperplanes,
)
from tools.experiments.codes import FOUND, recalls, same_class, search_exactly
from tools.experiments.fc7 import nearest

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bits", "words"), [(8, 1), (24, 3), (32, 1), (64, 1), (96, 3), (128, 2)])
def test_codes_are_found_in_order_of_hamming_distance(bits, words):
    rng = np.random.default_rng(bits)
    rows, query = rng.random((200, bits)) < 0.5, rng.random(bits) < 0.5
    expected = sorted((int((row != query).sum()), number) for number, row in enumerate(rows))
    codes = pack(rows)
    assert codes.shape == (200, words)
    found = nearest_codes(pack(query[None])[0], codes, 20)
    assert found.tolist() == [number for _, number in expected[:20]]
    assert len(nearest_codes(codes[0], codes, 1000)) == 200


def test_the_timed_exact_search_finds_the_nearest_on_one_thread(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    rng = np.random.default_rng(0)
    index = [rng.standard_normal((count, 16)).astype(np.float16) for count in (70, 90)]
    queries = rng.standard_normal((3, 16)).astype(np.float16)
    found, seconds = search_exactly(index, queries)
    np.testing.assert_array_equal(found, nearest(queries, index, FOUND, CPU)[1])
    assert seconds > 0
    assert threads == [1, torch.get_num_threads()]


def clusters() -> tuple[torch.Tensor, np.ndarray]:
    """400 points around 20 centres, and the centre of each."""
    torch.manual_seed(0)
    own = np.arange(400) % 20
    return torch.randn(20, 48)[own] + 0.3 * torch.randn(400, 48), own


@pytest.mark.parametrize(
    "learn", [random_hyperplanes, pca_signs, lambda *given: auto_encoder(*given, epochs=60)]
)
def test_codes_of_points_in_a_cluster_are_similar(learn):
    points, own = clusters()
    codes = encode(learn(points, 32, 0), [points.half().numpy()], CPU)
    found = np.stack([nearest_codes(code, codes, 6) for code in codes])
    assert same_class(found, own, own) > 85  # chance level is 5


def test_an_auto_encoders_code_is_binary_and_still_learns():
    points, _ = clusters()
    net = AutoEncoder(48, 16)
    codes = []
    net.decoder.register_forward_pre_hook(lambda _, given: codes.append(given[0].detach()))
    net(points).square().mean().backward()
    torch.testing.assert_close(codes[0].abs(), torch.ones(400, 16))
    assert net.encoder[0].weight.grad.abs().sum() > 0


def test_recall_counts_neighbours_among_the_first_results():
    exact = np.array([[*range(10)], [*range(10)]])
    found = np.concatenate([[[0, 1, 2, 90, 91, 92, 3, 4, 93, 94]], [[*range(10)]]])
    assert list(recalls(found, exact).values()) == pytest.approx([75, 75, (5 / 6 + 1) / 2 * 100])
