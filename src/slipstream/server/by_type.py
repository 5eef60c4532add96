"""Unions of models that say in `type` what they are."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Unknown(BaseModel):
    """What this server makes nothing of."""

    model_config = ConfigDict(extra="allow")

    type: str


class ByType:
    """Has a union read by the `type` of what comes; its last member takes all that is of no other's."""

    def __get_pydantic_core_schema__(self, union: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        *members, last = get_args(union)
        choices = {"[other]": handler.generate_schema(last)}
        for member in members:
            kinds = get_args(member.model_fields["type"].annotation)
            choices |= dict.fromkeys(map(_tag, kinds), handler.generate_schema(member))

        def chosen(value: Any) -> str:
            kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
            return _tag(kind) if _tag(kind) in choices else "[other]"

        return core_schema.tagged_union_schema(choices, chosen)


def _tag(kind: object) -> str:
    """A member's name in the places of errors; `field_path` leaves out what is in brackets."""
    return f"[{kind}]"
