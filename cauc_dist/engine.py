"""The only file that imports DeepSpeed: its configuration is derived, its traps are stepped round here.

DeepSpeed gives one engine for ZeRO 0-3 and AVERAGES parameter gradients over ranks (see gather.py).
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cauc_dist.config import Optim, RunConfig
from cauc_dist.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, beside its step count


def deepspeed_config(run: RunConfig, world: World) -> dict[str, Any]:
    """What DeepSpeed is told, whole: it ignores unknown keys and has defaults that change gradients in silence."""
    return {
        "train_micro_batch_size_per_gpu": run.batch_size // world.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.clip_norm,  # 1.0 where it is not said
        "zero_optimization": {"stage": run.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def learning_rate(optim: Optim, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Linear warm-up from 0 over `warmup_epochs`, then a half cosine to 0 at the end, or constant."""
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * min(1.0, (step + 1) / max(1.0, warmup))
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and filters decay; norms and biases (vectors and scalars) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its full state in and out.

    Parameters are those of `model` when it is handed in, the same on every rank. Needs a process group.
    """

    def __init__(self, model: nn.Module, run: RunConfig, world: World, device: torch.device) -> None:
        deepspeed = _import_deepspeed(device)
        self.parameters = sum(p.numel() for p in model.parameters())  # before ZeRO 3 takes them apart
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed insists on it, whatever started the ranks
        optimizer = torch.optim.AdamW(
            parameter_groups(model, run.optim.weight_decay),
            lr=run.optim.lr,
            betas=run.optim.betas,
            fused=device.type == "cuda",
        )
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=deepspeed_config(run, world), dist_init_required=False
        )
        self._stage, self._world = run.engine.zero_stage, world
        self.device = device

    @property
    def module(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        return self._engine(x)  # type: ignore[no-any-return]

    def step(self, loss: Tensor, lr: float) -> float:
        """Backward and one update at `lr`; returns the norm of the global gradient before clipping.

        FloatingPointError where that is not finite, the same on every rank. No parameter is touched: at stage 0 the
        norm is looked at before the update, at 1-3 DeepSpeed leaves such an update out, without a word of its own.
        """
        self._engine.backward(loss)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            norm = self._finite(self._norm_of_reduced_gradients())
            self._engine.step()
            return norm
        self._engine.step()
        return self._finite(float(self._engine.get_global_grad_norm()))

    @staticmethod
    def _finite(norm: float) -> float:
        if not 0 <= norm < math.inf:
            raise FloatingPointError(f"the gradient's norm is {norm}")
        return norm

    def _norm_of_reduced_gradients(self) -> float:
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))

    def state(self) -> dict[str, Tensor]:
        """Full parameters, buffers and AdamW moments by name, on the CPU; a collective: call it on every rank.

        Memory: three copies of the model in fp32, on every rank.
        """
        self._link_moments()
        tensors = {f"buffer/{name}": _copy(b) for name, b in self.module.named_buffers()}
        for name, p in self.module.named_parameters():
            tensors[f"parameter/{name}"] = _copy(self._full(p))
            tensors |= {f"{key}/{name}": _copy(self._full(p, key)) for key in MOMENTS}
        tensors["optimizer/step"] = self._steps_done()
        return tensors

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Set AdamW's moments and step count from a `state()` of any world size and stage.

        `checkpoint.load_module` loads parameters and buffers BEFORE the engine is made: its fp32 masters are copies.
        """
        # The fused kernel reads the step count on its own device.
        step = tensors["optimizer/step"].to(self.device if self.device.type == "cuda" else "cpu")
        for p in self._inner_parameters():
            self._inner.state[p] = {"step": step.clone(), **{key: torch.zeros_like(p) for key in MOMENTS}}
        self._link_moments()
        for name, p in self.module.named_parameters():
            for key in MOMENTS:
                self._set_moment(p, key, tensors[f"{key}/{name}"])

    def _link_moments(self) -> None:
        """Let DeepSpeed find AdamW's moments of every parameter group (stages 1 and 2).

        DeepSpeed 0.19.8 links them once, after the step of the FIRST group, when the others have none yet.
        """
        if self._stage in (1, 2):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self._optimizer if self._stage == 0 else self._optimizer.optimizer  # type: ignore[no-any-return]

    def _inner_parameters(self) -> Iterator[Tensor]:
        """What AdamW really updates: the parameters (stage 0) or this rank's flat fp32 partitions (1-3)."""
        if self._stage == 3:
            yield from self._optimizer.fp32_partitioned_groups_flat
            return
        for group in self._inner.param_groups:
            yield from group["params"]

    def _steps_done(self) -> Tensor:
        states = [state["step"] for state in self._inner.state.values() if "step" in state]
        return torch.as_tensor(states[0] if states else 0.0, dtype=torch.float32).reshape(()).cpu().clone()

    def _full(self, p: nn.Parameter, key: str | None = None) -> Tensor:
        if self._stage == 0:
            return p.detach() if key is None else self._inner.state[p][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        full = safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)
        return full.reshape(getattr(p, "ds_shape", p.shape))  # type: ignore[no-any-return]

    def _set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        value = value.to(self.device)
        if self._stage == 0:
            self._inner.state[p][key] = value.clone()
        elif self._stage == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            # The last rank's part is padded; DeepSpeed's own setter of full values reads past the end there.
            part = p.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = F.pad(value.flatten(), (0, part * self._world.world_size - value.numel()))
            safe_set_local_optimizer_state(p, padded.narrow(0, part * self._world.rank, part), key)
        else:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(p, value, key)


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU and its own: `.cpu()` of a CPU tensor is the tensor, which the next step would overwrite."""
    return tensor.detach().to("cpu", copy=True)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the C++ op that it would compile on CPUs (a minute, or a crash without c++)."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renamed two collectives; DeepSpeed 0.19.8 calls them by their old names, each step.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed
