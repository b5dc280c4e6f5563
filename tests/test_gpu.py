"""The DALI graphs, training steps and gauges on a real GPU."""

import pytest
import torch

from pipeline.graph import jpeg_batch
from pipeline.loader import Dataset, Decoding, evaluation_loader, train_loader
from pipeline.plan import Plan
from tests.helpers import rows, with_nearest_chroma
from trainer.monitor.meter import Interval
from trainer.monitor.metrics import Metrics
from trainer.optim import make_optimizer, set_learning_rate
from trainer.processes.distributed import World
from trainer.run import Run
from trainer.setting_sources import load_settings
from trainer.settings import Settings
from trainer.step import Step
from trainer.train import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def batches(packed):
    dataset = Dataset(packed)
    shards = dataset.manifest.split("train").shards
    plan = Plan(0, 12, tuple(shard.samples for shard in shards))

    def on(device: torch.device, **options) -> list:
        decoding = Decoding(crop=67, device=device)
        return list(train_loader(dataset, plan, range(8), decoding, colour="code2012", **options))

    return on


@pytest.mark.parametrize("scale", [None, (0.08, 1.0)], ids=["crops", "resized crops"])
def test_the_gpu_graph_gives_the_pictures_of_the_cpu_graph(batches, monkeypatch, scale):
    on_gpu = batches(GPU, scale=scale)
    # Libjpeg interpolates chroma, which alone makes 14 to 20 levels in one value of a hundred.
    monkeypatch.setattr(
        "pipeline.stream.jpeg_batch", lambda jpegs: jpeg_batch(map(with_nearest_chroma, jpegs))
    )
    for (gpu, gpu_labels), (cpu, cpu_labels) in zip(on_gpu, batches(CPU, scale=scale), strict=True):
        assert gpu.dtype == torch.float16
        assert gpu.device == GPU
        assert gpu.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(gpu_labels.cpu(), cpu_labels)
        # The decoders differ in their inverse DCT by a level or two in each plane; a wrong crop, mirror or
        # colour would be tens of levels off everywhere.
        difference = (gpu.cpu().float() - cpu).abs()
        assert difference.mean() < 2.0
        assert difference.quantile(0.99) < 16.0


def test_evaluation_takes_ten_crops_on_the_gpu(packed):
    pixels, labels = next(iter(evaluation_loader(Dataset(packed), "val", 4, Decoding(67, GPU), crops=10)))
    assert pixels.shape == (4, 10, 3, 67, 67)
    assert labels.device == GPU


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_few_steps_lower_the_loss_in_each_precision(batches, precision):
    from trainer.build import build_model

    settings = Settings(preset="code2012", dropout="off", crop=67)
    model = build_model(settings, 10, GPU)
    optimizer = make_optimizer(model, settings)
    step = Step(model, optimizer, precision, GPU)
    pixels, labels = batches(GPU)[0]
    losses = []
    for _ in range(30):
        set_learning_rate(optimizer, 1e-3)
        losses.append(step(pixels, labels)[0])
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_neither_a_step_nor_a_log_line_waits_for_the_gpu(packed, tmp_path, precision):
    small = ["--recipe", "demo", "--crop", "67", "--width", "0.125", "--batch", "12", "--on-nan", "skip"]
    settings = load_settings(["--data", str(packed), *small, "--precision", precision])
    trainer = Trainer(settings, Run(tmp_path), World(0, 1, 0, GPU), Metrics(), port=None)
    batches = trainer.batches()
    trainer.train_step(batches)  # which may wait for memory and libraries
    trainer.log()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(batches)
            trainer.log()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.intervals.report()
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == [1, 2, 3, 4]


def test_the_gauges_of_the_gpu_have_plausible_values():
    metrics = Metrics()
    interval = Interval(1, 1, 1.0, 0.0, 1.0, wait_seconds=0.0, busy_seconds=1.0, ready=1)
    metrics.record_interval(interval, 0.01, 1.0, GPU)
    for name in ("memory_used_ratio", "utilization_ratio"):
        assert 0 <= metrics.registry.get_sample_value(f"alexnet_gpu_{name}", {"gpu": "0"}) <= 1
    assert 0 <= metrics.registry.get_sample_value("alexnet_jpeg_engine_utilization_ratio", {"gpu": "0"}) <= 1
    assert metrics.registry.get_sample_value("alexnet_gpu_memory_peak_bytes", {"gpu": "0"}) >= 0
