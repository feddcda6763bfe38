"""engine.csv: rows read back as they were, and those of the first columns live on."""

from dataclasses import asdict, replace

import pytest

from experiments.engine_csv import (
    COLUMNS,
    FORMER_HEADERS,
    EngineReading,
    migrate,
    read_engine_csv,
)
from experiments.harness import RESULTS, append_row

READING = EngineReading(
    model="Qwen3-0.6B",
    workload="fixed",
    config="pd",
    gpus=2,
    max_num_seqs=512,
    load=0.7,
    rate=12.5,
    eager=True,
    requests=3,
    prompt_tokens=24,
    output_tokens=12,
    seconds=0.5,
    output_tok_s=24.0,
    itl_ms_p99=1.25,
    preemptions=0,
    date="2026-01-02 03:04",
    gpu="H100",
    torch="2",
    triton="3",
    driver="",
    commit="abc",
)
FIRST = (
    "Qwen3-8B,fixed,False,256,131072,32768,5.7612,5687.9,1989.16,29.0687,0,2026-11-22 04:46,"
    "NVIDIA H100 80GB HBM3,2.11.0+cu130,3.6.0,580.159.04,01f5e65"
)


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "engine.csv"
    for reading in (READING, replace(READING, load=None, eager=False)):
        append_row(path, asdict(reading))
    assert read_engine_csv(path) == [READING, replace(READING, load=None, eager=False)]
    before = path.read_text()
    migrate(path)
    assert path.read_text() == before
    assert READING.run == ("Qwen3-0.6B", "H100", "2026-01-02 03:04", "abc")


def test_first_rows_are_migrated_to_the_letter(tmp_path):
    path = tmp_path / "engine.csv"
    path.write_text(f"{FORMER_HEADERS[0]}\n{FIRST}\n{FIRST}\n")
    migrate(path)
    reading, _ = read_engine_csv(path)
    assert (reading.config, reading.gpus, reading.eager) == ("one", 1, False)
    assert (reading.ttft_ms_p50, reading.tpot_ms_p50) == (1989.16, 29.0687)
    unknown = {"load", "rate", "goodput_req_s", *(c for c in COLUMNS if c.startswith("itl"))}
    unknown |= {f"{name}_ms_{of}" for name in ("ttft", "tpot") for of in ("mean", "p99")}
    assert {name for name, value in asdict(reading).items() if value is None} == unknown
    cells = path.read_text().splitlines()[1].split(",")
    assert [cell for cell in cells if cell] == [
        "Qwen3-8B",
        "fixed",
        "one",
        "1",
        "256",
        *FIRST.split(",")[2:],
    ]
    append_row(path, asdict(READING))
    assert read_engine_csv(path)[-1] == READING
    assert [p.name for p in tmp_path.iterdir()] == ["engine.csv"]


def test_rows_without_a_size_are_of_the_usual_one(tmp_path):
    path, row = tmp_path / "engine.csv", asdict(replace(READING, max_num_seqs=256))
    del row["max_num_seqs"]
    append_row(path, row)
    assert path.read_text().splitlines()[0] == FORMER_HEADERS[1]
    migrate(path)
    assert read_engine_csv(path) == [replace(READING, max_num_seqs=256)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model,workload\n", "must have the columns"),
        (f"{','.join(COLUMNS)}\n", "got a header alone"),
        (f"{','.join(COLUMNS)}\nQwen3-0.6B,fixed\n", "line 2 must be a whole reading"),
    ],
)
def test_what_is_no_engine_csv_is_refused(text, says, tmp_path):
    path = tmp_path / "engine.csv"
    path.write_text(text)
    migrate(path)
    assert path.read_text() == text
    with pytest.raises(ValueError, match=says):
        read_engine_csv(path)


def test_no_file_is_not_migrated(tmp_path):
    migrate(tmp_path / "engine.csv")
    assert not list(tmp_path.iterdir())


def test_the_results_of_this_repository_can_be_read():
    readings = read_engine_csv(RESULTS / "engine.csv")
    assert {r.workload for r in readings} >= {"offline", "batch1", "fixed"}
    assert all(r.seconds > 0 and r.output_tok_s > 0 for r in readings)
