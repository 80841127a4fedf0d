"""Every backend's modules, held to the protocols of their operations: mypy fails where a signature is another."""

from __future__ import annotations

from typing import Final

import fastreward.cpu.group
import fastreward.cpu.logits_policy_loss
import fastreward.cpu.logprobs
import fastreward.cpu.prefix_tree
import fastreward.cpu.program
import fastreward.cpu.returns
import fastreward.cpu.rewards
import fastreward.cpu.segments
import fastreward.cpu.whiten
import fastreward.cuda.group
import fastreward.cuda.logits_policy_loss
import fastreward.cuda.logprobs
import fastreward.cuda.prefix_tree
import fastreward.cuda.program
import fastreward.cuda.returns
import fastreward.cuda.rewards
import fastreward.cuda.segments
import fastreward.cuda.whiten
import fastreward.reference.group
import fastreward.reference.logprobs
import fastreward.reference.prefix_tree
import fastreward.reference.program
import fastreward.reference.returns
import fastreward.reference.rewards
import fastreward.reference.segments
import fastreward.reference.whiten
import kernels.group
import kernels.logits_policy_loss
import kernels.logprobs
import kernels.prefix_tree
import kernels.program
import kernels.returns
import kernels.rewards
import kernels.segments
import kernels.whiten
from fastreward._runtime import protocols

LOGPROBS: Final[tuple[protocols.LogprobsKernels, ...]] = (
    fastreward.reference.logprobs,
    fastreward.cpu.logprobs,
    kernels.logprobs,
    fastreward.cuda.logprobs,
)
GROUP: Final[tuple[protocols.GroupKernels, ...]] = (
    fastreward.reference.group,
    fastreward.cpu.group,
    kernels.group,
    fastreward.cuda.group,
)
WHITEN: Final[tuple[protocols.WhitenKernels, ...]] = (
    fastreward.reference.whiten,
    fastreward.cpu.whiten,
    kernels.whiten,
    fastreward.cuda.whiten,
)
SEGMENTS: Final[tuple[protocols.SegmentsKernels, ...]] = (
    fastreward.reference.segments,
    fastreward.cpu.segments,
    kernels.segments,
    fastreward.cuda.segments,
)
REWARDS: Final[tuple[protocols.RewardsKernels, ...]] = (
    fastreward.reference.rewards,
    fastreward.cpu.rewards,
    kernels.rewards,
    fastreward.cuda.rewards,
)
RETURNS: Final[tuple[protocols.ReturnsKernels, ...]] = (
    fastreward.reference.returns,
    fastreward.cpu.returns,
    kernels.returns,
    fastreward.cuda.returns,
)
PROGRAM: Final[tuple[protocols.ProgramKernels, ...]] = (
    fastreward.reference.program,
    fastreward.cpu.program,
    kernels.program,
    fastreward.cuda.program,
)
LOGITS_POLICY_LOSS: Final[tuple[protocols.LogitsPolicyLossKernels, ...]] = (  # the reference has two calls instead
    fastreward.cpu.logits_policy_loss,
    kernels.logits_policy_loss,
    fastreward.cuda.logits_policy_loss,
)
PREFIX_TREE: Final[tuple[protocols.PrefixTreeKernels, ...]] = (
    fastreward.reference.prefix_tree,
    fastreward.cpu.prefix_tree,
    kernels.prefix_tree,
    fastreward.cuda.prefix_tree,
)
PREFIX_TREE_BUILD: Final[tuple[protocols.PrefixTreeBuildKernels, ...]] = (  # cuda leaves it to Triton
    fastreward.reference.prefix_tree,
    fastreward.cpu.prefix_tree,
    kernels.prefix_tree,
)
PREFIX_TREE_ON_HOST: Final[protocols.PrefixTreeHostKernels] = fastreward.cpu.prefix_tree
