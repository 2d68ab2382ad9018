"""Make the shared cases importable, and the interpreter quick where kernels run in it."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

if not torch.cuda.is_available():
    import quick_interpreter

    quick_interpreter.install()
