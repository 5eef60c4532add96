"""Errors name fields of a turn; a protocol's names for them, and the command line's, are said by the server alone."""

import ast
from pathlib import Path

import pytest

import slipstream
from slipstream import fields
from slipstream.config import FLAGS
from slipstream.errors import InvalidRequestError, StateError
from slipstream.server import field_names
from slipstream.server.errors import failure_of
from tests.unit.test_rooms import ALLOWED, COMMON, room_of

ROOT = Path(slipstream.__file__).parent
BELOW_THE_SERVER = {*ALLOWED, *COMMON} - {"server", "cli", "bench", "config", "processor"}
TABLES = (field_names.CHAT, field_names.RESPONSES, field_names.ANTHROPIC)
PROTOCOL_NAMES = {max(name.split("{}"), key=len) for table in TABLES for name in table.values() if {*name} & {*"-._"}}
AN_ERROR = InvalidRequestError(
    fields.TOOL_PARAMETERS.at(3), " is not {like} ", fields.RESPONSE_SCHEMA, ": raise ", fields.KV_MEMORY
)


def texts(path: Path) -> list[str]:
    """What a file's strings say, but for those that stand alone, which document."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone]
    return [node.value for node in strings if isinstance(node.value, str)]


def test_nothing_below_the_server_speaks_of_a_protocol_or_the_command_line() -> None:
    own = {str(field) for field in vars(fields).values() if isinstance(field, fields.Field)}
    assert {"--kv-memory", "chat_template_kwargs", "response_format.json_schema.schema"} <= PROTOCOL_NAMES - own
    for path in ROOT.rglob("*.py"):
        if room_of(path) in BELOW_THE_SERVER:
            said = [name for text in texts(path) for name in PROTOCOL_NAMES - own if name in text]
            assert not said, f"{path.relative_to(ROOT)} says {said}"


@pytest.mark.parametrize(
    ("path", "param", "schema"),
    [
        ("/v1/chat/completions", "tools[3].function.parameters", "response_format.json_schema.schema"),
        ("/v1/sessions/s/messages", "tools[3].function.parameters", "response_format.json_schema.schema"),
        ("/v1/responses", "tools[3].parameters", "text.format.schema"),
        ("/v1/messages", "tools[3].input_schema", "output_config.format.schema"),
    ],
)
def test_a_protocol_names_fields_its_own_way(path: str, param: str, schema: str) -> None:
    failure = failure_of(AN_ERROR, path)
    assert failure.param == param
    assert failure.message == f"{param} is not {{like}} {schema}: raise --kv-memory"


def test_in_process_fields_have_the_names_of_python() -> None:
    assert AN_ERROR.param == "tools[3].parameters"
    assert str(AN_ERROR) == "tools[3].parameters is not {like} response_schema: raise kv_memory"


def test_the_command_line_names_its_options() -> None:
    error = StateError("choose another ", fields.STATE_DIR)
    assert (str(error), error.worded(FLAGS)) == ("choose another state_dir", "choose another --state-dir")


def test_what_a_client_sent_is_quoted_as_it_came() -> None:
    message = "the template says: messages[0] has no place in tools[0].function.name {} --kv_memory"
    failure = failure_of(InvalidRequestError(message, param=fields.MESSAGES), "/v1/responses")
    assert (failure.param, failure.message) == ("input", message)
