"""The clients, each at some work, and the steps of the model for it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.clients.bench import Bench

Step = dict[str, Any] | str

BOTH = "Both are sunny."
EDITED = "The colour is changed; the other file is missing."
AGENTS = Path(__file__).with_name("agents")
SYSTEM = "You forecast the weather. Look up each city before you answer, then answer in one short sentence. " * 80


def call(tool: str, **arguments: Any) -> Step:
    """A step that calls a tool."""
    return {"tool": tool, "arguments": arguments}


def _look_ups(tool: str = "look_up") -> list[Step]:
    return [call(tool, city=city) for city in ("Oslo", "Rome")]


def claude_code(bench: Bench) -> None:
    """An edit and a failing tool; a restart that resumes; a compaction, and a turn after it."""
    claude = bench.folder / "node_modules" / ".bin" / "claude"
    environment = {
        "ANTHROPIC_BASE_URL": bench.url,
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_MODEL": "scripted",
        "ANTHROPIC_SMALL_FAST_MODEL": "scripted",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }

    def run(*arguments: str) -> Callable[[], str]:
        tools = ("--allowedTools", "Read", "Edit", "Bash")
        return lambda: bench.command(claude, "-p", *arguments, *tools, environment=environment)

    _edit_and_resume(bench, run, resume=lambda prompt: run("--continue", prompt))
    with bench.phase("compaction", "/compact", compacts=True) as phase:
        bench.ask(phase, run("--continue", "/compact"), says="")
        phase.answered = "(a summary)"
    prompt = "[[run again]] And once more."
    with bench.phase("after it", prompt, compacts=True) as phase:
        bench.ask(phase, run("--continue", prompt), says="Nothing is left to do.")


def codex(bench: Bench) -> None:
    """An edit and a failing tool; a restart that resumes; a compaction, and a turn after it."""
    program = bench.folder / "node_modules" / ".bin" / "codex"
    (bench.home / "config.toml").write_text(
        'model = "scripted"\nmodel_provider = "slipstream"\nmodel_context_window = 131072\n'
        f'[model_providers.slipstream]\nname = "Slipstream"\nbase_url = "{bench.url}/v1"\nwire_api = "responses"\n'
    )
    options = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")

    def run(*arguments: str) -> Callable[[], str]:
        environment = {"CODEX_HOME": str(bench.home)}
        return lambda: bench.command(program, "exec", *options, *arguments, environment=environment)

    _edit_and_resume(bench, run, resume=lambda prompt: run("resume", "--last", prompt))
    prompt = "[[run again]] And once more."
    with bench.phase("compaction", prompt, compacts=True) as phase:
        limit = ("-c", "model_auto_compact_token_limit=2000")
        bench.ask(phase, run(*limit, "resume", "--last", prompt), says="Nothing is left to do.")


def _edit_and_resume(
    bench: Bench, run: Callable[..., Callable[[], str]], *, resume: Callable[[str], Callable[[], str]]
) -> None:
    """The phases that both have: an edit with a failing tool, and a restart of the client that goes on."""
    notes = bench.work / "notes.txt"
    notes.write_text("The sky is blue.\n")
    prompt = "[[run edit]] Change the colour in notes.txt, and show missing.txt."
    with bench.phase("edit", prompt) as phase:
        bench.ask(phase, run(prompt), says=EDITED)
    bench.require(notes.read_text() == "The sky is green.\n", "notes.txt was not edited")
    prompt = "[[run resume]] What is in it now?"
    with bench.phase("resume", prompt) as phase:
        bench.ask(phase, resume(prompt), says="It is green.")
    first = phase.reuse[0]
    bench.require(first >= 0.92, f"the first turn after the restart reused {first:.0%}")


def opencode(bench: Bench) -> None:
    """An edit, and a restart that resumes."""
    program = bench.folder / "node_modules" / ".bin" / "opencode"
    model = {"name": "scripted", "limit": {"context": 131_072, "output": 8192}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Slipstream",
        "options": {"baseURL": f"{bench.url}/v1", "apiKey": "none"},
        "models": {"scripted": model},
    }
    config = {"provider": {"slipstream": provider}, "model": "slipstream/scripted", "permission": "allow"}
    (bench.work / "opencode.json").write_text(json.dumps(config | {"small_model": "slipstream/scripted"}))

    def run(*arguments: str) -> Callable[[], str]:
        environment = {"XDG_DATA_HOME": str(bench.home), "OPENCODE_DISABLE_AUTOUPDATE": "1"}
        return lambda: bench.command(program, "run", *arguments, environment=environment)

    _edit_and_resume(bench, run, resume=lambda prompt: run("--continue", prompt))


def aider(bench: Bench) -> None:
    """An edit of a file, which aider finds in the answer's text."""
    notes = bench.work / "notes.txt"
    notes.write_text("The sky is blue.\n")
    options = (
        *("--model", "openai/scripted", "--openai-api-base", f"{bench.url}/v1", "--openai-api-key", "none"),
        *("--yes-always", "--no-git", "--edit-format", "diff", "--no-check-update", "--no-show-model-warnings"),
        *("--no-show-release-notes", "--analytics-disable", "--no-stream", "--map-tokens", "0"),
    )
    prompt = "[[run aider]] Change the colour."
    with bench.phase("edit", prompt) as phase:
        program = bench.folder / "bin" / "aider"
        run = partial(bench.command, program, *options, "--message", prompt, "notes.txt", environment={})
        bench.ask(phase, run, says="Here it is.")
    bench.require(notes.read_text() == "The sky is green.\n", "notes.txt was not edited")


def llm(bench: Bench) -> None:
    """A tool loop of the command line."""
    model = {"model_id": "scripted", "model_name": "scripted", "api_base": f"{bench.url}/v1", "supports_tools": True}
    (bench.home / "extra-openai-models.yaml").write_text(json.dumps([model]))
    function = (AGENTS / "_task.py").read_text().partition("\ndef ")[2]
    environment = {"LLM_USER_PATH": str(bench.home), "OPENAI_API_KEY": "none"}
    prompt = "[[run loop]] Where is it sunny, in Oslo or in Rome?"
    with bench.phase("loop", prompt) as phase:
        options = ("-m", "scripted", "-s", SYSTEM, "--functions", f"def {function}", "--no-stream", prompt)
        run = partial(bench.command, bench.folder / "bin" / "llm", *options, environment=environment)
        bench.ask(phase, run, says=BOTH)


def agent(program: str, script: str, run: str = "loop") -> Callable[[Bench], None]:
    """A tool loop of a library, as a script of `agents/` has it."""

    def loop(bench: Bench) -> None:
        prompt = f"[[run {run}]] Where is it sunny, in Oslo or in Rome?"
        environment = {
            "SLIPSTREAM_URL": bench.url,
            "PROMPT": prompt,
            "SYSTEM": SYSTEM,
            "OPENAI_API_KEY": "none",
            "NODE_PATH": str(bench.folder / "node_modules"),
            "CREWAI_DISABLE_TELEMETRY": "true",
            "CREWAI_TRACING_ENABLED": "false",
            "OTEL_SDK_DISABLED": "true",
            "HAYSTACK_TELEMETRY_ENABLED": "false",
        }
        path = AGENTS / script
        if path.suffix == ".mjs":  # modules are looked up beside the script
            path = bench.folder / script
            path.write_text((AGENTS / script).read_text())
        executable = bench.folder / program if program.startswith("bin/") else program
        with bench.phase("loop", prompt) as phase:
            bench.ask(phase, partial(bench.command, executable, path, environment=environment), says=BOTH)

    return loop


_PYTHON = "bin/python"
CLIENTS: dict[str, Callable[[Bench], None]] = {
    "claude-code": claude_code,
    "codex": codex,
    "opencode": opencode,
    "vercel": agent("node", "vercel_loop.mjs"),
    "aider": aider,
    "llm": llm,
    "smolagents": agent(_PYTHON, "smolagents_loop.py", "smolagents"),
    "langchain": agent(_PYTHON, "langchain_loop.py"),
    "langgraph": agent(_PYTHON, "langgraph_loop.py"),
    "autogen": agent(_PYTHON, "autogen_loop.py"),
    "llamaindex": agent(_PYTHON, "llamaindex_loop.py"),
    "haystack": agent(_PYTHON, "haystack_loop.py"),
    "agno": agent(_PYTHON, "agno_loop.py"),
    "strands": agent(_PYTHON, "strands_loop.py"),
    "crewai": agent(_PYTHON, "crewai_loop.py"),
    "litellm": agent(_PYTHON, "litellm_loop.py"),
    "semantickernel": agent(_PYTHON, "semantickernel_loop.py", "kernel"),
}


def runs(client: str, work: Path) -> dict[str, list[Step]]:
    """The steps of the model for a client that works in a folder, by the names of its runs."""
    notes, change = str(work / "notes.txt"), {"old": "blue", "new": "green"}
    edits: dict[str, list[Step]] = {
        "claude-code": [
            call("Read", file_path=notes),
            call("Edit", file_path=notes, old_string=change["old"], new_string=change["new"]),
            call("Bash", command="cat missing.txt", description="Show a file"),
        ],
        "codex": [
            call("exec_command", cmd="cat notes.txt"),
            call("exec_command", cmd="sed -i s/blue/green/ notes.txt"),
            call("exec_command", cmd="cat missing.txt"),
        ],
        "opencode": [
            call("read", filePath=notes),
            call("edit", filePath=notes, oldString=change["old"], newString=change["new"]),
            call("bash", command="cat missing.txt"),
        ],
    }
    patch = "notes.txt\n```\n<<<<<<< SEARCH\nThe sky is blue.\n=======\nThe sky is green.\n>>>>>>> REPLACE\n```\n"
    return {
        "edit": [*edits.get(client, []), EDITED],
        "resume": ["It is green."],
        "again": ["Nothing is left to do."],
        "aider": [f"Here it is.\n\n{patch}"],
        "loop": [*_look_ups(), BOTH],
        "smolagents": [*_look_ups(), call("final_answer", answer=BOTH)],
        "kernel": [*_look_ups("Weather-look_up"), BOTH],
    }
