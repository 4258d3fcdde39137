"""The values of a trace: tensors as far as can be told, numbers otherwise.

Proxies of torch.fx record what is done with a value; these also record changes in place, which
torch.fx takes for additions or for nothing, and refuse what a graph cannot hold.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

__all__ = ["Attribute", "TensorProxy", "Untraceable", "is_instance", "is_number"]


class Untraceable(BaseException):
    """Why a forward has no graph; no Exception, because a forward may catch those."""


class _Value(fx.Proxy):
    """What torch.fx records, and changes in place, which it takes for additions or for nothing."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise Untraceable(f"it assigns to the attribute {name} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        raise Untraceable("it asks for the length of a tensor")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
    _function = getattr(operator, f"i{_name}")
    setattr(_Value, f"__i{_name}__", _in_place(_function))


class TensorProxy(_Value):
    """A value of the graph that is a tensor, as far as can be told."""


class Attribute(_Value, fx.proxy.Attribute):
    """An attribute of a value."""


_isinstance = isinstance


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance` for forwards that are traced: a value of the graph is a tensor.

    Not by giving the value another `__class__`: functions in C would then read it as a tensor.
    """
    if _isinstance(value, kinds):
        return True
    return type(value) is TensorProxy and issubclass(Tensor, kinds)


# What these return are numbers, and so is what Python makes of numbers.
_SIZES = {"size", "dim", "numel", "nelement", "ndimension", "stride", "element_size"}


def is_number(node: fx.Node) -> bool:
    """Whether the value of a node is a number or a shape, and no tensor."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    module = getattr(node.target, "__module__", "")
    is_of_python = node.op == "call_function" and module in ("_operator", "operator", "math")
    given = node.all_input_nodes
    return is_of_python and bool(given) and all(value.meta["is_number"] for value in given)
