"""The default model with its first layers alone: real weights, tokenizer and template, but a sixth of the time.

What it says makes no sense, so it serves the tests that don't ask for sense, which are nearly all.
"""

import shutil
from pathlib import Path

import openvino as ov

from slipstream.models import Model, ModelStore

LAYERS = 2
"""As few as there may be: what the second has for a token depends on all tokens before, as in any later one."""
TOKEN_BYTES = LAYERS * 2 * 3 * 64 * 2
"""Of keys and values, which are 16 bits in three heads of 64 elements, in each layer."""


def room_for(tokens: int) -> str:
    """KV memory for so many tokens of the short model, as an option's value."""
    return f"{tokens * TOKEN_BYTES // 1024}KiB"


def add_short_model(home: Path, model: Model, *, template: str | None = None) -> Model:
    """Put a model of the same name, cut short, into the store at `home`; with another chat `template` if it's given."""
    folder = home / "models" / model.name
    folder.mkdir(parents=True)
    for path in model.path.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    ov.save_model(first_layers(model, LAYERS), folder / model.ir_path.name, compress_to_fp16=False)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    files = {name: (folder / name).stat().st_size for name in model.manifest.files}
    model.manifest.model_copy(update={"files": files}).save(folder)
    (home / "bench").symlink_to(_made(model.path.parents[1] / "bench"))  # what is fetched is fetched once
    short = ModelStore(home).get(model.name)
    assert short is not None
    return short


def first_layers(whole: Model, layers: int) -> ov.Model:
    """A graph in which the norm behind the last layer takes what an earlier layer gives."""
    core = ov.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin brings paged attention
    model = core.read_model(whole.ir_path)
    sums = {node.get_friendly_name(): node for node in model.get_ops() if node.get_friendly_name().startswith("layer.")}
    for port in sums[f"layer.{len(sums) - 1}"].output(0).get_target_inputs():
        port.replace_source_output(sums[f"layer.{layers - 1}"].output(0))
    inputs = [node for node in model.get_parameters() if _layer_of(node.get_friendly_name()) < layers]
    return ov.Model(model.get_results(), inputs, model.get_friendly_name())


def _layer_of(name: str) -> int:
    """The layer whose keys or values an input is; 0 for other inputs."""
    return int(name.partition("_cache.")[2] or 0)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
