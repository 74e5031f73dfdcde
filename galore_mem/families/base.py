"""What the families share: the base of their configs, bounded types for its keys, and rows by kind of module.

Source of keys, defaults and parameter names: the `configuration_*.py` and `modeling_*.py` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from galore_mem.errors import unknown
from galore_mem.spec.model import ParamSpec, Role


def integer(low: int, high: int) -> BeforeValidator:
    """Accepts an `int` in these bounds and nothing that merely looks like one; the error states the bounds."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be an integer from {low} to {high}")
        return value

    return BeforeValidator(check)


def _probability(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError("must be a number from 0 to 1")
    return float(value)


# Far above every published model; a number beyond is a slip, and would only give absurd answers.
Size = Annotated[int, integer(1, 2**20)]
Layers = Annotated[int, integer(1, 10**4)]
Vocabulary = Annotated[int, integer(1, 2**24)]
Positions = Annotated[int, integer(1, 2**24)]
Dropout = Annotated[float, BeforeValidator(_probability)]

# transformers' ACT2FN without `prelu` and `xielu`: those two have parameters of their own.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip


def _known_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return name


Activation = Annotated[str, AfterValidator(_known_activation)]


class FamilyConfig(BaseModel):
    """The keys of a config.json that decide memory, under Hugging Face's names; other keys are ignored.

    A size that transformers would fill in silently is required here; what is optional has transformers'
    default. Types are strict: neither `"4096"` nor `4096.0` nor `true` is an integer.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    # The model classes that are described; the first is meant when the config names none.
    ARCHITECTURES: ClassVar[tuple[str, ...]]
    # Second names that transformers accepts for a key (its `attribute_map`).
    ALIASES: ClassVar[Mapping[str, str]] = {}
    # Keys that add or change parameters, with the only value that is described.
    ONLY: ClassVar[Mapping[str, Any]] = {}

    model_type: str
    architectures: list[str] = Field(default_factory=list)
    tie_word_embeddings: bool

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        """Renames aliases, refuses variants with other parameters, and settles which architecture is meant."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for alias, name in cls.ALIASES.items():
            if alias in data and data.setdefault(name, data[alias]) != data[alias]:
                raise ValueError(f"{alias} and {name} are two names of one key and must agree")
        for key, only in cls.ONLY.items():
            if data.get(key, only) not in (None, only):
                raise ValueError(f"{key} is supported only as {_json(only)}")
        if data.get("architectures") is None:
            data["architectures"] = []
        return data

    @model_validator(mode="after")
    def _settle_architecture(self) -> FamilyConfig:
        """GaLore's configs write LLaMAForCausalLM, an early spelling; case does not tell classes apart."""
        given = self.architectures[0] if self.architectures else self.ARCHITECTURES[0]
        named = [name for name in self.ARCHITECTURES if name.lower() == given.lower()]
        if not named:
            shown = repr(given[:80])
            raise ValueError(f"architecture {shown} is not supported; set it to {' or '.join(self.ARCHITECTURES)}")
        self.architectures = named
        return self

    @property
    def architecture(self) -> str:
        return self.architectures[0]


def _json(value: object) -> str:
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def check_heads(hidden: tuple[str, int], heads: tuple[str, int]) -> None:
    """Raises ValueError unless the heads divide the hidden size; each argument is a key and its value."""
    if hidden[1] % heads[1]:
        raise ValueError(f"{hidden[0]} {hidden[1]} is not a multiple of {heads[0]} {heads[1]}")


def linear(path: str, into: int, out: int, role: Role, *, bias: bool = True) -> tuple[ParamSpec, ...]:
    """The rows of an `nn.Linear`: weight (out, in), then the bias."""
    weight = ParamSpec(f"{path}.weight", (out, into), role, "linear")
    return (weight, ParamSpec(f"{path}.bias", (out,), role, "linear")) if bias else (weight,)


def norm(path: str, size: int, *, bias: bool = True) -> tuple[ParamSpec, ...]:
    """The rows of a LayerNorm, or of an RMSNorm (no bias)."""
    names = ("weight", "bias") if bias else ("weight",)
    return tuple(ParamSpec(f"{path}.{name}", (size,), Role.NORM, "norm") for name in names)


def embedding(path: str, entries: int, size: int) -> tuple[ParamSpec, ...]:
    """The row of an `nn.Embedding`: weight (entries, size)."""
    return (ParamSpec(f"{path}.weight", (entries, size), Role.EMBEDDING, "embedding"),)
