"""Our kernels, and room for the Hugging Face package of the same name.

transformers does `from kernels import ...` wherever that package is installed, and a repository that comes first on sys.path
would hide it. So the next `kernels` package on the path, if there is one, is loaded into this module: its names and its
submodules are found here as if this folder did not exist, ours beside them.
"""

import os
import sys
from importlib.machinery import PathFinder

_specs = (PathFinder.find_spec(__name__, [entry]) for entry in sys.path)
_packages = (spec for spec in _specs if spec and spec.origin and spec.submodule_search_locations)
_other = next((spec for spec in _packages if not os.path.samefile(spec.origin, __file__)), None)
if _other is not None:
    __path__ += _other.submodule_search_locations
    _other.loader.exec_module(sys.modules[__name__])
