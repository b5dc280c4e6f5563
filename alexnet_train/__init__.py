"""AlexNet as published in 2012: the version and, where it was installed from a wheel, the whole project.

In a checkout, `pipeline`, `model`, `trainer` and `tools` lie beside this package. In a wheel they are inside
of it, as `alexnet_train.pipeline` and so on; setup.py says why.
"""

__version__ = "0.1.0"
