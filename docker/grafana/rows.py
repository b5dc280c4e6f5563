"""The dashboard's rows under its first screen: each panel, and what to conclude from it."""

from panels import RATIO, buckets, curves, figure_now, labels_of, series_of, stacked

NO_GPU = "no GPU"
NO_EXPORTERS = "the exporters are not started"


def bottleneck() -> list:
    waits = (
        "sum by (le) (rate(alexnet_input_wait_seconds_bucket"
        '{job="$job",instance=~"$instance",phase="train"}[$__rate_interval]))'
    )
    spent = (
        "avg(rate(alexnet_activity_seconds_total"
        '{job="$job",instance=~"$instance",activity="%s"}[$__rate_interval]))'
    )
    return [
        curves(
            "Images/s against the ceilings",
            {
                "training": 'job:alexnet_images:rate1m{job="$job",phase="train"}',
                "loader alone": 'sum(alexnet_ceiling_images_per_second{job="$job",path="loader"})',
                "model alone": 'sum(alexnet_ceiling_images_per_second{job="$job",path="model"})',
                "evaluation": 'job:alexnet_images:rate1m{job="$job",phase="eval"}',
            },
            "none",
            "The ceilings are measured at the start with --calibrate. Training cannot pass the lower one; "
            "well below both, loader and model disturb each other.",
            12,
        ),
        curves(
            "Device busy, batches ready",
            {
                "busy": 'job:alexnet_busy:ratio5m{job="$job"}',
                "ready": 'job:alexnet_ready:ratio5m{job="$job"}',
            },
            RATIO,
            "Busy 95 % of the time: compute-bound. If not, ready below 50 %: input-bound; 95 %: host gap.",
            12,
        ),
        buckets(
            "Step time",
            "sum by (le) (increase(alexnet_step_seconds_bucket"
            '{job="$job",instance=~"$instance",phase="train"}[$__rate_interval]))',
            "s",
            "How many steps took how long. One narrow band is good; a second one above it: some waited.",
            12,
        ),
        curves(
            "Wait for input",
            {
                "median": f"histogram_quantile(0.5, {waits})",
                "99th percentile": f"histogram_quantile(0.99, {waits})",
            },
            "s",
            "Time until a batch was there; up to 1 ms it lay ready. A high median is too slow an input. A "
            "high 99th percentile alone is one that stalls now and then: raise --prefetch.",
            12,
            log=True,
        ),
        stacked(
            curves(
                "Where the time went",
                {name: spent % name for name in ("train", "checkpoint", "eval", "start-up")},
                RATIO,
                "Shares of the wall time. All but training is overhead: where saving shows, save less often.",
                24,
            )
        ),
    ]


def learning() -> list:
    return [
        curves(
            "Loss",
            {  # 0 until there is one
                "training": 'avg(alexnet_loss{job="$job",phase="train"} != 0)',
                "validation": 'avg(alexnet_loss{job="$job",phase="eval"} != 0)',
            },
            "none",
            "Mean cross-entropy. Validation that rises while training falls is overfitting.",
            12,
            log=True,
        ),
        curves(
            "Validation error",
            {
                "top-1": 'max(alexnet_eval_error_ratio{job="$job",k="1"})',
                "top-5": 'max(alexnet_eval_error_ratio{job="$job",k="5"})',
            },
            RATIO,
            "On a plateau the learning rate should fall, or has done its work.",
            12,
        ),
        curves(
            "Learning rate",
            {"rate": 'max(alexnet_learning_rate{job="$job"})'},
            "sci",
            "Of the weights. A step in the error that comes with one here is no accident.",
        ),
        curves(
            "Gradient scale",
            {"scale": 'max(alexnet_grad_scale{job="$job"} != 0)'},
            "none",
            "Under fp16 it hovers; if it falls without end, all gradients overflow. 1 in other precisions.",
            log=True,
        ),
        curves(
            "Skipped steps",
            {"steps": 'max(increase(alexnet_skipped_steps_total{job="$job"}[$__rate_interval]))'},
            "none",
            "Updates left out because fp16 gradients overflowed. A few at the start are normal.",
        ),
    ]


def gpu() -> list:
    process, device = "{{instance}} GPU {{gpu}}", "{{Hostname}} GPU {{gpu}}"
    return [
        curves(
            "Utilisation",
            {
                f"kernels, {process}": 'alexnet_gpu_utilization_ratio{job="$job",instance=~"$instance"}',
                f"JPEG engine, {process}": (
                    'alexnet_jpeg_engine_utilization_ratio{job="$job",instance=~"$instance"}'
                ),
                f"tensor cores, {device}": "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
            },
            RATIO,
            "Kernels: share of the time in which one runs, so 100 % may still be slow. Tensor cores: share "
            "in which they work. JPEG engine at 100 % while input-bound: pack smaller images.",
            12,
            NO_GPU,
        ),
        curves(
            "Memory in use",
            {process: 'alexnet_gpu_memory_used_ratio{job="$job",instance=~"$instance"}'},
            RATIO,
            "Of the whole GPU, by all that use it. Near 100 % the next larger batch ends the run.",
            12,
            NO_GPU,
        ),
        curves(
            "Most memory that torch held",
            {process: 'alexnet_gpu_memory_peak_bytes{job="$job",instance=~"$instance"}'},
            "bytes",
            "What is left of the GPU's is for DALI, and for a larger batch.",
            otherwise=NO_GPU,
        ),
        curves(
            "Power",
            {device: "DCGM_FI_DEV_POWER_USAGE"},
            "watt",
            "At its limit a GPU lowers its clock; far below it, it idles.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "Temperature",
            {device: "DCGM_FI_DEV_GPU_TEMP"},
            "celsius",
            "Where it rises and images/s fall together, the GPU throttles: look at its cooling.",
            otherwise=NO_EXPORTERS,
        ),
    ]


def host() -> list:
    each = "{{instance}}"
    return [
        curves(
            "CPU of the host",
            {each: '1 - avg by (instance) (rate(node_cpu_seconds_total{mode="idle"}[$__rate_interval]))'},
            RATIO,
            "At 100 % while input-bound: decoding on the CPU is the limit.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "Memory of the host",
            {each: "1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes"},
            RATIO,
            "Without what can be freed. The rest holds shards that were read once: the next epoch is faster.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "Disk reads",
            {each: "sum by (instance) (rate(node_disk_read_bytes_total[$__rate_interval]))"},
            "Bps",
            "At the disk's limit while input-bound: move the shards to a faster one.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "CPU of the processes",
            {each: 'rate(process_cpu_seconds_total{job="$job",instance=~"$instance"}[$__rate_interval])'},
            "none",
            "In cores. Just 1 on a GPU that idles is Python at its limit: a host gap.",
        ),
        curves(
            "Memory of the processes",
            {each: 'process_resident_memory_bytes{job="$job",instance=~"$instance"}'},
            "bytes",
            "With the shards' pages, level after an epoch. What grows after that is a leak.",
        ),
        curves(
            "Open files of the processes",
            {each: 'process_open_fds{job="$job",instance=~"$instance"}'},
            "none",
            "Level after the start. What grows is a leak, and ends at the limit (ulimit -n).",
        ),
    ]


def run() -> list:
    return [
        labels_of(
            "What runs", 'alexnet_run_info{job="$job"}', "Recipe, hardware and versions of the newest start."
        ),
        series_of(
            "Alerts that fire",
            'ALERTS{alertstate="firing",job="$job"}',
            "docs/operations.md says what to do about each.",
        ),
        figure_now(
            "Work at stake",
            'job:alexnet_checkpoint_age:seconds{job="$job"}',
            "s",
            "What a crash now would cost: time since the newest checkpoint, or since the process began.",
            6,
        ),
        figure_now(
            "A checkpoint takes",
            'sum(increase(alexnet_checkpoint_seconds_sum{job="$job"}[$__range]))'
            ' / (sum(increase(alexnet_checkpoint_seconds_count{job="$job"}[$__range])) > 0)',
            "s",
            "Mean over the time shown. Training waits meanwhile.",
            6,
        ),
        figure_now(
            "Restarts",
            'max(changes(process_start_time_seconds{job="$job"}[$__range]))',
            "none",
            "In the time shown. A crash costs what was done since the last checkpoint; a stop, nothing.",
            6,
        ),
        figure_now(
            "Images left out",
            'sum(increase(alexnet_input_errors_total{job="$job"}[$__range]))',
            "none",
            "In the time shown, because they were damaged. The log names them.",
            6,
        ).decimals(0),
    ]
