"""Pack a dataset, or continue to pack one: the function behind the command make-shards."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.locations import is_url
from pipeline.manifest import MANIFEST_NAME, Manifest
from pipeline.packing import executors, resume
from pipeline.packing.extraction import extract
from pipeline.packing.finish import write_dataset
from pipeline.packing.options import PackingOptions
from pipeline.packing.planning import describe_plan, plan_tasks
from pipeline.packing.progress import Progress
from pipeline.packing.remarks import remarks_about
from pipeline.packing.shard import ShardTask
from pipeline.packing.shard_results import ShardResult, load_result
from pipeline.packing.sources.find import SourceError, find_sources
from pipeline.packing.storage import STATE_FOLDER, Folder
from pipeline.packing.workers import warn
from pipeline.remote_errors import redact
from pipeline.storage import absolute


def pack(options: PackingOptions, progress: Progress | None = None) -> Manifest:
    """Pack a dataset, or continue an earlier call with the same options that was stopped.

    progress: shows what is done, and receives the remarks about the dataset. Raises SourceError if the input
    or the output is unsuitable, PackingError if the workers fail, and OSError if the storage fails.
    """
    _check_folders(options)
    sources = find_sources(absolute(options.input), options.val_fraction, options.seed, options.class_names)
    tasks = plan_tasks(options, sources)
    all_tasks = [task for split in tasks.values() for task in split]
    if not options.in_place:
        _check_inputs_are_kept(options, all_tasks)
    output, progress = Folder(options.output), progress or Progress()
    for warning in sources.warnings:
        progress.say(warning)
    with resume.locked(output):
        plan = describe_plan(options, all_tasks)
        complete = resume.prepare(output, plan, options.overwrite, options.in_place)
        if complete:
            manifest = Manifest.model_validate_json(output.read(MANIFEST_NAME))
        else:
            results = _results(options, all_tasks, sources.sequential, output, progress)
            manifest = write_dataset(options, sources, tasks, results)
        progress.remarks = remarks_about(sources, manifest, output)
        try:
            resume.clean_up(output)
        except OSError as error:
            leftover = error.filename or f"{output}/{STATE_FOLDER}"
            warn(f"the dataset is complete, but {leftover} cannot be removed: {error.strerror}")
    return manifest


def _check_folders(options: PackingOptions) -> None:
    """Raise SourceError if the output cannot be written, or would become a class folder of the input."""
    if options.output.startswith(("http://", "https://")):
        raise SourceError(
            f"--out {redact(options.output)} is on a web server, which stores nothing: "
            "choose a bucket (s3://…) or a folder"
        )
    if options.val_fraction is None or is_url(options.input) or is_url(options.output):
        return
    if Path(options.output).resolve().is_relative_to(Path(options.input).resolve()):
        raise SourceError(
            f"--out {options.output} is inside --input, where it would be read as a class folder: "
            "choose another --out"
        )


def _check_inputs_are_kept(options: PackingOptions, tasks: list[ShardTask]) -> None:
    """Raise SourceError if shards in the output, which --overwrite would replace, are the input."""
    output = absolute(options.output).rstrip("/")
    folder = output if is_url(output) else str(Path(output).resolve())
    files = {source.file for task in tasks for source in task.sources}
    for tar in sorted(file for file in files if file.endswith(".tar")):
        place, _, name = (tar if is_url(tar) else str(Path(tar).resolve())).rpartition("/")
        if place == folder and resume.is_shard(name):
            raise SourceError(
                f"--out {redact(options.output)} holds {name}, a part of --input: choose another --out"
            )


def _results(
    options: PackingOptions,
    tasks: list[ShardTask],
    sequential: frozenset[str],
    output: Folder,
    progress: Progress,
) -> list[ShardResult]:
    """Return the results of all tasks: load those that an earlier run finished, and run the others."""
    sizes = output.sizes()
    sizes |= {task.tar: Path(options.output, task.tar).stat().st_size for task in tasks if task.tar}
    with ThreadPoolExecutor(16) as pool:  # behind a URL, each record takes a request or two
        results = list(pool.map(lambda task: load_result(output, task.name, task.files, sizes), tasks))
    missing = [task for task, result in zip(tasks, results, strict=True) if result is None]
    missing = extract(missing, sequential, output)
    total, remaining = (sum(len(task.sources) for task in some) for some in (tasks, missing))
    progress.begin(total, total - remaining)
    if missing:
        executor = (
            executors.processes(min(options.workers, len(missing)))
            if options.scheduler is None
            else executors.dask(options.scheduler)
        )
        with progress, executor as running:
            packed = iter(executors.run_tasks(missing, running, progress.show))
        results = [next(packed) if result is None else result for result in results]
    return [result for result in results if result is not None]
