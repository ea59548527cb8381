"""The only file that imports DeepSpeed: its configuration is derived, its traps are stepped round here.

DeepSpeed gives one engine for ZeRO 0-3 and AVERAGES parameter gradients over ranks (see gather.py).
"""

import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cauc_dist import optimisers
from cauc_dist.config import RunConfig
from cauc_dist.errors import BadInput
from cauc_dist.stream.plan import per_rank
from cauc_dist.world import World

OPEN = ("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "communication_data_type")
"""Settings of DeepSpeed that a user's file may hold, beside `zero_optimization`; the others are derived here."""


def deepspeed_config(run: RunConfig, world: World) -> dict[str, Any]:
    """What DeepSpeed is told, whole: it ignores unknown keys and has defaults that change gradients in silence.

    BadInput where the file `engine.deepspeed` is none, or holds what is derived here or is not known.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": per_rank(run.batch_size, world.world_size)[0],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.clip_norm,  # 1.0 where it is not said
        "zero_optimization": {"stage": zero_stage(run, world)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if run.engine.deepspeed is None:
        return derived
    given = _read(run.engine.deepspeed)
    zero = given.pop("zero_optimization", {})
    closed = sorted({*(set(given) - set(OPEN)), *({"zero_optimization.stage"} if "stage" in zero else ())})
    if closed:
        raise BadInput(
            f"{run.engine.deepspeed} holds {', '.join(closed)}",
            wanted=f"zero_optimization (without its stage), {', '.join(OPEN)}: the others are derived from the run",
            do="leave it out; --engine and --optim have a field for what a run may choose",
        )
    _check_zero(run.engine.deepspeed, zero)
    return {**derived, **given, "zero_optimization": {**zero, **derived["zero_optimization"]}}


def zero_stage(run: RunConfig, world: World) -> int:
    """The run's; 0 where one rank has nothing to share out, and the same update takes a sixth of the time."""
    return run.engine.zero_stage if world.world_size > 1 else 0


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}", wanted="a JSON file", do="mend it, or leave it out") from None
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization", {}), dict):
        raise BadInput(f"{path} holds no settings", wanted="a JSON object", do="mend it, or leave it out")
    return found


def _check_zero(path: str, zero: dict[str, Any]) -> None:
    """DeepSpeed's own model of these settings refuses what it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(
            f"{path}: zero_optimization.{place} ({first['msg']})", wanted="a setting of ZeRO", do="mend it"
        ) from None


class Engine:
    """A model under DeepSpeed: forward, backward, update, and its full state in and out.

        z = engine(x)
        engine.backward([loss], 1)
        norm = engine.update(lr)

    Parameters are those of `model` when it is handed in, the same on every rank. Needs a process group.
    """

    def __init__(self, model: nn.Module, run: RunConfig, world: World, device: torch.device) -> None:
        deepspeed = _import_deepspeed(device)
        self.parameters = sum(p.numel() for p in model.parameters())  # before ZeRO 3 takes them apart
        self.config = deepspeed_config(run, world)
        # A buffer of that many numbers is allocated: by default 1.9 GiB, whatever the model.
        bucket = min(500_000_000, 1024 * math.ceil(self.parameters / 1024))
        self.config["zero_optimization"] = {"reduce_bucket_size": bucket, **self.config["zero_optimization"]}
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed insists on it, whatever started the ranks
        double = run.engine.precision == "fp64"
        model = model.to(device, torch.float64 if double else None)
        optimizer = optimisers.make(run.optim, model, run.optim.lr, fused=device.type == "cuda")
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.config, dist_init_required=False
        )
        self._stage, self._world = zero_stage(run, world), world
        self._check(run)
        if double:
            self._reduce_in_float64()
        self._moments = optimisers.moments(run.optim)
        self._updates, self._decay = 0, run.optim.ema
        self._average = {n: p.detach().clone() for n, p in model.named_parameters()} if self._decay else {}
        self.device = device

    def _check(self, run: RunConfig) -> None:
        """RuntimeError where DeepSpeed understood something else than it was told."""
        engine = self._engine
        found = (engine.zero_optimization_stage(), engine.gradient_clipping(), engine.gradient_accumulation_steps())
        wanted = (self._stage, run.optim.clip_norm, 1)
        if found != wanted:
            raise RuntimeError(f"DeepSpeed has (ZeRO stage, clipping, accumulation) {found}; wanted {wanted}")

    def _reduce_in_float64(self) -> None:
        """DeepSpeed would send fp32, and refuses float64, for no reason that stage 0 has."""
        from deepspeed.accelerator import get_accelerator

        self._engine._config.communication_data_type = torch.float64
        accelerator = get_accelerator()
        known = accelerator.supported_dtypes()
        if torch.float64 not in known:
            accelerator.supported_dtypes = lambda: [*known, torch.float64]

    @property
    def module(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        return self._engine(x)  # type: ignore[no-any-return]

    def backward(self, losses: Iterable[Tensor], number: int) -> None:
        """The gradient of the sum of `number` losses, each made when it is asked for; one reduction over ranks."""
        if number == 1:
            (loss,) = losses
            self._engine.backward(loss)
        elif self._stage == 0:
            for k, loss in enumerate(losses, start=1):
                self._engine.set_gradient_accumulation_boundary(k == number)
                self._engine.backward(loss)
        else:
            with self._engine.coalesce_grad_reduction():
                for loss in losses:
                    self._engine.backward(loss)

    def update(self, lr: float) -> float:
        """One update at `lr`; returns the norm of the global gradient before clipping.

        FloatingPointError where that is not finite, the same on every rank. No parameter is touched: at stage 0 the
        norm is looked at before the update, at 1-3 DeepSpeed leaves such an update out, without a word of its own.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            norm = self._norm_of_reduced_gradients()
            if math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.module.zero_grad()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if not 0 <= norm < math.inf:
            raise FloatingPointError(f"the gradient's norm is {norm}")
        self._updates += 1
        self._follow()
        return norm

    @torch.no_grad()
    def _follow(self) -> None:
        """A short run's average forgets the random weights that it began with: its decay grows up to the run's."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, p in self.module.named_parameters() if self._average else ():
            self._average[name].lerp_(p, 1 - decay)

    def _norm_of_reduced_gradients(self) -> float:
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))

    def state(self) -> dict[str, Tensor]:
        """Full parameters, buffers, moments of the optimiser and the average of the weights by name, on the CPU.

        A collective: call it on every rank. Memory: copies of all of them, on every rank.
        """
        if self._updates:
            self._link_moments()
        tensors = {f"buffer/{name}": _copy(b) for name, b in self.module.named_buffers()}
        for name, p in self.module.named_parameters():
            tensors[f"parameter/{name}"] = _copy(self._full(p))
            full = tensors[f"parameter/{name}"]
            for key in self._moments:  # before a first update there are none
                tensors[f"{key}/{name}"] = _copy(self._full(p, key)) if self._updates else torch.zeros_like(full)
        tensors |= {f"ema/{name}": _copy(average) for name, average in self._average.items()}
        tensors["optimizer/step"] = torch.tensor(float(self._updates))
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the optimiser's moments and step count, and the average, from a `state()` of any world size and stage.

        `checkpoint.load_module` loads parameters and buffers BEFORE the engine is made: its fp32 masters are copies.
        """
        self._updates = int(tensors["optimizer/step"])
        # The fused kernel reads the step count on its own device.
        step = tensors["optimizer/step"].to(self.device if self.device.type == "cuda" else "cpu")
        for p in self._inner_parameters():
            counted = {"step": step.clone()} if "exp_avg" in self._moments else {}
            self._inner.state[p] = {**counted, **{key: torch.zeros_like(p) for key in self._moments}}
        self._link_moments()
        for name, p in self.module.named_parameters():
            for key in self._moments:
                self._set_moment(p, key, tensors[f"{key}/{name}"])
        for name, average in self._average.items():
            average.copy_(tensors.get(f"ema/{name}", tensors[f"parameter/{name}"]))  # a run that had none begins here

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


def forget_groups() -> None:
    """DeepSpeed keeps the groups of a process group that is over; without them another may begin in this process."""
    from deepspeed.utils import groups

    groups._release_process_group_references()


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the C++ op that it would compile on CPUs (a minute, or a crash without c++)."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    # ZeRO 1-3 load an optimiser that nobody uses here, and its decorators torch's compiler: a second of a core.
    with mock.patch.object(torch, "compile", lambda f: f):
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 renamed two collectives; DeepSpeed 0.19.8 calls them by their old names, each step.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed
