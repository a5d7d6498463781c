"""`import tinker` gives this package: for scripts that were written for the hosted service's library.

Modules named tinker, tinker.types and so on hold the objects of this package, so that isinstance holds whichever
of the two names a script uses.
"""

import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType
from typing import NoReturn

from minitinker import types
from minitinker.futures import APIFuture
from minitinker.hosted import is_retryable_status_code
from minitinker.left_out import WHY

# The version of the library whose names these are: what `tinker.__version__` says.
VERSION = "0.38.0"

_INTERFACES = """service_client training_client sampling_client rest_client api_future custom_loss
    backcompat_training_client_future backcompat_sampling_client_future"""


def install_as_tinker() -> None:
    """Make `import tinker`, `from tinker import types`, `import tinker.types.tensor_data` ... give this package.

    It holds for this process, whether the real library is installed or not, and touches nothing else; once done,
    doing it again changes nothing. A name that is left out here raises an ImportError or AttributeError that says why.

    Raises ImportError where the real library is imported already: two sets of classes would not fit together.
    """
    if any(isinstance(finder, _StandIn) for finder in sys.meta_path):
        return
    if "tinker" in sys.modules:
        raise ImportError(
            "the real tinker is imported already; call minitinker.install_as_tinker() before anything imports it, "
            "or start the script with python -m minitinker.run"
        )
    sys.meta_path.insert(0, _StandIn())


class _StandIn(MetaPathFinder, Loader):
    """Finds and makes the modules named tinker and tinker.*; every other name is left to others."""

    def __init__(self) -> None:
        self._contents = _contents()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != "tinker":
            return None
        # Python also asks for each name of `from tinker import ...` that the module does not have.
        if fullname not in self._contents:
            raise ImportError(_absent(fullname), name=fullname)
        return ModuleSpec(fullname, self, origin="minitinker", is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module, and make those below it, which are its attributes."""
        name = module.__name__

        def refuse(attribute: str) -> NoReturn:
            raise AttributeError(_absent(f"{name}.{attribute}"), name=attribute, obj=module)

        held = self._contents[name]
        vars(module).update(held, __all__=sorted(held), __getattr__=refuse)
        module.__doc__ = f"Stands in for {name}: the objects are those of minitinker."
        for path in self._contents:
            parent, _, last = path.rpartition(".")
            if parent == name:
                below = module_from_spec(ModuleSpec(path, self, origin="minitinker", is_package=True))
                sys.modules[path] = below
                setattr(module, last, below)
                self.exec_module(below)


def _contents() -> dict[str, dict[str, object]]:
    """Module -> what it holds by name.

    The modules below a package hold all that the package does, be it one class or several in the real library.
    """
    package = vars(sys.modules["minitinker"])  # to import it here would be a circle
    top = {name: package[name] for name in package["__all__"] if name != "types"} | {"__version__": VERSION}
    clients = {name: value for name, value in top.items() if name[0].isupper()}
    clients |= {"AwaitableConcurrentFuture": APIFuture}
    kinds = {name: getattr(types, name) for name in types.__all__}
    return {
        "tinker": top,
        "tinker._exceptions": clients,
        "tinker.lib": {},
        "tinker.lib.experimental": clients,
        "tinker.lib.public_interfaces": clients,
        **{f"tinker.lib.public_interfaces.{name}": clients for name in _INTERFACES.split()},
        "tinker.lib.retry_handler": clients | {"is_retryable_status_code": is_retryable_status_code},
        "tinker.types": kinds,
        "tinker.types.optim_step_request": kinds,  # of AdamParams, in older scripts
        "tinker.types.optimizer": kinds,
        **{f"tinker.types.{_module_of(name)}": kinds for name in types.__all__},
    }


def _module_of(name: str) -> str:
    """The module of a type: TensorData is in tensor_data."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _absent(path: str) -> str:
    """What to say of a module or a name in a module, tinker.types.AuditLogEntry for instance, that is not there."""
    name = path.removeprefix("tinker.")
    last = name.split(".")[-1]
    of_module = {_module_of(one): why for one, why in WHY.items()}
    why = WHY.get(name) or WHY.get(f"types.{last}") or WHY.get(last) or of_module.get(name)
    if why is None:
        return f"minitinker stands in for tinker here, and has no {path}"
    return f"minitinker stands in for tinker here, and leaves out {path} ({why})"
