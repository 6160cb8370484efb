"""What a checkup leaves compiled, and how it is freed."""

import inspect
import sys
import types


def drop_compiled() -> None:
    """Frees the programs that functions of this package have compiled so far.

    A checkup compiles dozens of programs for one problem alone, and JAX keeps them as
    long as the process lives; each takes memory maps, of which Linux allows a process
    some 65,000.  Only time is lost: what is called again is compiled again.
    """
    ours = [one for name, one in sys.modules.items() if name.startswith("nnsanity.")]
    for module in ours:
        for value in list(vars(module).values()):
            if isinstance(value, types.FunctionType):  # around a compiled one
                value = inspect.unwrap(value, stop=lambda f: hasattr(f, "clear_cache"))
            if hasattr(value, "clear_cache"):
                value.clear_cache()
