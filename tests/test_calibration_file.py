"""Kept times come back as they were; what is damaged or foreign is ignored with a line of log."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.calibration_file import ROOT, SOURCES, CalibrationFile, digest_of_sources

SETTING = {"gpu": "NVIDIA H200", "model": {"num_layers": 36}, "max_model_len": 4096}
READINGS = {512: {128: {}, 256: {"serial": 2.0, "48:84": 1.5}}, 1024: {}}

times = st.dictionaries(st.sampled_from(["40:92", "48:84"]), st.floats(1e-3, 1e3))
modes = st.one_of(st.just({}), times.map(lambda ms: {"serial": 1.5} | ms))
readings = st.dictionaries(
    st.integers(1, 2048), st.dictionaries(st.integers(1, 9000), modes, max_size=4), max_size=4
)


@given(readings)
def test_what_is_written_comes_back(tmp_path_factory, found):
    file = CalibrationFile(tmp_path_factory.mktemp("cache") / "new", SETTING)
    assert file.read() == {}
    file.write(found)
    assert CalibrationFile(file.path.parent, dict(SETTING)).read() == found
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_what_another_engine_has_kept_meanwhile_stays(tmp_path):
    """Beside ours, in proportion to the serial step: it may have had other clocks."""
    file = CalibrationFile(tmp_path, SETTING)
    file.write({512: {128: {"serial": 2.0, "48:84": 1.5}}, 256: {64: {"serial": 1.0}}})
    file.write({512: {128: {"serial": 4.0, "40:92": 3.0}, 256: {"serial": 5.0}}})
    assert file.read() == {
        512: {128: {"serial": 4.0, "40:92": 3.0, "48:84": 3.0}, 256: {"serial": 5.0}},
        256: {64: {"serial": 1.0}},
    }


def test_a_write_that_fails_leaves_what_there_was(tmp_path, monkeypatch, caplog):
    def dump(*arguments, **options):
        raise OSError(28, "No space left on device")

    file = CalibrationFile(tmp_path, SETTING)
    file.write(READINGS)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", dump)
        file.write({})
    assert "No space left on device" in caplog.text
    assert file.read() == READINGS and list(tmp_path.iterdir()) == [file.path]


def test_a_file_of_another_setting_says_which(tmp_path, caplog):
    file = CalibrationFile(tmp_path, SETTING)
    other = {"gpu": "NVIDIA H100", "max_model_len": 4096, "model": SETTING["model"], "more": 1}
    file.path.write_text(json.dumps({"setting": other, "readings": {}}))
    assert file.read() == {}
    assert caplog.messages[0].endswith("it must be of this setting, got another gpu, more")


def test_another_setting_is_another_file(tmp_path):
    CalibrationFile(tmp_path, SETTING).write(READINGS)
    for changed in ({"gpu": "NVIDIA H100"}, {"model": {"num_layers": 28}}, {"driver": 13000}):
        assert CalibrationFile(tmp_path, SETTING | changed).read() == {}


def damaged() -> dict[str, str]:
    whole = {"setting": SETTING, "readings": {"512": {"128": {"serial": 1.0}}}}

    def with_times(ms) -> str:
        return json.dumps(whole | {"readings": {"512": {"128": ms}}})

    return {
        "empty": "",
        "half of it": json.dumps(whole)[:40],
        "a list": "[1, 2]",
        "a number": "3",
        "no readings": json.dumps({"setting": SETTING}),
        "another setting": json.dumps(whole | {"setting": SETTING | {"gpu": "other"}}),
        "no numbers of requests": json.dumps(whole | {"readings": {"many": {}}}),
        "readings in a list": json.dumps(whole | {"readings": [1]}),
        "no times": with_times(5),
        "no time": with_times({"serial": "fast"}),
        "true": with_times({"serial": True}),
        "none at all": with_times({"serial": 0}),
        "not finite": with_times({"serial": float("inf")}),
        "without serial": with_times({"48:84": 1.0}),
        "not text": "\udcff",
        "a number that no float holds": with_times({"serial": 10**400}),
        "too deep": "[" * 100_000,
    }


@pytest.mark.parametrize("kind", damaged())
def test_what_is_damaged_is_ignored_and_replaced(tmp_path, caplog, kind):
    file = CalibrationFile(tmp_path, SETTING)
    file.path.write_bytes(damaged()[kind].encode(errors="surrogateescape"))
    assert file.read() == {}
    [line] = caplog.messages
    assert f"{file.path} is ignored: " in line and "\n" not in line
    file.write(READINGS)
    assert file.read() == READINGS


def test_a_folder_that_cannot_be_written_costs_a_line_of_log(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    file = CalibrationFile(tmp_path / "file" / "folder", SETTING)
    file.write(READINGS)
    assert "is not written" in caplog.text
    assert file.read() == {}


def test_the_digest_is_of_the_sources(tmp_path):
    assert digest_of_sources() == digest_of_sources() != digest_of_sources(tmp_path)
    for name in ("kernels", "engine", "green"):
        (tmp_path / name).mkdir()
    names = ["kernels/a.py", "kernels/tiles.json", "engine/stage_a.py", "green/streams.py"]
    names += [f"engine/{name}.py" for name in ("decode", "graphs", "pipeline", "trial_steps")]
    names += ["engine/pipeline_choice.py"]
    names += [f"engine/{name}.py" for name in ("step_model", "device_rates", "auto_pipeline")]
    found = {digest_of_sources(tmp_path)}
    for name in names:
        (tmp_path / name).write_text("1")
        found.add(digest_of_sources(tmp_path))
    assert len(found) == 1 + len(names)
    (tmp_path / "engine/llm.py").write_text("1")  # has no say in how long a step takes
    assert digest_of_sources(tmp_path) in found


def test_there_are_files_of_all_sources():
    assert all(any(ROOT.glob(pattern)) for pattern in SOURCES)
