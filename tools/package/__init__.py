"""AlexNet as published in 2012. In a wheel, `pipeline`, `model`, `trainer` and `tools` are inside of it.

In a checkout, this folder becomes `alexnet_train` by an editable installation; setup.py says why.
"""

from pipeline import __version__

__all__ = ["__version__"]
