"""Networks and data sets of the user's own: `file.py:function` and `package.module:Class`.

Both execute code: a file when it is run, a package when it is imported, and then whatever is called
by name with whatever arguments: `os:system?command=…` is a spec like any other. So neither is
touched unless the caller trusts the text, whether the package is installed or not, and already
imported or not. Who types a spec has decided to run it; a recipe or a checkpoint that names one has
not, and asks for `--trust-source`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.models.libraries import FAMILIES, FORMS
from nampruner.models.spec import Spec, parse_spec, refuse_shape


def is_user_file(text: str) -> bool:
    """Say whether `text` has the form `file.py:function`, with or without `?arguments`."""
    return parse_spec(text).family.endswith(".py")


def is_import_path(text: str) -> bool:
    """Say whether `text` has the form `package.module:name`, with or without `?arguments`."""
    spec = parse_spec(text)
    dotted = all(part.isidentifier() for part in (*spec.family.split("."), spec.name))
    return dotted and spec.family not in FAMILIES and not is_user_file(text)


def runs_user_code(text: str) -> bool:
    """Say whether building `text` executes other code than ours, timm's and torchvision's."""
    return is_user_file(text) or is_import_path(text)


def call_user_function(text: str, *, trust_source: bool, **offered: Any) -> Any:
    """Call `file.py:function?key=value` or `package.module:Class?…`, see `user_call`."""
    with user_call(text, trust_source=trust_source, **offered) as (function, arguments):
        return function(**arguments)


@contextmanager
def user_call(
    text: str, *, trust_source: bool, **offered: Any
) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """Give what `text` names, and its arguments: its own and what it accepts out of `offered`.

    A file sees its neighbours meanwhile; a package is looked for where Python looks, and at last in
    the current folder.

    Raises:
        NamPrunerError: the source is not trusted, the file, the module or the function is missing,
            or the arguments do not fit it.
    """
    spec = parse_spec(text)
    if not trust_source:
        raise NamPrunerError(
            f"{text!r} would run code from {spec.family}; read it, then allow it with "
            "--trust-source (in Python: trust_source=True)"
        )
    refuse_shape(spec)
    with _importable(spec):
        module = _load(Path(spec.family)) if is_user_file(text) else _import(spec)
        function = _function(module, spec.name)
        arguments = {**_accepted(function, offered), **spec.arguments}
        _check_fit(function, arguments, text)
        yield function, arguments


@contextmanager
def _importable(spec: Spec) -> Iterator[None]:
    """Let a file import its neighbours; let a package lie in the current folder."""
    before = list(sys.path)
    if is_user_file(spec.text):
        path = Path(spec.family)
        if not path.is_file():
            raise NamPrunerError(
                f"{spec.text!r}: there is no file {path.resolve()}; give path.py:function"
            )
        sys.path.insert(0, str(path.resolve().parent))
    else:
        # last, so that nothing lying about hides an installed package
        sys.path.append(str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _load(path: Path) -> ModuleType:
    name = f"nampruner_user_{path.stem}"
    loader = SourceFileLoader(name, str(path))
    module = module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    # dataclasses and pickle look a class up in sys.modules
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def _import(spec: Spec) -> ModuleType:
    try:
        return import_module(spec.family)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{spec.family}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise NamPrunerError(
            f"model {spec.text!r}: there is no module {error.name!r} to import; install it, or "
            f"start in the folder it lies in; or give {FORMS}."
            f"{did_you_mean(spec.family, FAMILIES)}"
        ) from None


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise NamPrunerError(
            f"{getattr(module, '__file__', module.__name__)} has no function or class {name!r}; "
            f"give one it defines.{did_you_mean(name, known)}"
        )
    return function  # type: ignore[no-any-return]


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}


def _check_fit(function: Callable[..., Any], arguments: dict[str, Any], text: str) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise NamPrunerError(
            f"{text!r}: {error}; it takes {signature}, write ?name=value for each that is needed"
        ) from None
