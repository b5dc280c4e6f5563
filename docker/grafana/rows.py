"""The dashboard's rows below its first screen: the panels, and what to conclude from each."""

from panels import RATIO, buckets, curves, figure_now, labels_of, series_of, stacked

NO_GPU = "no GPU"
NO_EXPORTERS = "the exporters are not started"
UNSOUND = 'alexnet_unsound_intervals_total{job="$job"}'


def bottleneck() -> list:
    waits = (
        "sum by (le) (rate(alexnet_input_wait_seconds_bucket"
        '{job="$job",instance=~"$instance",phase="train"}[$__rate_interval]))'
    )
    spent = (
        "avg(rate(alexnet_activity_seconds_total"
        '{job="$job",instance=~"$instance",activity="%s"}[$__rate_interval]))'
    )
    of_process = '{job="$job",instance=~"$instance"}[$__rate_interval]'
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
            "The ceilings are measured at the start with --calibrate. Training cannot exceed the lower "
            "one; if it is well below both, loader and model slow each other down.",
            12,
        ),
        curves(
            "Device busy, batches ready",
            {
                "busy": 'job:alexnet_busy:ratio5m{job="$job"}',
                "ready": 'job:alexnet_ready:ratio5m{job="$job"}',
            },
            RATIO,
            "Busy at least 95 %: compute-bound. Otherwise, ready below 50 % and input wait at least 5 %: "
            "input-bound, or storage-bound if reads waited for the bucket half of that time; ready at least "
            "95 %: host gap.",
            12,
        ),
        buckets(
            "Step time",
            "sum by (le) (increase(alexnet_step_seconds_bucket"
            '{job="$job",instance=~"$instance",phase="train"}[$__rate_interval]))',
            "s",
            "Number of steps by duration. One narrow band is good; a second band above it means that some "
            "steps waited.",
            12,
        ),
        curves(
            "Wait for input",
            {
                "median": f"histogram_quantile(0.5, {waits})",
                "99th percentile": f"histogram_quantile(0.99, {waits})",
            },
            "s",
            "Time until a batch arrived; up to 1 ms means that it was ready. A high median means that the "
            "input is too slow. If only the 99th percentile is high, the input stalls occasionally: raise "
            "--prefetch.",
            12,
            log=True,
        ),
        curves(
            "Fetched from the bucket",
            {"{{instance}}": "sum by (instance) (rate(alexnet_storage_bytes_total" + of_process + "))"},
            "Bps",
            "Bytes of shards and samples that arrive, with --data and a URL. At the link's limit while "
            "storage-bound: only a larger --cache-size or a faster link helps.",
            12,
        ),
        curves(
            "Cache of the bucket",
            {
                "waiting": 'job:alexnet_storage_wait:ratio5m{job="$job"}',
                "{{result}}": "sum by (result) (rate(alexnet_storage_shard_lookups_total" + of_process + "))",
                "evictions": "sum(rate(alexnet_storage_evictions_total" + of_process + "))",
                "retries": "sum(rate(alexnet_storage_retries_total" + of_process + "))",
            },
            "none",
            "Waiting: seconds of waiting for storage per second of training. Shards that were in the cache "
            "(hit) or not (miss), evictions and repeated requests: per second. Retries mean that the storage "
            "throttles or fails.",
            12,
        ),
        stacked(
            curves(
                "Where the time went",
                {name: spent % name for name in ("train", "checkpoint", "eval", "start-up")},
                RATIO,
                "Shares of wall-clock time. All except training is overhead. If saving takes a large share, "
                "save less often.",
                24,
            )
        ),
    ]


def learning() -> list:
    return [
        curves(
            "Loss",
            {
                "training": 'avg(alexnet_loss{job="$job",phase="train"})',
                "validation": 'avg(alexnet_loss{job="$job",phase="eval"})',
            },
            "none",
            "Mean cross-entropy. If it rises in validation while it falls in training, the net overfits.",
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
            "On a plateau the learning rate should drop, or training is finished.",
            12,
        ),
        curves(
            "Learning rate",
            {"rate": 'max(alexnet_learning_rate{job="$job"} != 0)'},
            "sci",
            "Learning rate of the weights. A drop here explains a drop in the error at the same time.",
        ),
        curves(
            "Gradient scale",
            {"scale": 'max(alexnet_grad_scale{job="$job"} != 0)'},
            "none",
            "Loss scale of fp16. It normally goes up and down; if it keeps falling, all gradients overflow. "
            "It is 1 in other precisions.",
            log=True,
        ),
        curves(
            "Skipped steps",
            {"steps": 'max(increase(alexnet_skipped_steps_total{job="$job"}[$__rate_interval]))'},
            "none",
            "Updates skipped because gradients were not finite. In fp16, a few are normal.",
        ),
        curves(
            "Unsound intervals",
            {"{{reason}}": f"max by (reason) (increase({UNSOUND}[$__rate_interval]))"},
            "none",
            "Log intervals with a loss or weights that are not finite, with a loss scale of fp16 that has "
            "collapsed (overflow), or with a loss no better than guessing (chance).",
            24,
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
            "Kernels: share of time in which any kernel runs, so 100 % can still be slow. Tensor cores: "
            "share of time in which they work. JPEG engine at 100 % while input-bound: pack smaller images.",
            12,
            NO_GPU,
        ),
        curves(
            "Memory in use",
            {process: 'alexnet_gpu_memory_used_ratio{job="$job",instance=~"$instance"}'},
            RATIO,
            "Memory of the whole GPU used by all processes. Near 100 %, the next larger batch ends the run.",
            12,
            NO_GPU,
        ),
        curves(
            "Peak memory of torch",
            {process: 'alexnet_gpu_memory_peak_bytes{job="$job",instance=~"$instance"}'},
            "bytes",
            "The rest of the GPU's memory is available to DALI and for a larger batch.",
            otherwise=NO_GPU,
        ),
        curves(
            "Power",
            {device: "DCGM_FI_DEV_POWER_USAGE"},
            "watt",
            "At its power limit a GPU lowers its clock; far below it, the GPU is idle.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "Temperature",
            {device: "DCGM_FI_DEV_GPU_TEMP"},
            "celsius",
            "If it rises while images/s fall, the GPU throttles: check its cooling.",
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
            "At 100 % while input-bound, decoding on the CPU is the limit.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "Memory of the host",
            {each: "1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes"},
            RATIO,
            "Memory that cannot be freed. The rest caches shards that were read, which makes the next epoch "
            "faster.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "Disk reads",
            {each: "sum by (instance) (rate(node_disk_read_bytes_total[$__rate_interval]))"},
            "Bps",
            "At the disk's limit while input-bound: move the shards to a faster disk.",
            otherwise=NO_EXPORTERS,
        ),
        curves(
            "CPU of the processes",
            {each: 'rate(process_cpu_seconds_total{job="$job",instance=~"$instance"}[$__rate_interval])'},
            "none",
            "In cores. If it is exactly 1 while the GPU is idle, Python is the limit: a host gap.",
        ),
        curves(
            "Memory of the processes",
            {each: 'process_resident_memory_bytes{job="$job",instance=~"$instance"}'},
            "bytes",
            "Includes the shards' pages, so it is constant after an epoch. Growth after that is a leak.",
        ),
        curves(
            "Open files of the processes",
            {each: 'process_open_fds{job="$job",instance=~"$instance"}'},
            "none",
            "Constant after the start. Growth is a leak, which ends the run at the limit (ulimit -n).",
        ),
    ]


def run() -> list:
    return [
        labels_of(
            "Run details",
            'alexnet_run_info{job="$job",run!=""}',
            "Recipe, hardware and versions of the latest start.",
        ),
        series_of(
            "Firing alerts",
            'ALERTS{alertstate="firing",job="$job"}',
            "docs/operations.md says what to do about each alert.",
        ),
        figure_now(
            "Unsaved work",
            'job:alexnet_checkpoint_age:seconds{job="$job"}',
            "s",
            "The work that a crash would cost now: time since the newest checkpoint, or since the start.",
            6,
        ),
        figure_now(
            "Checkpoint time",
            'sum(increase(alexnet_checkpoint_seconds_sum{job="$job"}[$__range]))'
            ' / (sum(increase(alexnet_checkpoint_seconds_count{job="$job"}[$__range])) > 0)',
            "s",
            "Mean time to save, over the time range shown. Training goes on meanwhile.",
            6,
        ),
        figure_now(
            "Checkpoint pause",
            'sum(increase(alexnet_checkpoint_stall_seconds_sum{job="$job"}[$__range]))'
            ' / (sum(increase(alexnet_checkpoint_stall_seconds_count{job="$job"}[$__range])) > 0)',
            "s",
            "Mean time that training waited for a checkpoint, over the time range shown. If it is close to "
            "the checkpoint time, checkpoints are due faster than they can be saved.",
            6,
        ),
        figure_now(
            "Restarts",
            'sum(changes(process_start_time_seconds{job="$job"}[$__range]) + 1'
            " and on (instance) last_over_time(alexnet_step[$__range]))"
            ' / max_over_time(count(alexnet_step{job="$job"})[$__range:1m]) - 1',
            "none",
            "Within the time range shown. A crash costs the work since the last checkpoint, a stop none.",
            6,
        ),
        figure_now(
            "Skipped images",
            'sum(increase(alexnet_input_errors_total{job="$job"}[$__range]))',
            "none",
            "Damaged images within the time range shown. The log names them.",
            6,
        ).decimals(0),
    ]
