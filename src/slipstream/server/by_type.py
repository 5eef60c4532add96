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
        # Members' names in the places of errors; `field_path` leaves out what is in brackets.
        choices = {"[other]": handler.generate_schema(last)}
        tags: dict[str, str] = {}
        for member in members:
            kinds = get_args(member.model_fields["type"].annotation)
            tags |= {kind: f"[{kind}]" for kind in kinds}
            choices |= dict.fromkeys((tags[kind] for kind in kinds), handler.generate_schema(member))

        def chosen(value: Any) -> str:
            kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
            return tags.get(kind, "[other]") if isinstance(kind, str) else "[other]"

        return core_schema.tagged_union_schema(choices, chosen)
