"""One rule of discovery: the module's name is the name on the command line.

A registry is a package; each of its modules exports one object under an agreed attribute. Listing the names
imports nothing; an import error of the chosen module propagates. ``-`` on the command line is ``_`` in a
module. Subpackages and modules with a leading underscore are machinery and are not listed.
"""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fourfold.core.errors import UsageError


class Registry:
    """The modules of ``package``, each exporting ``attribute``; ``noun`` is what a person calls one."""

    def __init__(self, package: str, attribute: str, noun: str):
        self.package, self.attribute, self.noun = package, attribute, noun

    def names(self) -> list[str]:
        """All names, sorted, without importing any of the modules."""
        spec = find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None
        modules = pkgutil.iter_modules(spec.submodule_search_locations)
        return sorted(m.name.replace("_", "-") for m in modules if not m.ispkg and not m.name.startswith("_"))

    def get(self, name: str) -> Any:
        """The object that the module ``name`` exports. Raises UsageError for a name that is not listed."""
        if name not in self.names():
            raise UsageError(f"Unknown {self.noun} '{name}'. Choose one of: {', '.join(self.names())}.")
        return getattr(import_module(f"{self.package}.{name.replace('-', '_')}"), self.attribute)
