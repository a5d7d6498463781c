"""Optimizers: which one a run trains with, and the numbers of one step."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from minitinker.types.dumping import Dumpable


@dataclass(frozen=True, kw_only=True)
class AdamOptimizerConfig(Dumpable):
    """Train with AdamW, the one optimizer there is here."""

    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class DimuonOptimizerConfig(Dumpable):
    """Train with the hosted service's Dimuon, which is refused here."""

    type: Literal["dimuon"] = "dimuon"
    version: Literal[1] = 1


OptimizerConfig: TypeAlias = AdamOptimizerConfig | DimuonOptimizerConfig


@dataclass(frozen=True, kw_only=True)
class AdamParams(Dumpable):
    """One step of AdamW. Every field may change at every step; grad_clip_norm 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DimuonParams(Dumpable):
    """One step of the hosted service's Dimuon, which is refused here."""

    type: Literal["dimuon"] = "dimuon"
    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9


OptimParams: TypeAlias = AdamParams | DimuonParams
