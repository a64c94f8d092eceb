# SPDX-License-Identifier: Apache-2.0
"""Options that belong together, and that a command gets as one value."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["takes_group"]

C = TypeVar("C", bound=Callable[..., Any])


def takes_group(
    command: C,
    parameter: str,
    options: Mapping[str, tuple[Any, Any]],
    kind: Callable[..., Any],
) -> C:
    """Give a command `options`, in the place of `parameter`, which gets them as a `kind`.

    Args: options: annotation and default, by name.
    """

    def run(**values: Any) -> Any:
        said = {name: values.pop(name) for name in options}
        return command(**values, **{parameter: kind(**said)})

    parameters = []
    for each in inspect.signature(command).parameters.values():
        if each.name == parameter:
            parameters += [
                each.replace(name=name, default=default, annotation=annotation)
                for name, (annotation, default) in options.items()
            ]
        else:
            parameters.append(each)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__module__, run.__qualname__ = command.__module__, command.__qualname__
    run.__annotations__ = {each.name: each.annotation for each in parameters} | {
        "return": int
    }
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer looks at
    return run  # type: ignore[return-value]  # it is called by Typer alone
