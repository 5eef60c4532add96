"""OpenVINO keeps to the contract of a backend."""

from slipstream.backend.openvino import OpenVINOBackend
from slipstream.backend.paged_model import PagedModel
from slipstream.models import Model
from tests.conformance.backends import check_backend


def test_openvino_is_a_backend(model: Model) -> None:
    check_backend(OpenVINOBackend(PagedModel(model.ir_path), kv_memory=64 * 2**20), seed=1, longest=90, rounds=4)
