"""Our kernels, in a package that shares its name with one of Hugging Face's.

Two packages named `kernels` may be on sys.path: this folder, and Hugging Face's package, from which
transformers imports where it is installed. Python finds the first of them and hides the other. So
that both work, this module finds the next `kernels` on the
path, appends that package's folder to its own __path__, and runs its __init__.py in its own
namespace. Then

    from kernels import get_kernel              finds their names,
    from kernels.layer import Mode              their submodules,
    from kernels.infonce import info_nce        and ours.

Without the other package, this one stands alone.
"""

import os
import sys
from importlib.machinery import PathFinder


def _find_other_package():
    """Return the import spec of the first other `kernels` package on sys.path, None without one."""
    for entry in sys.path:
        spec = PathFinder.find_spec(__name__, [entry])
        if spec is None or spec.origin is None:
            continue  # nothing of the name here, or a folder without __init__.py
        if spec.submodule_search_locations is None:
            continue  # kernels.py, a plain module
        if not os.path.samefile(spec.origin, __file__):
            return spec
    return None


_other = _find_other_package()
if _other is not None:
    __path__ += _other.submodule_search_locations
    _other.loader.exec_module(sys.modules[__name__])
