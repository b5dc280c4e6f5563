"""Export a trained net for use without this project.

    alexnet-train export runs/a --out net.onnx
    alexnet-train export runs/a --out net.pt2 --checkpoint best

The extension of --out chooses the format:

    .onnx          for ONNX Runtime and other ONNX readers
    .pt2           torch.export, for PyTorch; opening such a file can run code, so accept none from strangers
    .safetensors,  state dict: torchvision's, for a run with its AlexNet, or that of a net given with --net
    .pth

The first two map `pixels` [N,3,crop,crop], for any N, to `logits` [N,classes], in fp32 as in evaluation. They
carry `net.json`, in the ONNX file's metadata_props or in the .pt2 file's extra_files; it says how a picture
becomes pixels and what the classes are (see pipeline/spec.py).

Each file is read back before it gets its name. Its logits of validation images must differ from the
checkpoint's by at most 0.0001 of the largest logit; a state dict must be equal bit for bit.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script, perhaps where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.locations import location_of
from pipeline.manifest import DatasetError
from pipeline.output import secure
from pipeline.remote_errors import reason_in_full
from tools.classifying.nets import NetError
from tools.options import command_parser
from trainer.run import Run, RunError
from trainer.settings import SettingsError

EXTENSIONS = (".onnx", ".pt2", ".safetensors", ".pth")


def main() -> None:
    secure()
    options = parse_arguments()
    run = Run(options.run)
    try:
        settings = run.settings()
        if options.data:
            settings = settings.model_copy(update={"data": options.data})

        # torch takes seconds to import, which --help must not wait for. It raises OSError where it finds no
        # folder for temporary files.
        from tools.exporting.formats import export

        print(export(settings, run, options.out, options.checkpoint == "best"))
    except DatasetError as error:
        sys.exit(f"export: {error}. If the dataset has moved, give its folder with --data")
    except (NetError, SettingsError, RunError) as error:
        sys.exit(f"export: {error}")
    except OSError as error:
        reason = reason_in_full(error, options.out)
        sys.exit(f"export: {reason}. Fix the cause and run the same command again")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"file to write; its extension, one of {', '.join(EXTENSIONS)}, chooses the format",
    )
    add(
        "--checkpoint",
        choices=("newest", "best"),
        default="newest",
        help="checkpoint to export (default newest)",
    )
    add("--data", type=location_of, metavar="DIR", help="folder or URL of the run's dataset, if it has moved")
    options = parser.parse_args()
    if options.out.suffix not in EXTENSIONS:
        parser.error(f"--out {options.out}: its name must end in one of {', '.join(EXTENSIONS)}")
    return options


if __name__ == "__main__":
    main()
