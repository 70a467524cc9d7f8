"""Gradient methods whose damping may be set anew without another fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, TypeVar

from .method import GradientMethod, GradientState

Damping = TypeVar("Damping", bound=float | None)


class DampedMethod(GradientMethod, Generic[Damping]):
    """A gradient method whose M has a damping; a subclass says which ones are right, and what they change."""

    _damping: Damping

    @property
    def damping(self) -> Damping:
        """As given; it may be set, also on a fitted method. Queries that run meanwhile keep the old one."""
        return self._damping

    @damping.setter
    def damping(self, value: Damping) -> None:
        given = self._checked_damping(value)
        if self._states is not None:
            self._states = [
                replace(state, kernel=self._damped(state, given), norms=None) for state in self._states
            ]
        self._damping = given

    def _checked_damping(self, value: Any) -> Damping:
        """The value as it is kept.

        Raises:
            ValueError: It is out of its range.
        """
        raise NotImplementedError

    def _damped(self, state: GradientState, damping: Damping) -> Any:
        """The kernel of a state with another damping.

        Raises:
            ValueError: One at which rounding errors would decide.
        """
        raise NotImplementedError
