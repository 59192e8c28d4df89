"""Is a module of timm built the one way slimnas builds it? By class names, without timm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from slimnas.errors import UnsupportedModuleError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_PASSIVE = ("Identity", "Dropout", "DropPath")
"""Modules that do nothing in evaluation mode; slimnas has none of them."""

Check = Callable[[str, nn.Module], None]
Expected = Mapping[str, tuple[str, Check | None]]
"""Pattern of a module's path -> its class name ("A|B": either of them) and what else must hold."""


def check_modules(model: nn.Module, expected: Expected) -> None:
    """Refuse `model` unless every module is where and what it must be.

    Modules of another path must do nothing in evaluation mode.

    Raises:
        UnsupportedModuleError: the first that is not, by path and type.
    """
    patterns = {re.compile(pattern): wanted for pattern, wanted in expected.items()}
    for path, module in model.named_modules():
        kind = type(module).__name__
        wanted = next((wanted for p, wanted in patterns.items() if p.fullmatch(path)), None)
        if wanted is None:
            if path and kind not in _PASSIVE:
                raise UnsupportedModuleError(f"{path}: is a {kind}; slimnas has none there")
            continue
        if kind not in wanted[0].split("|"):
            names = wanted[0].replace("|", " or a ")
            raise UnsupportedModuleError(f"{path}: must be a {names}, is a {kind}")
        if wanted[1] is not None:
            wanted[1](path, module)


def must(path: str, module: object, **wanted: object) -> None:
    """Check attributes of a module.

    Raises:
        UnsupportedModuleError: one has another value.
    """
    for name, value in wanted.items():
        given = getattr(module, name, None)
        if given != value:
            where = f"{path}.{name}" if path else name
            kind = type(module).__name__
            raise UnsupportedModuleError(f"{where}: must be {value!r} in a {kind}, is {given!r}")


def has_bias(path: str, module: nn.Module) -> None:
    """Check that a linear layer or convolution has a bias."""
    if getattr(module, "bias", None) is None:
        raise UnsupportedModuleError(f"{path}: a {type(module).__name__} without bias")


def exact_gelu(path: str, module: nn.Module) -> None:
    """Check that a GELU is not one of the approximations."""
    if getattr(module, "approximate", "none") != "none":
        raise UnsupportedModuleError(f"{path}: an approximate GELU; slimnas's is exact")


def norm_with(eps: float) -> Check:
    """A check that a norm has weights and this epsilon."""

    def check(path: str, module: nn.Module) -> None:
        has_bias(path, module)
        must(path, module, eps=eps)

    return check


def part(model: nn.Module, path: str, kind: type[ModuleT]) -> ModuleT:
    """The submodule of that path, which must be a `kind`.

    Raises:
        UnsupportedModuleError: there is none, or of another type.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModuleError(f"{path}: missing; must be a {kind.__name__}") from error
    if not isinstance(module, kind):
        given = type(module).__name__
        raise UnsupportedModuleError(f"{path}: must be a {kind.__name__}, is a {given}")
    return module


def attribute(module: nn.Module, path: str, name: str) -> Any:
    """An attribute of timm's module, or None.

    `path` names a submodule; the empty one is `module` itself.
    """
    return getattr(part(module, path, nn.Module), name, None)
