"""Rewards: from scores to tokens, and what becomes of scores before that."""

from __future__ import annotations

from fastreward.rewards.token_rewards import token_rewards

__all__ = ["token_rewards"]
