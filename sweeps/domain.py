"""The values that one setting may take in a study, and the condition under which it varies at all."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from setwise.platform import config
from setwise.platform.config import Settings
from setwise.platform.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Scalar = bool | int | float | str
Whole = int  # inside Domain, `int` is the name of a field
CONDITION = re.compile(r"\s*([\w.]+)\s*(==|!=|<=|>=|<|>|not in|in)\s*(\S.*)")
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda value, listed: value in listed,
    "not in": lambda value, listed: value not in listed,
}


@dataclass(frozen=True)
class Condition:
    """`model.set_prediction.num_slots > 1`: what must hold of another setting."""

    setting: str
    comparison: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ValueError for anything but a setting, a comparison and a value in YAML."""
        parts = CONDITION.fullmatch(text)
        if parts is None:
            raise ValueError(f"a condition is written 'setting {'|'.join(COMPARISONS)} value', such as 'a.b > 1'")
        setting, comparison, given = parts.groups()
        try:
            value = config.parse_yaml(b"value: " + given.encode(), "when").values["value"]
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if isinstance(value, list) != comparison.endswith("in"):
            raise ValueError(f"'{comparison}' compares with {'a list' if comparison.endswith('in') else 'one value'}")
        return cls(setting, comparison, value)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it does where the settings are `values`. Raises TypeError where the two cannot be compared."""
        return COMPARISONS[self.comparison](values[self.setting], self.value)


class Domain(Settings):
    """The values that one setting may take: exactly one of the four forms."""

    choice: tuple[Scalar, ...] | None = Field(None, min_length=2, description="one of these")
    uniform: tuple[float, float] | None = Field(None, description="a number between these two")
    loguniform: tuple[float, float] | None = Field(None, description="a number between these, uniform in its logarithm")
    int: tuple[Whole, Whole] | None = Field(None, description="a whole number between these, both included")
    when: str | None = Field(
        None, description="vary it only where this holds of another setting; elsewhere the recipe's own value stays"
    )

    @field_validator("when")
    @classmethod
    def _is_condition(cls, text: str | None) -> str | None:
        if text is not None:
            Condition.parse(text)
        return text

    @model_validator(mode="after")
    def _one_form(self) -> Domain:
        forms = [name for name in Domain.model_fields if name != "when"]
        given = [name for name in forms if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(forms)}")
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"{given[0]}: the lower bound comes first, and differs from the upper")
            if given[0] == "loguniform" and low <= 0:
                raise ValueError("loguniform: bounds must be above 0")
        return self

    @property
    def condition(self) -> Condition | None:
        return Condition.parse(self.when) if self.when is not None else None

    def bounds(self) -> tuple[Scalar, ...]:
        """Values that must be allowed for all of the domain to be: its ends, or every choice."""
        return self.choice or self.uniform or self.loguniform or self.int or ()

    def between(self) -> tuple[Scalar, ...]:
        """A number between the bounds that is no whole number, which a setting that must be whole refuses."""
        ends = self.uniform or self.loguniform
        return () if ends is None else (ends[0] + (ends[1] - ends[0]) / math.pi,)

    def contains(self, value: Any) -> bool:
        if self.choice is not None:
            return value in self.choice
        if isinstance(value, bool) or not isinstance(value, Whole | float) or (self.int and value != Whole(value)):
            return False
        low, high = self.uniform or self.loguniform or self.int or (0, 0)
        return bool(low <= value <= high)

    def distribution(self) -> BaseDistribution:
        """The same as Optuna says it."""
        from optuna import distributions

        if self.choice is not None:
            return distributions.CategoricalDistribution(self.choice)
        if self.int is not None:
            return distributions.IntDistribution(*self.int)
        low, high = self.uniform or self.loguniform or (0.0, 1.0)
        return distributions.FloatDistribution(low, high, log=self.loguniform is not None)
