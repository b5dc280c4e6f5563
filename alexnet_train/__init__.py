"""AlexNet as published in 2012: the version, and, once installed from a wheel, all packages of the project.

In a checkout, `pipeline`, `model`, `trainer` and `tools` lie beside this package. A wheel has them inside of it, as
`alexnet_train.pipeline` and so on, because such names would be shared with other distributions (setup.py).
"""

__version__ = "0.1.0"
