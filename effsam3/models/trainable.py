# SPDX-License-Identifier: Apache-2.0
"""What of a model is trained in place: found by the names of its submodules and parameters, and taken out as one
module, which is optimised, saved and merged, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

from torch import Tensor, nn

from effsam3.errors import UserError, did_you_mean

ALL = "all"  # the name that means the whole model


def find_trainable(
    model: nn.Module, asked: Sequence[str], unused: tuple[str, ...] = (), called: str = "tracker", of: str = ""
) -> dict[str, list[str]]:
    """Return for each name the whole names of the submodules and parameters that it means, outermost ones only.

    A name means what is called so from the model on, such as `memory_encoder` or `mask_decoder.iou_prediction_head`;
    where there is no such thing, everything below that ends in it, such as `self_attn`. `all` means all of it.

    Args:
        unused: beginnings of the names of what the model never calls.
        called: what messages call the model.
        of: what they add where it never uses a name.

    Raises:
        UserError: a name means nothing, or only what the model never uses.
    """
    parameters = [name for name, _ in model.named_parameters() if not name.startswith(unused)]
    # Every module that holds a parameter which is used, and the parameters themselves.
    known = {name.rsplit(".", up)[0]: None for name in parameters for up in range(name.count("."), -1, -1)}
    top = list(dict.fromkeys(one.split(".")[0] for one in known))
    found: dict[str, list[str]] = {}
    for name in asked:
        below = [name] if name in known else [one for one in known if one.endswith(f".{name}")]
        places = top if name == ALL else below
        if not places:
            if any(f".{one}".startswith(f".{name}.") or f".{name}." in f".{one}" for one in unused):
                raise UserError(f"model.trainable: the {called} never uses {name!r}{of}")
            last = {one.rpartition(".")[2] for one in known}
            raise UserError(
                f"model.trainable: nothing in the {called} is called {name!r}{_near(name, [*known, *last])}; its "
                f"modules are {', '.join(top)}"
            )
        found[name] = outermost(places)
    return found


def _near(name: str, known: Sequence[str]) -> str:
    """Return a suggestion, where one is near: the list of all names would fill pages."""
    near = did_you_mean(name, known)
    return near.removesuffix("?") if near.startswith("; did you") else ""


def outermost(names: Sequence[str]) -> list[str]:
    """Return names without those that lie in another of them, each once, in order."""
    once = list(dict.fromkeys(names))
    return [name for name in once if not name.startswith(tuple(f"{other}." for other in once))]


def count_parameters(parameters: Mapping[str, Tensor], places: Sequence[str]) -> int:
    """Return how many numbers these submodules and parameters hold."""
    starts = tuple(f"{place}." for place in places)
    return sum(one.numel() for name, one in parameters.items() if f"{name}.".startswith(starts))


class TrainedParts(nn.Module):
    """Parts of a model, under the model's own names; the frozen rest is next to it, not inside.

    So checkpoints, optimizer and ZeRO only see what learns, though the forward runs the whole model. Frozen parts stay
    in eval mode whatever mode this is in.
    """

    def __init__(self, model: nn.Module, trained: Iterable[str], unused: tuple[str, ...] = ()):
        """`trained` are whole names of submodules and parameters; `unused` as in `find_trainable`."""
        super().__init__()
        model.eval().requires_grad_(False)
        for name in trained:
            register(self, name, _found(model, name))
        for name, parameter in self.named_parameters():
            # A copy: another model may share the same memory, that of a mapped file.
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(not name.startswith(unused))

    def keep_beside(self, **modules: nn.Module | None) -> None:
        """Make modules attributes that torch does not know: they are not optimised, saved or moved with this one."""
        self.__dict__.update(modules)
        self.__dict__["beside"] = [*self.__dict__.get("beside", ()), *filter(None, modules.values())]

    def __deepcopy__(self, memo: dict) -> TrainedParts:
        """Copy what is trained, for averaged weights; what is frozen is shared."""
        # `deepcopy` finds these tensors in `memo` and does not copy them: an average of frozen weights is the weights.
        # Buffers of what is trained lie in the whole model, too, and are its own.
        own = {id(buffer) for buffer in self.buffers()}
        for module in self.__dict__["beside"]:
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.requires_grad and id(tensor) not in own:
                    memo[id(tensor)] = tensor
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied


def register(home: nn.Module, name: str, own: nn.Module | nn.Parameter) -> None:
    """Make a submodule or parameter a module's own, under a dotted name.

    The modules on the way only hold others, and are never called. ZeRO-3 asks all ranks to call a student's modules in
    one order, and which of them run may depend on a rank's own samples.
    """
    *path, last = name.split(".")
    for step in path:
        if step not in home._modules:
            home.add_module(step, nn.Module())
        home = home.get_submodule(step)
    if isinstance(own, nn.Module):
        home.add_module(last, own)
    else:
        home.register_parameter(last, own)


def _found(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Return the submodule or parameter of this name."""
    path, _, last = name.rpartition(".")
    source = model.get_submodule(path)
    return source.get_submodule(last) if last in source._modules else source.get_parameter(last)
