"""Which directories are checkpoints, which of them are kept, and manifests and progress that are not what they should be."""

import json

import pytest

from pmpo_megatron.checkpoint import files
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.training.progress import RunProgress


def make(root, name):
    (root / name).mkdir(parents=True)
    (root / name / "progress.json").write_text(json.dumps({"made": name}))
    return root / name


def names(root):
    return sorted(path.name for path in root.iterdir())


FOREIGN = [
    "round-best",
    "round-best-2",
    "round-00000006.bak",
    "round-7",
    "round-000000008",
    "copy.partial",
    "round-best.partial",
]


def test_only_exact_names_are_checkpoints_and_the_rest_is_never_touched(tmp_path):
    for number in range(1, 6):
        make(tmp_path, f"round-{number:08d}")
    for name in FOREIGN:
        make(tmp_path, name)
    make(tmp_path, "round-00000001.partial")
    (tmp_path / "round-00000009").symlink_to(tmp_path / "round-00000005")
    (tmp_path / "round-00000010").write_text("a file")
    (tmp_path / "round-latest").symlink_to("round-00000005")
    assert [files.round_of(path) for path in files.list_checkpoints(tmp_path)] == [5, 4, 3, 2, 1]
    files.remove_old(tmp_path, CheckpointConfig(keep=2))
    kept = ["round-00000004", "round-00000005", "round-00000009", "round-00000010", "round-latest"]
    assert names(tmp_path) == sorted(kept + FOREIGN)
    assert files.list_checkpoints(tmp_path / "gone") == []


def test_best_and_every_nth_are_kept_beside_the_newest(tmp_path):
    accuracy = {1: 0.1, 2: 0.9, 3: 0.8, 4: 0.2, 6: 0.85, 99: 1.0}
    config = CheckpointConfig(keep=2, keep_best=2, keep_every=5)
    for number in range(1, 13):
        make(tmp_path, f"round-{number:08d}")
        files.remove_old(tmp_path, config, accuracy={done: value for done, value in accuracy.items() if done < number})
    assert [files.round_of(path) for path in files.list_checkpoints(tmp_path)] == [12, 11, 10, 6, 5, 2]


def test_damaged_ones_do_not_count_among_those_kept(tmp_path):
    made = [make(tmp_path, f"round-{number:08d}") for number in (2, 4, 7)]
    files.remove_old(tmp_path, CheckpointConfig(keep=2), damaged={made[2]})
    assert names(tmp_path) == ["round-00000002", "round-00000004"]


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "3", "{}", "\udcff", "[" * 100_000),
        *(json.dumps({"files": listed}) for listed in (None, {}, [], {"x": 5}, {"x": [1]}, {"x": [1, "2"]}, {"x": [True, 2]})),
        *(json.dumps({"files": {name: [1, 2]}}) for name in ("../x", "/etc/passwd", "a/../../x", "", "a\0")),
    ],
)
def test_a_manifest_of_another_shape_is_damage(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="manifest.json: (absent or )?damaged: "):
        files.read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "{", "[" * 100_000])
def test_progress_that_is_no_record_is_damage(content, tmp_path):
    (tmp_path / "progress.json").write_text(content)
    with pytest.raises(CheckpointError, match="progress.json: (absent or )?damaged"):
        files.read_progress(tmp_path)


GOOD = {
    "round": 4,
    "policy_version": 4,
    "skipped_in_a_row": 0,
    "evaluated": 2,
    "sampler": {"num_prompts": 40, "seed": 0, "epoch": 0, "position": 24},
    "log": {"step": 4, "bytes": {"metrics": 100}},
}


@pytest.mark.parametrize(
    "changed",
    [
        *({"round": value} for value in ("4", -1, True, None)),
        *({"sampler": value} for value in ([], {"epoch": 0})),
        *({"log": value} for value in (3, {"step": 4}, {"step": "x", "bytes": {}}, {"step": 4, "bytes": {"metrics": None}})),
        *({"accuracy": value} for value in ({"two": 0.5}, {"2": "high"})),
        {"surprise": 1},
    ],
)
def test_progress_of_wrong_types_is_damage(changed):
    assert RunProgress.of(GOOD).accuracy == {} and RunProgress.of(GOOD | {"accuracy": {"2": 0.5}}).accuracy == {"2": 0.5}
    with pytest.raises(CheckpointError, match="progress.json"):
        RunProgress.of(GOOD | changed)
    with pytest.raises(CheckpointError, match="round is missing"):
        RunProgress.of({name: value for name, value in GOOD.items() if name != "round"})
