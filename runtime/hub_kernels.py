"""Two things are called `kernels`: our kernels.py, and a package of Hugging Face that transformers looks for.

Where that package is installed, transformers finds its version, does `from kernels import ...`, gets our
file, and then no model can be loaded. And where it finds the package itself, it may replace parts of a model
by kernels from the hub, about which no self-check of ours would know.
"""

import sys

from transformers.utils import import_utils


def keep_out() -> None:
    """Let transformers take Hugging Face's `kernels` for not installed, in this process.

    Call it before a class of models is imported. It may be called again, and transformers may be imported
    already: all its modules share one function, which remembers its first answer. So it is asked anew while
    there is no such module, None being Python's mark for that.
    """
    ours = sys.modules.get("kernels")
    sys.modules["kernels"] = None
    try:
        import_utils.is_kernels_available.cache_clear()
        import_utils.is_kernels_available()
    finally:
        if ours is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = ours
