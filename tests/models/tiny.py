"""Tiny models with whole vocabularies: two layers of the default model between random embeddings of any width."""

import json
import shutil
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from slipstream.models import Model, ModelStore
from tests.models.families import Family
from tests.real_vocabularies import vocabulary
from tests.short_model import first_layers

_LAYERS = 2
_WIDTH = 64
"""Of the embeddings: with that of the layers, those of 262,208 tokens would take ten times the memory and time."""


def add_tiny_model(store: Path, family: Family, default: Model) -> Model:
    """Import a model of the family into the store at `store`, as `slipstream pull FOLDER` does."""
    folder = store / "made" / family.name
    folder.mkdir(parents=True)
    ov.save_model(_with_vocabulary(first_layers(default, _LAYERS), family.width), folder / "openvino_model.xml")
    shutil.copy(vocabulary(family.vocabulary), folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    config = {"model_type": "llama", "max_position_embeddings": 8192, "vocab_size": family.width}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": family.bos, "eos_token": family.eos}))
    return ModelStore(store).ensure(str(folder))


def _with_vocabulary(model: ov.Model, width: int) -> ov.Model:
    """The model with other embeddings, and logits that are as wide."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> ov.Node:
        return ops.convert(ops.constant(rng.normal(size=shape).astype(np.float16)), ov.Type.f32)

    embedding = next(node for node in model.get_ops() if node.get_type_name() == "Gather" and _of_rows(node))
    projection = model.get_results()[0].input_value(0).get_node()
    inner = projection.input_value(0).get_partial_shape()[2].get_length()
    scale = np.float32(_WIDTH**-0.5)
    rows = ops.gather(weights(width, _WIDTH), embedding.input_value(1), ops.constant(np.int64(0)))
    embedded = ops.matmul(ops.multiply(rows, scale), weights(inner, _WIDTH), transpose_a=False, transpose_b=True)
    for port in embedding.output(0).get_target_inputs():
        port.replace_source_output(embedded.output(0))
    narrow = ops.matmul(projection.input_value(0), weights(_WIDTH, inner), transpose_a=False, transpose_b=True)
    # The norm before it leaves each element at about one, so that logits have a spread of a few.
    logits = ops.matmul(ops.multiply(narrow, np.float32(inner**-0.5)), weights(width, _WIDTH), False, True)
    scaled = ops.multiply(logits, scale)
    projection.output(0).replace(scaled.output(0))
    model.validate_nodes_and_infer_types()
    return model


def _of_rows(gather: ov.Node) -> bool:
    """Whether it looks up rows of a large table, one for each token."""
    table = gather.input_value(0).get_partial_shape()
    return len(table) == 2 and table.is_static and table[0].get_length() > 10_000
