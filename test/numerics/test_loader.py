"""Loading: sharded files, dtypes, random weights, and the arena that ranks share."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test.numerics.helpers.one_rank import logits_of
from test.numerics.helpers.tiny_models import make_reference, prompt, save

from sps_runtime.config.model import ARCHITECTURES, load_model_config
from sps_runtime.models.arena import HEADER_BYTES, open_shared_arena
from sps_runtime.models.layout import plan_layout
from sps_runtime.models.loader import (
    LoadSpec,
    SharedWeights,
    build_model,
    load_model,
    load_weights,
)
from sps_runtime.models.registry import MODELS, model_class
from sps_runtime.types.errors import ConfigError


def single_file(directory: Path, case: str = "qwen2") -> Path:
    return save(make_reference(case), directory)


def test_the_registry_knows_what_the_configuration_accepts() -> None:
    assert set(MODELS) == set(ARCHITECTURES)
    for name in MODELS:
        assert model_class(name).__name__ == name


def test_sharded_files_hold_the_same_model(tmp_path: Path) -> None:
    reference = make_reference("llama-biases")
    save(reference, tmp_path / "one")
    save(reference, tmp_path / "many", shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    config = load_model_config(tmp_path / "one")
    one, many = (load_weights(config, LoadSpec(tmp_path / name)) for name in ("one", "many"))
    assert torch.equal(one.memory, many.memory)


def test_shards_without_an_index_are_found(tmp_path: Path) -> None:
    single_file(tmp_path)
    config = load_model_config(tmp_path)
    expected = load_weights(config, LoadSpec(tmp_path))
    tensors = sorted(load_file(tmp_path / "model.safetensors").items())
    (tmp_path / "model.safetensors").unlink()
    save_file(dict(tensors[:9]), tmp_path / "a.safetensors")
    save_file(dict(tensors[9:]), tmp_path / "b.safetensors")
    assert torch.equal(load_weights(config, LoadSpec(tmp_path)).memory, expected.memory)


def test_dtype_is_converted_on_the_way(tmp_path: Path) -> None:
    single_file(tmp_path)
    config = load_model_config(tmp_path)
    spec = LoadSpec(tmp_path, dtype="bfloat16")
    name, source = "layers.1.down", "model.layers.1.mlp.down_proj.weight"
    loaded = load_weights(config, spec).matrices(0)[name].tensor_NK
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, load_file(tmp_path / "model.safetensors")[source].bfloat16())


def test_a_tied_head_takes_no_memory(tmp_path: Path) -> None:
    config = load_model_config(save(make_reference("qwen2-tied"), tmp_path))
    arena = load_weights(config, LoadSpec(tmp_path, tp_size=2))
    for rank, rows in ((0, slice(0, 130)), (1, slice(130, 259))):
        share = arena.tensors(rank)["embed"][rows]
        head = arena.matrices(rank)["head"].tensor_NK
        assert head.shape == share.shape
        assert head.data_ptr() == share.data_ptr()


def test_every_slice_is_contiguous_and_aligned(tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path))
    arena = load_weights(config, LoadSpec(tmp_path, tp_size=4))
    for rank in range(4):
        for name, entry in arena.layout.of(rank, linear=True):
            assert arena.tensor(entry).is_contiguous(), name
    assert all(e.offset % 64 == 0 for k, e in arena.layout.entries.items() if k[1] != "head")


def test_only_replicated_kv_heads_cost_memory(tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path))
    sizes = [plan_layout(config, tp, torch.float32).nbytes for tp in (1, 2, 4)]
    assert sizes[1] - sizes[0] < 64 * 100
    kv = 2 * 2 * config.head_dim * (config.hidden_size + 1) * 4 * config.num_layers
    assert kv <= sizes[2] - sizes[1] < kv + 64 * 200


def test_refusals(tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path))
    file, spec = tmp_path / "model.safetensors", LoadSpec(tmp_path)
    tensors = load_file(file)
    lost = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"lacks tensor model\.layers\.2\.mlp\.up_proj"):
        load_weights(config, spec)
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": lost[1:]}, file)
    with pytest.raises(ConfigError, match=r"has shape \(95, 64\)"):
        load_weights(config, spec)
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": lost.to(torch.int8)}, file)
    with pytest.raises(ConfigError, match="int8"):
        load_weights(config, spec)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        load_weights(config, spec)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no safetensors files"):
        load_weights(config, spec)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "absent.safetensors", 7])
def test_an_index_may_name_only_files_beside_it(file: object, tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path / "model"))
    save_file({}, tmp_path / "elsewhere.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(ConfigError, match="index"):
        load_weights(config, LoadSpec(tmp_path / "model"))


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    one = load_weights(config, LoadSpec(tmp_path, load_format="dummy", seed=5))
    other = load_weights(config, LoadSpec(tmp_path, load_format="dummy", seed=6))
    split = load_weights(config, LoadSpec(tmp_path, load_format="dummy", seed=5, tp_size=2))
    name = "layers.0.output"
    assert not torch.equal(one.matrices(0)[name].tensor_NK, other.matrices(0)[name].tensor_NK)
    joined = torch.cat([split.matrices(rank)[name].tensor_NK for rank in (0, 1)], dim=1)
    assert torch.equal(joined, one.matrices(0)[name].tensor_NK)
    logits = logits_of(build_model(config, one), prompt(20))
    assert logits.isfinite().all() and logits.std() > 0.01


def test_ranks_share_one_mapping(tmp_path: Path) -> None:
    """The second rank waits for the first, then computes on the very same bytes."""
    config = load_model_config(single_file(tmp_path))
    spec, fd = LoadSpec(tmp_path), os.memfd_create("weights")
    found: list[torch.Tensor] = []

    def wait_and_load() -> None:
        found.append(load_weights(config, spec, SharedWeights(fd, first=False)).memory)

    second = threading.Thread(target=wait_and_load)
    second.start()
    second.join(0.05)
    assert second.is_alive(), "nothing is ready yet"
    first = load_weights(config, spec, SharedWeights(fd, first=True))
    second.join(10)
    assert torch.equal(found[0], first.memory)
    assert torch.equal(first.memory, load_weights(config, spec).memory)
    assert os.fstat(fd).st_size == HEADER_BYTES + first.layout.nbytes
    with mmap.mmap(fd, 0) as writable:
        writable[HEADER_BYTES + 7] ^= 1
        assert first.memory[7] == found[0][7] == writable[HEADER_BYTES + 7]
    model = load_model(config, spec, shared=SharedWeights(fd, first=False))
    assert logits_of(model, prompt(5)).shape == (5, config.vocab_size)
    os.close(fd)


def test_waiting_ranks_hear_of_a_failure(tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    fd = os.memfd_create("weights")
    with pytest.raises(ConfigError, match="no safetensors"):
        load_weights(config, LoadSpec(tmp_path), SharedWeights(fd, first=True))
    with pytest.raises(ConfigError, match="could not load"):
        load_weights(config, LoadSpec(tmp_path), SharedWeights(fd, first=False))
    os.close(fd)


def test_another_layout_is_refused_and_waiting_ends(tmp_path: Path) -> None:
    config = load_model_config(single_file(tmp_path))
    fd = os.memfd_create("weights")
    layout = plan_layout(config, 1, torch.float32)
    with pytest.raises(ConfigError, match=r"within 0\.05 s"):
        open_shared_arena(layout, fd, timeout_s=0.05)
    load_weights(config, LoadSpec(tmp_path), SharedWeights(fd, first=True))
    with pytest.raises(ConfigError, match="differently"):
        load_weights(config, LoadSpec(tmp_path, tp_size=2), SharedWeights(fd, first=False))
    os.close(fd)


STRAY_WRITE = """
import os, sys
from pathlib import Path
from sps_runtime.config.model import load_model_config
from sps_runtime.models.loader import LoadSpec, SharedWeights, load_weights
path = Path(sys.argv[1])
shared = SharedWeights(os.memfd_create("weights"), first=True)
arena = load_weights(load_model_config(path), LoadSpec(path), shared)
print(int(arena.memory[0]), flush=True)
arena.memory[0] = 1
"""


def test_a_stray_write_faults_instead_of_changing_the_model(tmp_path: Path) -> None:
    single_file(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", STRAY_WRITE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip().isdigit(), done.stderr
    assert done.returncode < 0
