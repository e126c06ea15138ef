"""One method of a policy: its name, and parameters that the method's own class has validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from policies import registry
from policies.interfaces import MethodParams, PolicyError

PARAMETERS = "method_parameters"
"""Error type that carries the errors of a method's own parameters in its context, as ``errors``."""


class MethodSpec(BaseModel):
    """A method that a policy chose: ``{method: NAME, ...parameters}``, or its name alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]

    method: str
    params: SerializeAsAny[MethodParams]

    @model_validator(mode="wrap")
    @classmethod
    def _parse(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Have the method's own class validate the parameters."""
        if isinstance(data, cls):
            return data
        if isinstance(data, str):
            data = {"method": data}
        if not isinstance(data, Mapping):
            raise PydanticCustomError("method_mapping", "write it as {method: NAME}, with parameters beside the name")
        name = data.get("method")
        if not isinstance(name, str):
            known = ", ".join(sorted(registry.known(cls.kind)))
            raise PydanticCustomError("method_missing", "'method' is missing; it is one of {known}", {"known": known})
        params = {key: value for key, value in data.items() if key != "method"}
        try:
            validated = _class(cls.kind, name).Params.model_validate(params)
        except ValidationError as error:
            details = error.errors(include_url=False)
            raise PydanticCustomError(PARAMETERS, "{text}", {"text": str(error), "errors": details}) from error
        return cls.model_construct(method=name, params=validated)

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"method": self.method, **self.params.model_dump(mode="json")}

    @classmethod
    def params_of(cls, name: str) -> type[MethodParams]:
        """The parameter model of a method of this kind; the base, without parameters, where there is no such method."""
        return _class(cls.kind, name).Params if name in registry.known(cls.kind) else MethodParams

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        known = sorted(registry.known(cls.kind))
        return {"oneOf": [{"enum": known}, *(cls._branch(name) for name in known)]}

    @classmethod
    def _branch(cls, name: str) -> JsonSchemaValue:
        method = _class(cls.kind, name)
        schema = inline(method.Params.model_json_schema())
        properties = {"method": {"const": name, "description": summary(method)}, **schema.get("properties", {})}
        required = ["method", *schema.get("required", ())]
        return {
            "title": name,
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
            "required": required,
        }


class AdaptationSpec(MethodSpec):
    """How the model adapts without labels."""

    kind = "adaptation"


class ReweightingSpec(MethodSpec):
    """How labelled rows are weighted."""

    kind = "reweighting"


class SafeguardSpec(MethodSpec):
    """What keeps the model from forgetting or failing."""

    kind = "safeguard"


class InterpolationSpec(MethodSpec):
    """How weights for a release are combined."""

    kind = "interpolation"


class GateSpec(MethodSpec):
    """What decides on a release."""

    kind = "gate"


def summary(method: type) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((method.__doc__ or "").strip().partition("\n\n")[0].split())


def inline(schema: JsonSchemaValue) -> JsonSchemaValue:
    """A JSON schema with its local definitions put where they are used; they must not refer to themselves."""
    definitions = schema.get("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolve(definitions[part["$ref"].rpartition("/")[2]])
        return {key: resolve(value) for key, value in part.items() if key != "$defs"}

    resolved: JsonSchemaValue = resolve(schema)
    return resolved


def _class(kind: str, name: str) -> Any:
    """The class of a method, with every way of not getting it as a validation error."""
    try:
        return registry.find(kind, name)
    except PolicyError as error:
        raise PydanticCustomError("method_unknown", "{text}", {"text": str(error)}) from None
    except (ImportError, AttributeError) as error:
        where = registry.known(kind)[name]
        raise PydanticCustomError(
            "method_import",
            "{kind} method '{name}' cannot be imported from {where}: {text}",
            {"kind": kind, "name": name, "where": where, "text": str(error)},
        ) from error
