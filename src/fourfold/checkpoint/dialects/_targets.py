"""Which scheme a module has, by the rules of compressed-tensors: name, expression, class."""

import re

from fourfold.checkpoint.block_dialect import damaged
from fourfold.checkpoint.storage.header import short
from fourfold.core.errors import FourfoldError
from fourfold.core.quantization import LayerScheme

EXPRESSION = "re:"
LINEAR = "Linear"


class Targets:
    """Targets added one by one; exact names win over expressions, these over the class Linear."""

    def __init__(self) -> None:
        self._names: dict[str, LayerScheme] = {}
        self._expressions: list[tuple[re.Pattern[str], LayerScheme]] = []

    def add(self, target: str, scheme: LayerScheme) -> None:
        """Give the modules of ``target`` a scheme. Raises FourfoldError for a broken expression."""
        if not target.startswith(EXPRESSION):
            self._names.setdefault(target, scheme)
            return
        try:
            self._expressions.append((re.compile(target.removeprefix(EXPRESSION)), scheme))
        except (re.error, RecursionError, OverflowError) as error:
            raise damaged(
                f"has the target '{short(target)}', which is no regular expression ({error})"
            ) from error

    def find(self, module: str) -> LayerScheme | None:
        """The scheme of a linear module, or None when nothing targets it."""
        if (scheme := self._names.get(module)) is not None:
            return scheme
        for expression, scheme in self._expressions:
            if expression.match(module):
                return scheme
        return self._names.get(LINEAR)

    def scheme_of(self, module: str) -> LayerScheme:
        """The scheme of a module that is stored quantized. Raises FourfoldError when nothing targets it."""
        if (scheme := self.find(module)) is not None:
            return scheme
        raise FourfoldError(
            f"'{short(module)}' is stored quantized, but no config group of quantization_config targets it. "
            "config.json belongs to another folder: copy it again from the model's origin."
        )
