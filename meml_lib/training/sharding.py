"""A model over many processes: each holds all of it (DDP), or a part of every weight (FSDP2).

An accelerate config file with `distributed_type: FSDP` asks for the second. Accelerate itself divides a model only together
with an optimizer that is made before, and on a CPU it makes DDP of it without a word. Both devices therefore take torch's
`fully_shard` here, and `check` looks at what came of it.

A divided weight is a DTensor, whose dimension 0 is cut over the processes. A layer's weights are gathered when it computes,
which all processes must then do together; `gathered` is for work that each process does at its own pace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def wrap(model: PreTrainedModel, accelerator: Accelerator, *, sharded: bool) -> nn.Module:
    """The model for forward and backward passes that all processes do together.

    Args: sharded: divide it, in place (once: a second call changes nothing); else DDP where there are several processes.
    Raises: RuntimeError where accelerate was started for FSDP and sharded is False, or without process group.
    """
    if not sharded:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise RuntimeError("accelerate was started for FSDP, which hardware.accelerate_config does not ask for")
        return accelerator.prepare_model(model)
    if not torch.distributed.is_initialized():
        raise RuntimeError("FSDP needs a process group: start it by launch.train, or by torch.distributed.run")
    if not isinstance(model, FSDPModule):
        # Of the accelerator's device: torch's own default is CUDA wherever there is one.
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper


def layers(model: nn.Module) -> list[nn.Module]:
    """Those that transformers says must not be divided further; the embedding may be the output layer too: the root's."""
    names = set(_base(model)._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def check(model: nn.Module, processes: int, asked_by: str) -> None:
    """See that every weight is divided over all processes.

    Args: asked_by: what asked for it, as the message names it.
    Raises: RuntimeError naming what was asked for and what was found.
    """
    for name, weight in model.named_parameters():
        parts = weight.device_mesh.size() if isinstance(weight, DTensor) else 1
        if not isinstance(weight, DTensor) or parts != processes or not all(p.is_shard() for p in weight.placements):
            found = f"{name} is a {type(weight).__name__} over {parts} process(es), in a {type(model).__name__}"
            raise RuntimeError(f"{asked_by} asks for FSDP: weights divided over {processes} process(es); found: {found}")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """All weights whole in every process, to be read and not changed; nothing that is not divided is touched.

    All processes enter together. Inside, forward passes are each process's own affair: nothing waits for another one.
    Needs memory for the whole weights; gradients and moments stay divided.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)  # else a forward pass would free, and the next one gather
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)  # the root's are needed first on the way back


# --- states -----------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; writing to it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def joined(part: Tensor, *, like: Tensor) -> Tensor:
    """The whole tensor of which every process gives its part, cut as another one is; all processes ask for it together."""
    if not isinstance(like, DTensor):
        return part
    cut = like.device_mesh, like.placements
    return DTensor.from_local(part.to(like.device), *cut, shape=like.shape, stride=like.stride()).full_tensor()


def divided(whole: Tensor, *, like: Tensor) -> Tensor:
    """A whole tensor cut as another one of its shape is; every process has the whole, and none waits."""
    if whole.shape != like.shape or not isinstance(like, DTensor):
        return whole
    # src_data_rank None: every process cuts its own part out, and none is sent. A copy, since the part may be a view.
    return distribute_tensor(whole.clone().to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def plain(model: PreTrainedModel, *, keep: bool) -> PreTrainedModel | None:
    """The model whole, on the CPU, as if it had never been divided. All processes call it.

    Args: keep: whether this process wants it; None is returned where not.
    """
    weights = {}
    for name, tensor in model.state_dict().items():  # one at a time
        whole = full(tensor.detach())
        weights |= {name: whole.cpu()} if keep else {}
    if not keep:
        return None
    base = _base(model)
    twin = AutoModelForCausalLM.from_config(base.config, dtype=base.dtype)
    twin.generation_config = base.generation_config
    if base is not model:
        from peft import get_peft_model

        twin = get_peft_model(twin, model.peft_config[model.active_adapter])
    twin.load_state_dict(weights)
    return twin
