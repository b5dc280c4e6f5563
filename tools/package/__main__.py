"""Make `python -m alexnet_train` the same as `alexnet-train`, in a checkout and in an installed wheel."""

from tools.command import main

if __name__ == "__main__":
    main()
