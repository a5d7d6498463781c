"""Losses of one datum, traced by torch.fx: what create_custom_loss makes and forward_backward_custom runs.

A traced loss is a graph of torch's functions on its inputs and nothing else: it sees no other tensor, and takes the
same path whatever the numbers are. The hosted service demands that since it runs such losses elsewhere; here the
same rules hold, so that a loss that runs here runs there.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, TypeAlias

from minitinker.conform import argument
from minitinker.errors import BadRequestError
from minitinker.types import CustomLossInput, CustomLossInputRank, Datum

if TYPE_CHECKING:
    import torch

# (logprobs, the loss_fn_inputs it names, ...) -> (loss, metrics), all of them tensors of one datum.
PerDatumLossFn: TypeAlias = "Callable[..., tuple[torch.Tensor, Mapping[str, torch.Tensor]]]"

_MODULES = {"torch", "math", "operator", "_operator"}  # whose functions a loss may call
_LEAVING_TORCH = {"item", "numpy", "tolist"}  # methods that make Python numbers of tensors
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_MOST_INPUTS = 16


@dataclass(frozen=True)
class LossHandle:
    """A loss to hand to `forward_backward_custom` in the session that made it.

    Fields:
        name: the function's.
        inputs: logprobs and then the loss_fn_inputs it takes, in its order, each with its rank.
        session_id: of the ServiceClient that made it.
        graph: what runs, torch's traced form of the function.
        loss_id: the hosted service's; None here.
    """

    name: str
    inputs: tuple[CustomLossInput, ...]
    session_id: str
    graph: Any = field(repr=False, compare=False)
    loss_id: str | None = None

    @property
    def key(self) -> str:
        """The same for the same traced loss with the same inputs."""
        return hashlib.sha256(f"{self.graph.code}{self.inputs!r}".encode()).hexdigest()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The loss_fn_inputs that the loss takes, in its order."""
        return tuple(each.name for each in self.inputs[1:])

    def __call__(self, data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        """The sum of the datums' losses. Metrics are added up, or averaged over datums where their names end so."""
        total: Any = 0
        sums: dict[str, float] = {}
        for i, (datum, lp) in enumerate(zip(data, logprobs, strict=True)):
            inputs = [datum.loss_fn_inputs[name].to_torch() for name in self.input_names]
            loss, metrics = self.graph(lp, *inputs)
            if loss.ndim != 0:
                raise BadRequestError(
                    f"the loss {self.name} of data[{i}] has shape {tuple(loss.shape)}; it must be one number"
                )
            total = total + loss
            for key, value in metrics.items():
                number = value.detach() if hasattr(value, "detach") else value
                sums[key] = sums.get(key, 0.0) + float(number)
        return total, {k: x / len(data) if k.endswith(":mean") else x for k, x in sums.items()}

    def check(self, data: list[Datum]) -> None:
        """Raise BadRequestError unless every datum has each input, of its rank. Of what is no list, others tell."""
        for i, datum in enumerate(data if isinstance(data, list | tuple) else ()):
            given = datum.loss_fn_inputs if isinstance(datum, Datum) else {}
            for each in self.inputs:
                key = "target_tokens" if each.name == "logprobs" else each.name  # they have one shape
                if key not in given:
                    raise BadRequestError(f"data[{i}]: the loss {self.name} needs the input {key!r}")
                if len(given[key].shape) != each.rank:
                    raise BadRequestError(
                        f"data[{i}].loss_fn_inputs[{key!r}] has shape {tuple(given[key].shape)}; the loss "
                        f"{self.name} takes {each.name} of rank {each.rank}"
                    )


def trace_loss(
    fn: PerDatumLossFn, input_ranks: Mapping[str, CustomLossInputRank], session_id: str
) -> LossHandle:
    """Make a handle of a function. Raises BadRequestError, naming it, for what breaks a rule of this file."""
    import torch.fx

    if not callable(fn):
        raise BadRequestError(
            f"fn is {shortened(fn)}; it must be a function (logprobs, *inputs) -> (loss, metrics)"
        )
    argument(dict[str, CustomLossInputRank], input_ranks, "input_ranks")
    name = getattr(fn, "__name__", type(fn).__name__)
    inputs = _inputs(fn, name, input_ranks)
    try:
        graph = torch.fx.symbolic_trace(fn)
    except Exception as error:  # torch raises of every kind, and so may the function
        raise BadRequestError(
            f"{name} cannot be traced by torch.fx: {error}; it must call torch and math alone, and not branch on "
            "the values of tensors"
        ) from error
    for node in graph.graph.nodes:
        refused = _refused(node)
        if refused:
            raise BadRequestError(f"{name} {refused}")
    return LossHandle(name, inputs, session_id, graph)


def _inputs(
    fn: PerDatumLossFn, name: str, input_ranks: Mapping[str, CustomLossInputRank]
) -> tuple[CustomLossInput, ...]:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError) as error:  # of what is not written in Python
        raise BadRequestError(f"the parameters of fn, {name}, cannot be told: {error}") from error
    names = [parameter.name for parameter in parameters]
    if not names or names[0] != "logprobs":
        raise BadRequestError(f"the first parameter of {name} must be logprobs; it takes {names}")
    if len(names) > _MOST_INPUTS:
        raise BadRequestError(f"{name} takes {len(names)} parameters; at most {_MOST_INPUTS} are allowed")
    for parameter in parameters:
        plain = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not plain or parameter.default is not parameter.empty or not _NAME.fullmatch(parameter.name):
            raise BadRequestError(
                f"{name} has the parameter {str(parameter)!r}; each must be a plain one, with a lower-case name and no "
                "default, for it names a key of loss_fn_inputs"
            )
    if set(input_ranks) != set(names):
        raise BadRequestError(
            f"input_ranks has the keys {sorted(input_ranks)}; {name} takes {', '.join(names)}, and each needs its rank"
        )
    if input_ranks["logprobs"] == 0:
        raise BadRequestError("the rank of logprobs is 0; it is 1 for (N,) or 2 for (N, K)")
    return tuple(CustomLossInput(name=each, rank=input_ranks[each]) for each in names)


def _refused(node: Any) -> str | None:
    """What is wrong with a node of a traced loss, as the end of a sentence about the loss; None: nothing."""
    import torch

    if node.op == "call_function":
        module = getattr(node.target, "__module__", None) or ""
        if node.target is not getattr and module.split(".")[0] not in _MODULES:
            called = getattr(node.target, "__qualname__", node.target)
            return f"calls {called} of {module or 'no module'}; it may call torch and math alone"
    elif node.op == "call_method":
        if node.target == "backward":
            return "calls backward(); it must return the loss, which is differentiated for it"
        if node.target in _LEAVING_TORCH or not hasattr(torch.Tensor, node.target):
            return f"calls the method {node.target}; it may call methods that make tensors of tensors alone"
    elif node.op == "call_module":
        return f"calls the module {node.target}; it may call functions alone, such as torch.nn.functional's"
    elif node.op == "get_attr":
        return "reads a tensor from outside; it may read its parameters alone"
    elif node.op == "output":
        return _refused_output(node.args[0])
    return None


def _refused_output(output: Any) -> str | None:
    import torch.fx

    if not isinstance(output, tuple | list) or len(output) != 2 or not isinstance(output[1], dict):
        return f"returns {output!r:.80}; it must return (loss, metrics), a tensor and a dict of tensors"
    loss, metrics = output
    if not isinstance(loss, torch.fx.Node):
        return f"returns the loss {loss!r:.80}; it must be a tensor made from logprobs"
    for key, value in metrics.items():
        if not isinstance(key, str) or not _METRIC.fullmatch(key):
            return f"returns the metric {key!r:.80}; its name must be custom/<name>:sum or custom/<name>:mean"
        if not isinstance(value, torch.fx.Node):
            return f"returns {value!r:.80} as the metric {key!r}; it must be a tensor"
    return None
