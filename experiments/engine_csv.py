"""One line of engine.csv: what the engine did with one workload. Knows nothing of devices."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from experiments.harness import append_row, read_rows

FORMER_HEADERS = (
    # before there were configurations: one device, medians alone
    "model,workload,eager,requests,prompt_tokens,output_tokens,seconds,output_tok_s,"
    "ttft_ms_median,tpot_ms_median,preemptions,date,gpu,torch,triton,driver,commit",
    # before engines of different sizes were compared
    "model,workload,config,gpus,load,rate,eager,requests,prompt_tokens,output_tokens,seconds,"
    "output_tok_s,ttft_ms_mean,ttft_ms_p50,ttft_ms_p99,tpot_ms_mean,tpot_ms_p50,tpot_ms_p99,"
    "itl_ms_mean,itl_ms_p50,itl_ms_p99,goodput_req_s,preemptions,"
    "date,gpu,torch,triton,driver,commit",
)
FORMER_NAMES = {"ttft_ms_median": "ttft_ms_p50", "tpot_ms_median": "tpot_ms_p50"}
FORMERLY = {"config": "one", "gpus": "1", "max_num_seqs": "256"}  # what no column had to say


@dataclass(frozen=True, kw_only=True)
class EngineReading:
    """One reading; the fields are the columns. None, an empty cell: not measured."""

    model: str
    workload: str
    config: str  # one of engine_sets.CONFIGS
    gpus: int
    max_num_seqs: int  # of each engine: requests that decode at a time
    load: float | None = None  # of Poisson arrivals: their rate as a share of the capacity
    rate: float | None = None  # arrivals per second
    eager: bool
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float  # from the common start to the end of the last request
    output_tok_s: float
    ttft_ms_mean: float | None = None
    ttft_ms_p50: float | None = None
    ttft_ms_p99: float | None = None
    tpot_ms_mean: float | None = None
    tpot_ms_p50: float | None = None
    tpot_ms_p99: float | None = None
    itl_ms_mean: float | None = None  # over all gaps between tokens; of arrivals alone
    itl_ms_p50: float | None = None
    itl_ms_p99: float | None = None
    goodput_req_s: float | None = None  # requests within both limits of experiments.serving
    preemptions: int
    date: str
    gpu: str
    torch: str
    triton: str
    driver: str
    commit: str

    @property
    def run(self) -> tuple[str, str, str, str]:
        """What the readings of one model in one run have in common."""
        return self.model, self.gpu, self.date, self.commit


COLUMNS = [f.name for f in fields(EngineReading)]
_TYPES = get_type_hints(EngineReading)


def read_engine_csv(path: Path) -> list[EngineReading]:
    """Every line of an engine.csv. ValueError, with the line, where it is not one, or where there
    is none."""
    readings = []
    for line, row in enumerate(read_rows(path, COLUMNS), start=2):
        try:
            readings.append(EngineReading(**{c: _parse(row[c], _TYPES[c]) for c in COLUMNS}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {line} must be a whole reading, got {row}") from error
    if not readings:
        raise ValueError(f"{path} must hold readings, got a header alone")
    return readings


def migrate(path: Path) -> None:
    """Rewrite an engine.csv of former columns with those of today; others stay as they are.

    What was not measured then stays empty; every value is kept to the letter.
    """
    header = path.read_text().partition("\n")[0] if path.exists() else ""
    if header not in FORMER_HEADERS:
        return
    new = path.with_suffix(".csv.new")
    for row in read_rows(path, header.split(",")):
        known = FORMERLY | {FORMER_NAMES.get(column, column): row[column] for column in row}
        append_row(new, {column: known.get(column, "") for column in COLUMNS})
    new.replace(path)  # at once: an interrupted run loses nothing


def _parse(text: Any, kind: Any) -> Any:
    optional = type(None) in get_args(kind)
    if optional:
        if text == "":
            return None
        kind = get_args(kind)[0]
    if kind is bool:
        return {"True": True, "False": False}[text]
    return kind(text)
