import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import pydantic
import pytest

from fst_dspy.config import FSTConfig
from fst_dspy.errors import StoreError
from fst_dspy.run import store as store_of_runs
from fst_dspy.run.store import KEPT_CHECKPOINTS, RunStore, delete_checkpoints


def write_weights(text):
    return lambda folder: (folder / "w.bin").write_text(text)


def test_checkpoints_come_back_newest_first_and_old_ones_go(tmp_path):
    store = RunStore(tmp_path)
    for n in range(4):
        store.checkpoint({"n": n}, write_weights(str(n)))
    state, weights = store.latest()
    assert state == {"n": 3}
    assert (weights / "w.bin").read_text() == "3"
    assert len(list((tmp_path / "checkpoints").iterdir())) == KEPT_CHECKPOINTS


def test_a_half_written_checkpoint_is_never_picked(tmp_path):
    store = RunStore(tmp_path)
    store.checkpoint({"n": 0}, write_weights("0"))

    def die(folder):
        (folder / "w.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.checkpoint({"n": 1}, die)
    assert store.latest()[0] == {"n": 0}
    store.checkpoint({"n": 2}, write_weights("2"))
    assert store.latest()[0] == {"n": 2}


def test_resuming_cuts_the_logs_back(tmp_path):
    store = RunStore(tmp_path)
    store.append("cycles", [{"cycle": 0}])
    store.checkpoint({}, write_weights(""))
    store.append("cycles", [{"cycle": 1}])
    store.append("steps", [{"step": 1}])  # begun after the checkpoint
    assert len(store.read("cycles")) == 2
    store.latest()
    assert store.read("cycles") == [{"cycle": 0}]
    assert store.read("steps") == []


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    store = RunStore(tmp_path)
    store.begin({"seed": 0})
    store.clear_logs()
    store.append("cycles", [{"cycle": 0}])
    store.checkpoint({}, write_weights(""))
    store.latest()
    assert (tmp_path / "train.jsonl").read_text() == "{}" and store.read("cycles")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "answers.jsonl").write_text("{}")  # a run's by its name
    with pytest.raises(StoreError, match=r"answers\.jsonl.*choose another folder"):
        RunStore(tmp_path / "other").begin({"seed": 0})
    assert (tmp_path / "other" / "answers.jsonl").read_text() == "{}"


@dataclass(frozen=True)
class Row:
    fields: Mapping[str, object]


class Ticket(pydantic.BaseModel):
    queue: str


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("ä\u2028\ud83d", "ä\u2028\ud83d"),  # half of a pair, as some data sets have
        (2**70, 2**70),
        ({1: ("a", 0.1)}, {"1": ["a", 0.1]}),
        ({(1, 2): Row({"x": {3}})}, {"(1, 2)": {"fields": {"x": "{3}"}}}),
        (datetime.date(2020, 1, 2), "datetime.date(2020, 1, 2)"),
        (Ticket(queue="a"), "Ticket(queue='a')"),
        (float("inf"), None),
    ],
)
def test_rows_may_hold_anything(tmp_path, value, read):
    store = RunStore(tmp_path)
    store.append("rollouts", [Row({"a": value}), {"b": 1}])
    assert store.read("rollouts") == [{"fields": {"a": read}}, {"b": 1}]


def test_a_cut_off_last_line_is_left_out(tmp_path):
    store = RunStore(tmp_path)
    store.append("cycles", [{"cycle": 0}])
    with open(tmp_path / "cycles.jsonl", "a") as file:
        file.write('{"cycle": ')
    assert store.read("cycles") == [{"cycle": 0}]


def test_two_writers_are_refused(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(StoreError, match="another process"):
        RunStore(tmp_path)
    store.close()
    RunStore(tmp_path).close()


def test_the_config_of_something_else_is_left_alone(tmp_path):
    config = tmp_path / "config.json"  # as every model's folder has
    config.write_text('{"model_type": "qwen3"}')
    with pytest.raises(StoreError, match="is not a run's, but your own"):
        RunStore(tmp_path).begin({"seed": 0})
    assert config.read_text() == '{"model_type": "qwen3"}'


def test_another_runs_folder_is_refused(tmp_path):
    store = RunStore(tmp_path)
    store.begin({"seed": 0, "environment": {"python": "3.11"}})
    store.begin({"seed": 2})  # nothing is kept of the first one
    store.begin({"seed": 0, "environment": {"python": "3.11"}})
    store.append("cycles", [{"cycle": 0}])
    store.begin({"seed": 0, "environment": {"python": "3.12"}})
    with pytest.raises(StoreError, match="seed differs"):
        store.begin({"seed": 1, "environment": {}})


@pytest.mark.parametrize(
    ("change", "schedule"),
    [
        ({"micro_batch_size": 2, "num_threads": 8}, "constant"),
        ({"max_reflection_cost": 2.0, "max_reflection_tokens": None}, "constant"),
        ({"max_cycles": 9}, "constant"),
        ({"on_no_signal": "warn", "max_rollouts": 900}, "cosine"),
    ],
)
def test_a_run_goes_on_with_less_memory_or_more_to_spend(tmp_path, change, schedule):
    """As what went wrong says: refused, all that was done would be lost."""
    usual = {"max_cycles": 3, "max_reflection_tokens": 5, "lr_scheduler_type": schedule}
    store = RunStore(tmp_path)
    for settings in (usual, {**usual, **change}):
        config = {"settings": FSTConfig.make(**settings).to_dict()}
        store.begin(config)
        store.append("cycles", [{"cycle": 0}])
        assert store.config()["settings"] == config["settings"]
    with pytest.raises(StoreError, match="max_tokens"):
        store.begin({"settings": FSTConfig.make(**usual, max_tokens=9).to_dict()})
    if schedule == "cosine":
        with pytest.raises(StoreError, match=r"max_cycles differs \(3 there, 4 here\)"):
            store.begin({"settings": FSTConfig.make(**{**usual, "max_cycles": 4}).to_dict()})


def test_room_on_the_disk_is_that_of_the_run_and_not_of_other_files_in_its_folder(
    tmp_path, monkeypatch
):
    """Another run in it may be at work, whose files come and go."""
    monkeypatch.setattr(store_of_runs.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    for name in ("checkpoints/0/state.json", "versions/x.safetensors", "other/checkpoints/0/w"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1234567")
    assert store_of_runs.free_bytes(tmp_path) == 100 + 2 * 7


def test_a_metric_that_was_kept_by_its_name_alone_is_the_same(tmp_path, caplog):
    store = RunStore(tmp_path)
    store.begin({"metric": "m"})
    store.append("cycles", [{"cycle": 0}])
    store.begin({"metric": {"name": "m", "source": "a", "values": {"k": 1}}})
    store.begin({"metric": {"name": "m", "source": "a", "values": {"k": 2}}})
    assert "metric.k differs (1 there, 2 here) since" in caplog.text
    with pytest.raises(StoreError, match="metric differs"):
        store.begin({"metric": {"name": "other"}})


def test_a_run_that_has_ended_without_checkpoints_is_left_alone(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.begin({"seed": 0})
    store.append("cycles", [{"cycle": 0}])
    store.checkpoint({"cycle": 0}, lambda folder: None)
    store.write_json("result.json", {})
    store.begin({"seed": 0})  # which goes on
    delete_checkpoints(tmp_path)
    with pytest.raises(StoreError, match="has ended and its checkpoints were deleted"):
        store.begin({"seed": 0})
    assert store.read("cycles") == [{"cycle": 0}]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to"):
        RunStore(tmp_path / "file" / "run")


def test_json_is_written_whole(tmp_path):
    store = RunStore(tmp_path)
    store.write_json("a.json", {"x": 1})
    with pytest.raises(TypeError):
        store.write_json("a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_full_disk_is_a_clear_error_and_what_was_written_stays(tmp_path):
    store = RunStore(tmp_path)
    store.append("cycles", [{"cycle": 0}])
    store.checkpoint({"n": 0}, write_weights("0"))
    (tmp_path / "steps.jsonl").symlink_to("/dev/full")  # every write to it finds no space left
    with pytest.raises(StoreError, match="No space left on device; what was written before"):
        store.append("steps", [{"step": 1}])
    (tmp_path / "steps.jsonl").unlink()
    assert store.latest()[0] == {"n": 0}
    assert store.read("cycles") == [{"cycle": 0}]


def test_a_checkpoint_that_finds_no_space_leaves_the_one_before(tmp_path):
    store = RunStore(tmp_path)
    store.checkpoint({"n": 0}, write_weights("0"))

    def fill(folder):
        with open("/dev/full", "w") as file:
            file.write("x" * 10_000)

    with pytest.raises(StoreError, match="No space left"):
        store.checkpoint({"n": 1}, fill)
    assert store.latest()[0] == {"n": 0}


def test_a_read_only_place_is_a_clear_error():
    with pytest.raises(StoreError, match="cannot write to /proc/run"):
        RunStore("/proc/run")


def checkpointed(folder: Path, count: int = 2) -> RunStore:
    """A store with some rows of a log and as many checkpoints."""
    store = RunStore(folder)
    for number in range(count):
        store.append("steps", [{"number": number}])
        store.checkpoint(
            {"number": number}, lambda place: (place / "w.bin").write_bytes(b"weights") and None
        )
    return store


def test_what_the_system_leaves_in_a_folder_is_no_damage(tmp_path: Path) -> None:
    store = checkpointed(tmp_path)
    for place in ("1", "1/weights"):
        (tmp_path / "checkpoints" / place / ".DS_Store").write_bytes(b"Bud1")
    found = store.latest()
    assert found is not None and found[0] == {"number": 1}
    store.close()


@pytest.mark.parametrize("name", ["weights/w.bin", "state.json"])
@pytest.mark.parametrize("damage", [b"", b"weightz"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = checkpointed(tmp_path)
    (tmp_path / "checkpoints" / "1" / name).write_bytes(damage)
    found = store.latest()
    assert found is not None and found[0] == {"number": 0}
    assert "checkpoint 1 is damaged" in caplog.text
    assert store.read("steps") == [{"number": 0}], "the log is of that checkpoint"
    store.close()


def test_where_no_checkpoint_is_whole_the_run_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    store = checkpointed(tmp_path)
    for number in (0, 1):
        (tmp_path / "checkpoints" / str(number) / "state.json").write_text("{")
    with pytest.raises(StoreError, match=r"no checkpoint in .* is whole"):
        store.latest()
    assert len(store.read("steps")) == 2
    store.close()


@pytest.mark.parametrize("length", [10**9, -1, "7", None, 1.5])
def test_a_log_is_never_made_longer_nor_cut_by_nonsense(tmp_path: Path, length: object) -> None:
    store = checkpointed(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "0"
    (folder / "hashes.json").unlink()  # as of versions before, or of somebody who wrote them anew
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"lengths": {"steps.jsonl": length}}))
    before = (tmp_path / "steps.jsonl").read_bytes()
    with pytest.raises(StoreError, match="shorter"):
        store.latest()
    assert (tmp_path / "steps.jsonl").read_bytes() == before
    store.close()


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    store = checkpointed(tmp_path, 1)
    (tmp_path / "checkpoints" / "0" / "hashes.json").unlink()
    found = store.latest()
    assert found is not None and found[0] == {"number": 0}
    store.close()


def test_a_checkpoint_of_another_system_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative_to = Path.relative_to
    with monkeypatch.context() as windows:
        windows.setattr(Path, "relative_to", lambda *two: PureWindowsPath(relative_to(*two)))
        store = checkpointed(tmp_path, 1)
    hashes = tmp_path / "checkpoints" / "0" / "hashes.json"
    names = json.loads(hashes.read_text())
    assert not any("\\" in name for name in names)
    assert store.latest() is not None
    hashes.write_text(json.dumps({name.replace("/", "\\"): own for name, own in names.items()}))
    assert store.latest() is not None, "of an earlier version"
    store.close()


@pytest.mark.parametrize("name", ["versions", "steps.jsonl", ".lock", "config.json", "checkpoints"])
def test_links_are_refused_and_what_they_point_to_is_left_alone(tmp_path: Path, name: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    folder.mkdir()
    (outside / "precious.safetensors").write_bytes(b"precious")
    target = outside if name in ("versions", "checkpoints") else outside / "precious.safetensors"
    (folder / name).symlink_to(target)
    with pytest.raises(StoreError, match="is a link"):
        RunStore(folder)
    assert (outside / "precious.safetensors").read_bytes() == b"precious"


def test_a_link_within_what_the_run_deletes_is_refused(tmp_path: Path) -> None:
    checkpointed(tmp_path, 1).close()
    (tmp_path / "checkpoints" / "0" / "weights" / "other.bin").symlink_to(tmp_path / "steps.jsonl")
    with pytest.raises(StoreError, match=r"other\.bin is a link"):
        RunStore(tmp_path)


def test_links_that_a_tracker_keeps_beside_the_run_are_its_own(tmp_path: Path) -> None:
    """As Weights & Biases does, to its latest run and to the logs of it."""
    checkpointed(tmp_path, 1).close()
    own = tmp_path / "wandb" / "offline-run-1"
    own.mkdir(parents=True)
    (tmp_path / "wandb" / "latest-run").symlink_to(own)
    (tmp_path / "wandb" / "debug.log").symlink_to(own / "debug.log")  # which need not be there
    store = RunStore(tmp_path)
    found = store.latest()
    assert found is not None and found[0] == {"number": 0}
    store.close()


def test_a_full_disk_is_a_clear_error_wherever_it_is_met(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    store = RunStore(tmp_path)

    def full(place: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(StoreError, match=r"No space left .* make room"):
        store.checkpoint({}, full)
    store.close()
